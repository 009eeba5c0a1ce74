"""mamba_ssm's norms: with residual, with gate, with a linear layer, and their references."""

import pytest
import torch
import torch.nn.functional as F

from ssmkit.interop.mamba_ssm.ops.triton.k_activations import swiglu
from ssmkit.interop.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from ssmkit.interop.mamba_ssm.ops.triton.layernorm_gated import LayerNorm, layernorm_fn, rmsnorm_fn
from ssmkit.interop.mamba_ssm.ops.triton.layernorm_gated import RMSNorm as GatedRMSNorm
from ssmkit.interop.mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref as gated_ref
from ssmkit.testing import assert_close


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_with_residual(is_rms_norm, dtype):
    x, residual = normal(2, 5, 8, dtype=dtype), normal(2, 5, 8, seed=1)
    weight, bias, scale = normal(8, seed=2), normal(8, seed=3), normal(2, 5, seed=4)
    total = x.double() * scale[..., None].to(dtype).double() + residual.double()
    norm = F.rms_norm if is_rms_norm else F.layer_norm
    expected = norm(total, (8,), weight=weight.double(), eps=1e-6) + bias.double()
    options = {"is_rms_norm": is_rms_norm, "prenorm": True}
    y, kept = layer_norm_fn(x, weight, bias, residual, rowscale=scale.to(dtype), **options)
    assert y.dtype == dtype and kept.dtype == torch.float32
    assert_close("y", y, expected)
    assert_close("sum", kept, total)
    alone, first = layer_norm_fn(x, weight, bias, residual_in_fp32=True, **options)
    assert alone.dtype == dtype and torch.equal(first, x.float())
    dropped, left = layer_norm_fn(x, weight, bias, residual, dropout_p=1.0, **options)
    assert torch.equal(left, residual) and dropped.shape == x.shape


def test_norm_layers_have_the_official_arguments():
    x, z, residual = normal(2, 8), normal(2, 8, seed=1), normal(2, 8, seed=2)
    norm = RMSNorm(8, 1e-6)
    y, total = norm(x, residual, prenorm=True)
    assert torch.equal(y, rms_norm_fn(x, norm.weight, None, residual)) and torch.equal(total, x + residual)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    gated = GatedRMSNorm(8, 1e-6, 4, False)
    assert torch.equal(gated(x, z), rmsnorm_fn(x, gated.weight, None, z, 1e-6, 4, False))
    layer = LayerNorm(8, 1e-6, 4, True)
    expected = F.group_norm(x, 2, eps=1e-6) * F.silu(z)
    torch.testing.assert_close(layer(x, z), expected)
    torch.testing.assert_close(layernorm_fn(x, layer.weight, layer.bias, z, 1e-6, 4), expected)
    for kind in (norm, gated, layer):
        torch.nn.init.constant_(kind.weight, 7.0)
        kind.reset_parameters()
        assert torch.equal(kind.weight, torch.ones(8))


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_norm_before_a_linear_layer(is_rms_norm):
    x, residual, weight, bias = normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(8, seed=2), normal(8, seed=3)
    linear, shift = normal(3, 8, seed=4), normal(3, seed=5)
    out, total = layer_norm_linear_fn(x, weight, bias, linear, shift, residual, prenorm=True, is_rms_norm=is_rms_norm)
    y, kept = layer_norm_fn(x, weight, bias, residual, prenorm=True, is_rms_norm=is_rms_norm)
    assert torch.equal(out, F.linear(y, linear, shift)) and torch.equal(total, kept)
    narrow = layer_norm_linear_fn(x.bfloat16(), weight, None, linear, None, is_rms_norm=is_rms_norm)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == (2, 5, 3)


@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_norm_references(is_rms_norm):
    """With one branch they are what the functions compute; a second branch is added, and has its own weight."""
    x, residual, weight, bias = normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(8, seed=2), normal(8, seed=3)
    scale = normal(2, 5, seed=4)
    reference, norm = (rms_norm_ref, F.rms_norm) if is_rms_norm else (layer_norm_ref, F.layer_norm)
    y, total = reference(x, weight, bias, residual, rowscale=scale, prenorm=True)
    options = {"rowscale": scale, "prenorm": True, "is_rms_norm": is_rms_norm}
    actual, kept = layer_norm_fn(x, weight, bias, residual, **options)
    assert_close("y", actual, y.double())
    assert_close("total", kept, total.double())
    mask, mask1 = torch.rand(2, 5, 8) > 0.5, torch.rand(2, 5, 8) > 0.5
    out, out1, total = reference(
        x.bfloat16(), weight, None, residual, residual + 1, bias, weight, 1e-5, 0.5, None, True, mask, mask1, True
    )
    expected = x.bfloat16().double() * mask * 2 + (residual.double() + 1) * mask1 * 2 + residual.double()
    assert out.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert_close("total", total, expected)
    assert_close("out", out, norm(expected, (8,), weight.double(), eps=1e-5))
    assert_close("out1", out1, norm(expected, (8,), bias.double(), eps=1e-5) + weight.double())
    with pytest.raises(ValueError, match="rowscale must be None with x1"):
        reference(x, weight, bias, x1=x, rowscale=scale)


def test_gated_reference_and_activation():
    x, z, weight = normal(2, 8), normal(2, 8, seed=1), normal(8, seed=2)
    assert_close("norm", rmsnorm_fn(x, weight, None, z), gated_ref(x, weight, None, z, upcast=False).double())
    xy = torch.cat([x, z], dim=-1).bfloat16()
    assert swiglu(xy).dtype == torch.bfloat16
    assert_close("swiglu", swiglu(xy), F.silu(xy[:, :8].double()) * xy[:, 8:].double())
    with pytest.raises(ValueError, match="xy must have an even last axis"):
        swiglu(normal(2, 3))
