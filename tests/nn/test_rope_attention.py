"""Attention over an image with axial rotary positions: its equations, shifts of the image, low precision."""

import math

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import RoPEAttention2D


def layer(dim=6, **options):
    torch.manual_seed(0)
    return images.perturbed(RoPEAttention2D(dim, **({"head_dim": 8, "num_heads": 2} | options))).double()


def turned_by_hand(x, row, col, base):
    """Complex numbers for pairs of channels: x (..., head_dim) at one cell."""
    count = x.shape[-1] // 4
    turns = [row * base ** (-k / count) for k in range(count)] + [col * base ** (-k / count) for k in range(count)]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    factors = torch.tensor([complex(math.cos(t), math.sin(t)) for t in turns], dtype=torch.complex128)
    return torch.view_as_real(pairs * factors).flatten(-2)


@torch.no_grad()
def test_equations():
    attention, x = layer(rope_base=100.0), images.image(3, 4, 6)
    q, k, v = (x @ attention.qkv.weight.T).unflatten(-1, (3, 2, 8)).unbind(3)
    for part, norm in ((q, attention.q_norm), (k, attention.k_norm)):
        for i in range(3):
            for j in range(4):
                turned = turned_by_hand(part[:, i, j], i, j, 100.0)
                part[:, i, j] = F.layer_norm(turned, (8,), norm.weight, norm.bias)
    q, k, v = (part.flatten(1, 2) for part in (q, k, v))
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(8)).softmax(-1)
    y = torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2).unflatten(1, (3, 4))
    torch.testing.assert_close(attention(x), y @ attention.proj.weight.T, rtol=1e-10, atol=1e-10)


def test_a_transposed_image_with_swapped_axes_gives_the_transposed_result():
    attention, x = layer(), images.image(3, 4, 6)
    expected = attention(x)
    with torch.no_grad():
        weight = attention.qkv.weight.unflatten(0, (3, 2, 2, 4))
        weight[:2] = weight[:2].flip(2)
        for norm in (attention.q_norm, attention.k_norm):
            for parameter in (norm.weight, norm.bias):
                parameter.copy_(parameter.roll(4))
    torch.testing.assert_close(attention(x.transpose(1, 2)).transpose(1, 2), expected)


def test_gradients_reach_every_parameter():
    # What every key has in common, softmax leaves out.
    images.check_gradients(layer(), images.image(3, 4, 6), idle=("k_norm.bias",))


def test_widths():
    assert (RoPEAttention2D(160).num_heads, RoPEAttention2D(8).num_heads) == (5, 1)
    assert {name: tuple(t.shape) for name, t in RoPEAttention2D(64).state_dict().items()} == {
        "qkv.weight": (192, 64),
        "proj.weight": (64, 64),
        "q_norm.weight": (32,),
        "q_norm.bias": (32,),
        "k_norm.weight": (32,),
        "k_norm.bias": (32,),
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 5)], ids=str)
def test_small_images(size):
    attention, x = layer(), images.image(*size, 6)
    assert attention(x).shape == x.shape
    assert attention(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype):
    images.check_low_precision(layer().float(), RoPEAttention2D(6, 8, 2, dtype=dtype), dtype, images.image(5, 6, 6))


def test_compile():
    images.check_compile(layer().float(), images.image(4, 5, 6))


def test_bad_arguments():
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4, got 6"):
        RoPEAttention2D(8, 6)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        RoPEAttention2D(8, 8, 0)
    with pytest.raises(ValueError, match=r"x must have shape \(1, 2, 3, 6\) .*, got \(1, 2, 3, 5\)"):
        layer()(torch.zeros(1, 2, 3, 5))
