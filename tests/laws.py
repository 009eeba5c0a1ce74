"""What the tests of several scans share: how a law is held, and offsets of packed sequences that must be refused."""

import torch
from hypothesis import HealthCheck, settings

law = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])

BAD_OFFSETS = {  # of 6 tokens
    "descending": ([0, 4, 2, 6], "cu_seqlens must not descend: entry 2 is 2 after 4"),
    "not from zero": ([1, 6], "cu_seqlens must run from 0 to seqlen 6, got 1 to 6"),
    "not to the end": ([0, 5], "cu_seqlens must run from 0 to seqlen 6, got 0 to 5"),
    "none": ([], "at least one entry"),
}


def same(actual, expected):
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
