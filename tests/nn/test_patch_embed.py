"""Patch tokens, and LayerNorm over channels-first images."""

import pytest
import torch

from ssmkit.nn import LayerNorm2d, PatchEmbed


def test_tokens_are_the_convolution_at_their_patch():
    embed = PatchEmbed((8, 12), 4, in_chans=2, embed_dim=5)
    x = torch.randn(3, 2, 9, 12)
    tokens = embed(x)
    assert embed.grid_size == (2, 3)
    assert tokens.shape == (3, 2, 3, 5)
    one = torch.einsum("dchw,bchw->bd", embed.proj.weight, x[:, :, 4:8, 8:12]) + embed.proj.bias
    assert torch.allclose(tokens[:, 1, 2], one, atol=1e-5)


def test_patches_may_overlap():
    assert PatchEmbed(16, 4, stride=2, embed_dim=5)(torch.randn(1, 3, 16, 10)).shape == (1, 7, 4, 5)


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="at least one patch of 4 x 4, got 3 x 8"):
        PatchEmbed(8, 4, embed_dim=5)(torch.randn(1, 3, 3, 8))


def test_layer_norm_2d_normalises_channels():
    norm = LayerNorm2d(6)
    x = torch.randn(2, 6, 3, 5)
    y = norm(x)
    assert y.shape == x.shape
    assert torch.allclose(y.mean(1), torch.zeros(2, 3, 5), atol=1e-6)
    assert set(norm.state_dict()) == {"weight", "bias"}
