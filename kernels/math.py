"""Scalar functions that the kernels share. They keep the dtype they are given: float32, or float64 for float64 input.

exp(x) is written exp2(x * LOG2E) with the factor folded into whatever x is already multiplied by: the GPU has an
instruction for exp2 alone.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# softplus(x) = x above this, as everywhere in the field
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate for small x: the rounding of 1 + x is divided out again."""
    one_plus_x = 1.0 + x
    lost = one_plus_x == 1.0
    return tl.where(lost, x, tl.log(one_plus_x) * (x / tl.where(lost, 1.0, one_plus_x - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself above the threshold."""
    return tl.where(x <= SOFTPLUS_THRESHOLD, log1p(tl.exp(tl.minimum(x, SOFTPLUS_THRESHOLD))), x)


@triton.jit
def clamped(x, low, high):
    """x within low..high; a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the exponential is taken of -|x|, so that it cannot overflow."""
    decayed = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, decayed) / (1.0 + decayed)


@triton.jit
def softplus_grad(x):
    """Derivative of `softplus`: the sigmoid, and 1 above the threshold."""
    return tl.where(x <= SOFTPLUS_THRESHOLD, sigmoid(x), 1.0)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_grad(x):
    """Derivative of `silu`: sigmoid(x) * (1 + x * (1 - sigmoid(x)))."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def rounded(x, ptr):
    """x in the dtype that `ptr` points to, rounded to the nearest. The interpreter would truncate to bfloat16."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(ptr.dtype.element_ty)
