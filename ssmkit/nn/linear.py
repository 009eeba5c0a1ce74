"""Linear layers on few rows, as in the `step` of every layer: by `linear_step` where that is faster, else by torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from ssmkit.backends import unusable
from ssmkit.ops import linear_step
from ssmkit.ops._define import in_forward_mode, requires_grad

# With more rows, torch's matrix product is as fast: measured on an AMD EPYC (family 25, model 17) with the weights of
# Mamba-130M. In half precision it has instructions of its own.
MOST_ROWS, MOST_ROWS_OF_HALVES = 8, 4
# About what calling the op costs beyond torch, in elements of weight: an estimate.
LEAST_WEIGHT = 1 << 16
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`, by `linear_step` where it is a plain nn.Linear and `few_rows` allows.

    A subclass, a wrapper, parametrizations, hooks and a `forward` of the instance's own are called as they are.
    """
    if type(linear) is not nn.Linear or hooked(linear):
        out: Tensor = linear(x)
        return out
    return product(x, linear.weight, linear.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, x (..., in_features); by `linear_step` where `few_rows` allows."""
    if not few_rows(x, weight, bias):
        return F.linear(x, weight, bias)
    y = linear_step(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def hooked(linear: nn.Linear) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = any(getattr(linear, name) or getattr(of_all_modules, f"_global{name}") for name in HOOKS)
    return hooks or "forward" in linear.__dict__


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_step` takes the product and is faster: few rows on the CPU, plain tensors, no derivative wanted."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.device.type == "cpu"
        and weight.numel() >= LEAST_WEIGHT
        and 0 < x.numel() <= (MOST_ROWS if x.itemsize > 2 else MOST_ROWS_OF_HALVES) * x.shape[-1]
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device for t in given)
        and x.is_floating_point()
        # An exported program may be called with any number of rows.
        and not torch.compiler.is_exporting()
        and not in_forward_mode()
        and not (torch.is_grad_enabled() and any(requires_grad(t) for t in given))
        and not torch.is_autocast_enabled("cpu")
        and unusable("cpu", "ssmkit.native.linear_step") is None
    )
