"""Registration of ops: one declaration, the same for every op.

`torch.library.Library.define/.impl` adds 4 us to a call, `torch.library.custom_op` 19 us (measured with torch 2.13 on
an AMD EPYC core), and ops that run once per token feel that. The schema is stated once; the implementation picks the
backend by name.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import _C, Tensor
from torch._C import _functorch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from ssmkit.backends import BackendError

# dtype.to_complex and .to_real, which torch.compile cannot trace
COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}
REAL_OF = {wide: real for real, wide in COMPLEX_OF.items()}

LIBRARY = torch.library.Library("ssmkit", "FRAGMENT")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `ssmkit::<schema>` for every device and return the callable op.

    Args:
        schema: For example "rms_norm_fwd(Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor)".
        implementation: Runs the op on real tensors.
        fake: Returns outputs of the right shape, dtype and device from fake tensors.
        backward, setup_context: As for `torch.library.register_autograd`; without them the op has no gradient.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _without_tangents(name, implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssmkit::{name}", _without_tangents(name, fake), lib=LIBRARY)
    if backward is not None:
        once = _only_once(name.removesuffix("_fwd"), backward)
        op = getattr(torch.ops.ssmkit, name).default
        kernel = make_autograd_impl(op, Info(once, setup_context))
        # As torch.library.register_autograd, but for the refusal.
        LIBRARY.impl(name, _without_torch_func(name.removesuffix("_fwd"), kernel), "Autograd", with_keyset=True)
    return getattr(torch.ops.ssmkit, name).default


def _without_tangents(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, refused in forward mode: tangents do not reach it, so that those of its outputs would be zero."""

    @wraps(function)
    def refusing(*args: Any) -> Any:
        if in_forward_mode():
            raise BackendError(
                f"{name.removesuffix('_fwd')}: no kernel carries forward-mode derivatives (torch.func.jvp, jacfwd, "
                "torch.autograd.forward_ad); ask for backend='reference', or differentiate backwards"
            )
        return function(*args)

    return refusing


def _without_torch_func(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of `op`, refused at a level of torch.func that asks for a gradient."""

    within_torch_func = _C._are_functorch_transforms_active

    def refusing(*keyset_and_args: Any) -> Any:
        if within_torch_func() and torch.is_grad_enabled() and _C._any_requires_grad(*keyset_and_args[1:]):
            raise BackendError(
                f"{op}: kernels give no gradients to torch.func (grad, vjp, jacrev, hessian); ask for "
                "backend='reference', or differentiate with torch.autograd"
            )
        return kernel(*keyset_and_args)

    return refusing


def _only_once(op: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward`, whose gradients refuse to be differentiated: their own gradients would be lost."""

    @wraps(backward)
    def refusing(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        read = _Read(ctx)
        with torch.no_grad():
            outputs = backward(read, *grads)
        found = [output for output in outputs if output is not None]
        sources = [t for t in (*read.saved_tensors, *grads) if t is not None and t.requires_grad]
        guarded = iter(_Once.apply(op, len(found), *found, *sources))
        return tuple(None if output is None else next(guarded) for output in outputs)

    return refusing


class _Read:
    """`ctx` with its saved tensors, which it gives out once: checkpoints refuse a second time, other hooks run again."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """Its first tensors, which depend on all of them in a way that has no derivative here."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise BackendError(
            f"{ctx.op}: kernels give first derivatives only and a gradient of their gradient was asked for; "
            "ask for backend='reference', or for no create_graph"
        )


def in_forward_mode() -> bool:
    """Whether the call stands within torch.func.jvp or a torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def requires_grad(x: Tensor) -> bool:
    """Whether `x` requires a gradient, be it at a level of torch.func that vmap hides."""
    if torch.compiler.is_compiling():
        # Tracing shows no more than that there is such a level.
        return x.requires_grad or _functorch.get_dynamic_layer_stack_depth() > 0
    while not x.requires_grad and _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.requires_grad


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of `dtype`: float32, or float64 for float64; complex likewise."""
    if dtype in (torch.float64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def flat_rows(x: Tensor) -> Tensor:
    """`x` itself where token (b, l) lies at (b * seqlen + l) * stride(1) with the rest of its row dense, else a copy.

    Views of a wider projection pass untouched; kernels take one row stride for such a tensor.
    """
    return x if _flat(x) and _dense_from(x, 2) else x.contiguous()


def path_rows(x: Tensor) -> Tensor:
    """Like `flat_rows` for (batch, seqlen, npaths, ...), where each path's part of a row is dense and they may lie apart."""
    return x if _flat(x) and _dense_from(x, 3) else x.contiguous()


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself where everything but its first axis is dense, else a copy."""
    return x if x.is_contiguous() or _dense_from(x, 1) else x.contiguous()


def _flat(x: Tensor) -> bool:
    return x.shape[0] <= 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _dense_from(x: Tensor, axis: int) -> bool:
    dense = 1
    for size, stride in zip(reversed(x.shape[axis:]), reversed(x.stride()[axis:]), strict=True):
        if size != 1 and stride != dense:
            return False
        dense *= size
    return True


def absent(like: Tensor) -> Tensor:
    """Stands for a missing output: a schema cannot return an optional tensor."""
    return like.new_empty(0)


def present(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a backward kernel with `absent` in place of None."""
    return tuple(absent(like) if output is None else output for output in outputs)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Undo `present`: the gradient of each input, None where the input is None."""
    return tuple(None if given is None else output for output, given in zip(outputs, inputs, strict=True))
