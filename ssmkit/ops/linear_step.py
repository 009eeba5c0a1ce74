"""A linear layer on few rows: the projections and the head of a model that decodes token by token.

    y = x weight^T + bias

With one row, or a few, all that it costs is reading the weight; libraries of matrix products are made for many rows.
There is no gradient: training multiplies many rows at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_ndim, check_shape
from ssmkit.ops._define import define, requires_grad

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.linear_step_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.linear_step"),
    Backend("cpu", device="cpu", module="ssmkit.native.linear_step"),
)


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """`torch.nn.functional.linear` on few rows, at the speed at which memory gives the weight.

        y = x weight^T + bias

    Sums are kept in fp32 (fp64 for fp64), and a row's result does not depend on the rows beside it. Not differentiable.

    Args:
        x: Input                       (batch, in_features)             fp32, bf16, fp16 or fp64
        weight: As in nn.Linear        (out_features, in_features)      as x; rows may be a view of longer ones
        bias: Added to every row       (out_features,)                  as x
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y (batch, out_features) in the dtype of x.
    Raises:
        ValueError: a shape, dtype or device does not fit, or a gradient is asked for.
        BackendError: the backend asked for cannot take the call.
    """
    _check(x, weight, bias)
    chosen = choose("linear_step", BACKENDS, backend, x)
    if chosen == "reference":
        return linear_step_ref(x, weight, bias)
    return linear_step_op(x, weight, bias, chosen)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_ndim("x", x, "batch, in_features")
    check_dtype("x", x, FLOATS)
    check_ndim("weight", weight, "out_features, in_features")
    check_shape("weight", weight, (weight.shape[0], x.shape[1]), "out_features, in_features")
    check_dtype("weight", weight, (x.dtype,), "like x")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "out_features")
        check_dtype("bias", bias, (x.dtype,), "like x")
    check_device(x, weight=weight, bias=bias)
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None and requires_grad(tensor):
                raise ValueError(
                    f"linear_step has no gradient and {name} requires one: call it under torch.no_grad(), "
                    "or use torch.nn.functional.linear"
                )


def linear_step_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The equation in float64."""
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    return load(BACKENDS, backend).step(x, weight, None if bias is None else bias.contiguous())


linear_step_op = define(
    "linear_step(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _step,
    lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0])),
)
