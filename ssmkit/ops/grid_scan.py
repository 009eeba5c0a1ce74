"""Grid scan, the recurrence of Mamba2D: a cell of an image takes its state from the one above it and the one to its left.

    h_0j = a_left h_{0,j-1} + b_left                                  first row, and first cell: h_00 = b_left
    h_i0 = a_top h_{i-1,0} + b_top                                    first column
    h_ij = 1/2 (a_left h_{i,j-1} + b_left + a_top h_{i-1,j} + b_top)  elsewhere
    y_ij = C_ij . h_ij + D x_ij

with a = exp(dt A) and b = dt B x, all taken at cell (i, j), per side. Numbers follow the code of Baty et al. 2024,
"Mamba2D", arXiv:2412.16146, second version. The half keeps the number of paths between two cells from growing into the
state. With one row, or one column below the first cell, the grid is a chain.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_ndim, check_shape, check_sizes, parameter_dtypes
from ssmkit.ops._define import absent, acc_dtype, define, flat_rows, gradients, present
from ssmkit.ops._walk import step_sizes

TILE = 16  # cells a side, of the tiles along whose borders the states that backward starts from are kept
STARTS = ("top_left", "top_right", "bottom_left", "bottom_right")

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.grid_scan_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.grid_scan"),
    Backend("cpu", device="cpu", module="ssmkit.native.grid_scan"),
)


def grid_scan(
    x: Tensor,
    dt_top: Tensor,
    dt_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias_top: Tensor | None = None,
    dt_bias_left: Tensor | None = None,
    dt_softplus: bool = False,
    start: str = "top_left",
    backend: str = "auto",
) -> Tensor:
    """Selective scan over an image, along both of its axes at once.

        dt <- softplus(dt + dt_bias)                                      of either side, where asked
        h_0j = a_left h_{0,j-1} + b_left                                  first row, and first cell: h_00 = b_left
        h_i0 = a_top h_{i-1,0} + b_top                                    first column
        h_ij = 1/2 (a_left h_{i,j-1} + b_left + a_top h_{i-1,j} + b_top)  elsewhere
        y_ij = (C_ij . h_ij + D x_ij) * silu(z_ij)                        the gate where asked

    with a = exp(dt A) and b = dt B x at cell (i, j). Baty et al. 2024, "Mamba2D", arXiv:2412.16146, as its code computes
    it; there dt, A and B of the two sides are `deltaT`, `AT`, `BT` and `deltaL`, `AL`, `BL`, and there is no gate.

    Args:
        x: Input                                          (batch, height, width, dim)     fp32, bf16, fp16 or fp64
        dt_top, dt_left: Step sizes from above and from the left (logits with dt_softplus)
                                                          (batch, height, width, dim)     as x
        A_top, A_left: Decay rates, negative              (dim, dstate)                   fp32 (fp64 with x)
        B_top, B_left, C: Input and output weights        (batch, height, width, dstate)  as x
        D: Skip weights                                   (dim,)                          float
        z: Gate logits                                    (batch, height, width, dim)     as x
        dt_bias_top, dt_bias_left: Added before softplus  (dim,)                          float
        dt_softplus: Apply softplus to both dt (above 20 it is the identity).
        start: The corner where the scan starts: "top_left", "top_right", "bottom_left" or "bottom_right". The image
            is read as if it were flipped: from a corner at the bottom the "top" of a cell is the cell below it.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        y of the shape and dtype of x. The state is kept in fp32 (fp64 for fp64 inputs) throughout.
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    _check(x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left)
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    from_bottom, from_right = start.startswith("bottom"), start.endswith("right")
    acc = acc_dtype(x.dtype)
    A_top, A_left = A_top.to(acc), A_left.to(acc)
    D, dt_bias_top, dt_bias_left = (None if t is None else t.to(acc) for t in (D, dt_bias_top, dt_bias_left))
    tensors = (x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left)
    chosen = choose("grid_scan", BACKENDS, backend, x)
    if chosen == "reference":
        return grid_scan_ref(*tensors, dt_softplus, from_bottom, from_right)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return grid_scan_fwd(*tensors, dt_softplus, from_bottom, from_right, save, chosen)[0]


def _check(
    x: Tensor,
    dt_top: Tensor,
    dt_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias_top: Tensor | None,
    dt_bias_left: Tensor | None,
) -> None:
    check_ndim("x", x, "batch, height, width, dim")
    check_dtype("x", x, FLOATS)
    check_sizes(x)
    batch, height, width, dim = x.shape
    check_ndim("A_top", A_top, "dim, dstate")
    dstate = A_top.shape[1]
    for name, rates in (("A_top", A_top), ("A_left", A_left)):
        check_shape(name, rates, (dim, dstate), "dim, dstate")
        check_dtype(name, rates, *parameter_dtypes(x))
    for name, tensor in (("dt_top", dt_top), ("dt_left", dt_left), ("z", z)):
        if tensor is not None:
            check_shape(name, tensor, x.shape, "batch, height, width, dim")
            check_dtype(name, tensor, (x.dtype,), "like x")
    for name, weight in (("B_top", B_top), ("B_left", B_left), ("C", C)):
        check_shape(name, weight, (batch, height, width, dstate), "batch, height, width, dstate")
        check_dtype(name, weight, (x.dtype,), "like x")
    for name, vector in (("D", D), ("dt_bias_top", dt_bias_top), ("dt_bias_left", dt_bias_left)):
        if vector is not None:
            check_shape(name, vector, (dim,), "dim")
            check_dtype(name, vector, *parameter_dtypes(x))
    check_device(
        x, dt_top=dt_top, dt_left=dt_left, A_top=A_top, A_left=A_left, B_top=B_top, B_left=B_left, C=C,
        D=D, z=z, dt_bias_top=dt_bias_top, dt_bias_left=dt_bias_left,
    )  # fmt: skip


def grid_scan_ref(
    x: Tensor,
    dt_top: Tensor,
    dt_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias_top: Tensor | None,
    dt_bias_left: Tensor | None,
    dt_softplus: bool,
    from_bottom: bool,
    from_right: bool,
) -> Tensor:
    """The equations in float64, one cell at a time."""
    flipped = [axis for axis, flip in ((1, from_bottom), (2, from_right)) if flip]
    x_BHWD, C_BHWN = x.double().flip(flipped), C.double().flip(flipped)

    def terms(dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None) -> list[tuple[tuple[Tensor, Tensor], ...]]:
        """a and b of every cell, each (batch, dim, dstate)."""
        dt_BHWD = step_sizes(dt, dt_bias, dt_softplus).flip(flipped)
        a_BHWDN = torch.exp(dt_BHWD[..., None] * A.double())
        b_BHWDN = (dt_BHWD * x_BHWD)[..., None] * B.double().flip(flipped)[..., None, :]
        rows = zip(a_BHWDN.unbind(1), b_BHWDN.unbind(1), strict=True)
        return [tuple(zip(a.unbind(1), b.unbind(1), strict=True)) for a, b in rows]

    top, left = terms(dt_top, A_top, B_top, dt_bias_top), terms(dt_left, A_left, B_left, dt_bias_left)
    h: list[list[Tensor]] = []
    for i in range(x.shape[1]):
        h.append([])
        for j in range(x.shape[2]):
            (a_top, b_top), (a_left, b_left) = top[i][j], left[i][j]
            if i == 0:
                h_BDN = a_left * h[i][j - 1] + b_left if j else b_left
            elif j == 0:
                h_BDN = a_top * h[i - 1][j] + b_top
            else:
                h_BDN = 0.5 * (a_left * h[i][j - 1] + b_left + a_top * h[i - 1][j] + b_top)
            h[i].append(h_BDN)
    y = D.double() * x_BHWD if D is not None else torch.zeros_like(x_BHWD)
    if x.shape[1] * x.shape[2]:
        h_BHWDN = torch.stack([torch.stack(row, 1) for row in h], 1)
        y = y + (C_BHWN[..., None, :] * h_BHWDN).sum(-1)
    y = y.flip(flipped)
    if z is not None:
        y = y * F.silu(z.double())
    return y.to(x.dtype)


def _forward(
    x: Tensor, dt_top: Tensor, dt_left: Tensor, A_top: Tensor, A_left: Tensor, B_top: Tensor, B_left: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias_top: Tensor | None, dt_bias_left: Tensor | None,
    dt_softplus: bool, from_bottom: bool, from_right: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = _for_kernels(
        x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left
    )  # fmt: skip
    batch, height, width, _ = x.shape
    slots = _slots(batch, height, width) if save else 0
    y, checkpoints = load(BACKENDS, backend).forward(
        inputs, (height, width), dt_softplus, from_bottom, from_right, slots
    )
    return y.view(x.shape), checkpoints


def _for_kernels(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The layout that kernels rely on: per-token tensors as (batch, height * width, ...) in flat rows, the rest dense."""
    return tuple(None if t is None else flat_rows(t.flatten(1, 2)) if t.ndim == 4 else t.contiguous() for t in tensors)


def _slots(batch: int, height: int, width: int) -> int:
    """States kept for backward: those along the lower and the right borders of tiles, but for the image's own."""
    if height == 0 or width == 0:
        return 0
    return batch * ((height - 1) // TILE * width + (width - 1) // TILE * height)


def _forward_fake(
    x: Tensor, dt_top: Tensor, dt_left: Tensor, A_top: Tensor, A_left: Tensor, B_top: Tensor, B_left: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias_top: Tensor | None, dt_bias_left: Tensor | None,
    dt_softplus: bool, from_bottom: bool, from_right: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, height, width, dim = x.shape
    slots = _slots(batch, height, width) if save else 0
    return x.new_empty(x.shape), A_top.new_empty(slots, A_top.shape[1], dim)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dt_softplus, from_bottom, from_right, save, backend = inputs
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        output = grid_scan_fwd(*tensors, dt_softplus, from_bottom, from_right, True, backend)
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (dt_softplus, from_bottom, from_right, backend)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = grid_scan_bwd(dy, *tensors, checkpoints, *ctx.options)
    return (*gradients(grads, tensors), *[None] * 5)


def _backward(
    dy: Tensor, x: Tensor, dt_top: Tensor, dt_left: Tensor, A_top: Tensor, A_left: Tensor, B_top: Tensor,
    B_left: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias_top: Tensor | None,
    dt_bias_left: Tensor | None, checkpoints: Tensor, dt_softplus: bool, from_bottom: bool, from_right: bool,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left)
    outputs = load(BACKENDS, backend).backward(
        flat_rows(dy.flatten(1, 2)), _for_kernels(*inputs), checkpoints, tuple(x.shape[1:3]),
        dt_softplus, from_bottom, from_right,
    )  # fmt: skip
    shaped = [None if t is None or g is None else g.view(t.shape) for g, t in zip(outputs, inputs, strict=True)]
    return present(shaped, x)


def _backward_fake(
    dy: Tensor, x: Tensor, dt_top: Tensor, dt_left: Tensor, A_top: Tensor, A_left: Tensor, B_top: Tensor,
    B_left: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias_top: Tensor | None,
    dt_bias_left: Tensor | None, checkpoints: Tensor, dt_softplus: bool, from_bottom: bool, from_right: bool,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (x, dt_top, dt_left, A_top, A_left, B_top, B_left, C, D, z, dt_bias_top, dt_bias_left)
    return tuple(absent(x) if t is None else t.new_empty(t.shape) for t in inputs)


_INPUTS = (
    "Tensor x, Tensor dt_top, Tensor dt_left, Tensor A_top, Tensor A_left, Tensor B_top, Tensor B_left, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias_top, Tensor? dt_bias_left"
)
_OPTIONS = "bool dt_softplus, bool from_bottom, bool from_right"
grid_scan_bwd = define(
    f"grid_scan_bwd(Tensor dy, {_INPUTS}, Tensor checkpoints, {_OPTIONS}, str backend)"
    f" -> ({', '.join(['Tensor'] * 12)})",
    _backward,
    _backward_fake,
)
grid_scan_fwd = define(
    f"grid_scan_fwd({_INPUTS}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
