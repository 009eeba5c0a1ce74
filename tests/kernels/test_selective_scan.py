"""selective_scan's Triton kernels cut into programs in ways that the interpreter's own plan never takes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the package triton is not installed")

from ssmkit.kernels import selective_scan_walk
from ssmkit.kernels.selective_scan_walk import Plan

from ssmkit import ScanPath
from ssmkit.ops import selective_scan
from ssmkit.testing import available, device_of, run, selective_scan_inputs

pytestmark = pytest.mark.skipif(
    "triton" not in available("selective_scan"), reason="neither a GPU nor TRITON_INTERPRET=1"
)

SPLITS = Plan(block_d=4, tokens=4, step=8, num_warps=1, nsplits=3)
BLOCKS = Plan(block_d=2, tokens=1, step=4, num_warps=1, nsplits=1)


def gradients(inputs, **options):
    """Outputs and gradients in float64, weighted at random, so that every cut must give the same to many digits."""
    generator = torch.Generator().manual_seed(1)
    nseq, (dim, dstate) = inputs["initial_state"].shape[0], inputs["A"].shape
    weights = {
        "y": torch.randn(inputs["x"].shape, dtype=torch.float64, generator=generator),
        "final_state": torch.randn(nseq, dim, dstate, dtype=torch.float64, generator=generator),
    }
    return run(selective_scan, inputs, weights, return_final_state=True, backend="triton", **options)


def check(monkeypatch, plan, inputs, **options):
    """The call cut by `plan` gives what the call in one piece gives."""
    whole = gradients(inputs, **options)
    monkeypatch.setattr(selective_scan_walk, "plan_of", lambda *_: plan)
    cut = gradients(inputs, **options)
    assert cut.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(
            cut[name], whole[name], rtol=1e-11, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
        )


def inputs_of(seqlen, dim, dstate, **options):
    return selective_scan_inputs(1, seqlen, dim, dstate, dtype=torch.float64, device=device_of("triton"), **options)


@pytest.mark.parametrize(
    "options",
    [{"ngroups": 2}, {"constant_C": True}, {"constant_B": True, "ngroups": 2}],
    ids=["groups", "constant C", "constant B, groups"],
)
def test_blocks_of_channels(monkeypatch, options):
    check(monkeypatch, BLOCKS, inputs_of(19, 6, 3, **options))


def test_groups_of_B_and_C_that_do_not_nest(monkeypatch):
    inputs = inputs_of(9, 6, 3, ngroups=2)
    inputs["C"] = torch.cat([inputs["C"], inputs["C"][:, :, :1] * 0.5], dim=2).detach().requires_grad_()
    check(monkeypatch, BLOCKS, inputs)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_splits_over_the_length(monkeypatch, reverse):
    check(monkeypatch, SPLITS, inputs_of(150, 4, 3), reverse=reverse)


def test_splits_of_a_path_with_resets_and_pads(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    inputs = inputs_of(150, 3, 2)
    path = ScanPath(torch.randperm(150, generator=generator))
    flags = {
        "resets": torch.rand(1, 150, generator=generator) < 0.02,
        "mask": torch.rand(1, 150, generator=generator) < 0.9,
    }
    check(monkeypatch, SPLITS, inputs, path=path, **{name: flag.to(inputs["x"].device) for name, flag in flags.items()})


def test_splits_of_packed_sequences(monkeypatch):
    inputs = inputs_of(150, 3, 2, nseq=4)
    offsets = torch.tensor([0, 70, 70, 71, 150], device=inputs["x"].device)
    check(monkeypatch, SPLITS, inputs, cu_seqlens=offsets)


def test_more_splits_than_tokens(monkeypatch):
    check(monkeypatch, SPLITS, inputs_of(5, 3, 2))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_tensor_holds_a_state_per_token(monkeypatch):
    monkeypatch.setattr(selective_scan_walk, "plan_of", lambda *_: SPLITS._replace(nsplits=1))
    inputs = inputs_of(192, 4, 16)
    with Largest() as largest:
        gradients(inputs)
    assert largest.numel <= 192 * 4 * 16 / 8
