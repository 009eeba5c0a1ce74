"""The scalar functions and the sums that Triton kernels share, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the package triton is not installed")

import triton
import triton.language as tl
from ssmkit.kernels.launch import sum_parts
from ssmkit.kernels.math import log1p, rounded, sigmoid, silu, silu_grad, softplus, softplus_grad

from ssmkit.backends import interpreting
from ssmkit.testing import device_of

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="neither a GPU nor TRITON_INTERPRET=1"
)


@triton.jit
def apply_kernel(x_ptr, y_ptr, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    if FUNCTION == "log1p":
        y = log1p(tl.abs(x))
    elif FUNCTION == "softplus":
        y = softplus(x)
    elif FUNCTION == "softplus_grad":
        y = softplus_grad(x)
    elif FUNCTION == "sigmoid":
        y = sigmoid(x)
    elif FUNCTION == "silu":
        y = silu(x)
    elif FUNCTION == "silu_grad":
        y = silu_grad(x)
    else:
        y = rounded(x, y_ptr)
    tl.store(y_ptr + i, y, mask=i < size)


def apply(function, x, dtype=None):
    y = torch.empty_like(x, dtype=dtype or x.dtype)
    apply_kernel[(1,)](x, y, len(x), FUNCTION=function, BLOCK=triton.next_power_of_2(len(x)))
    return y


def derivative(function):
    def of(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return of


FUNCTIONS = {
    "log1p": lambda x: torch.log1p(x.abs()),
    "softplus": F.softplus,
    "softplus_grad": derivative(F.softplus),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "silu_grad": derivative(F.silu),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_relative_error_is_a_few_eps(function, dtype):
    # The exponential of less would be denormal, which the GPU may flush to zero.
    x = torch.cat([torch.linspace(-80, 80, 801), torch.tensor([20.0, 20.001, 0.0, -1e-4, 1e-6, -16.7])]).to(dtype)
    actual, expected = apply(function, x.to(device_of("triton"))).cpu().double(), FUNCTIONS[function](x.double())
    # exp(x) in float32 inherits the rounding of x * log2(e), which grows with |x|; silu' crosses zero near -1.28.
    allowed = (
        torch.finfo(dtype).eps * (4 + x.double().abs()) * expected.abs().clamp_min(0.05 * (function == "silu_grad"))
    )
    assert ((actual - expected).abs() <= allowed).all()


def test_rounding_to_bfloat16_is_to_the_nearest_even():
    bits = torch.arange(0x3F7F0000, 0x3F820000, 0x1000, dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), torch.tensor([float("inf"), 0.0, 1.9999])])
    actual = apply("rounded", x.to(device_of("triton")), torch.bfloat16).cpu()
    assert torch.equal(actual, x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 7, 3), (5, 7, 3), (0, 4), (3, 0)], ids=str)
def test_sum_parts(shape, dtype):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(shape[1:])
    for part in parts:
        expected = expected + part
    assert torch.equal(sum_parts(parts.to(device_of("triton")), dtype).cpu(), expected.to(dtype))
