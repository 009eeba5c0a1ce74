"""grid_scan: bound by arithmetic on a CPU, two exponentials and six multiply-adds per state and cell."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmkit.ops import grid_scan, selective_scan
from ssmkit.testing import grid_scan_inputs

from . import Bench, Prepared, Rival, compiled_anew, register

SMALL = 64 * 64  # cells, up to which the op's reference serves
CHANNELS = 16  # at a time beyond that


def terms(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """Decay and input of every state, (batch, height, width, dim, dstate)."""
    dt = dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    return torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[..., None, :]


def torch_diagonals(
    x: Tensor, dt_top: Tensor, dt_left: Tensor, A_top: Tensor, A_left: Tensor, B_top: Tensor, B_left: Tensor,
    C: Tensor, D: Tensor, dt_bias_top: Tensor, dt_bias_left: Tensor, dt_softplus: bool,
) -> Tensor:  # fmt: skip
    """The equations in plain torch, all cells of one diagonal at once, as the official wavefront kernel takes them."""
    batch, height, width, _ = x.shape
    top = terms(x, dt_top, A_top, B_top, dt_bias_top, dt_softplus)
    left = terms(x, dt_left, A_left, B_left, dt_bias_left, dt_softplus)
    # Cells by diagonal and row: diagonal k has its cell of row i in column k - i.
    i = torch.arange(height, device=x.device)
    j = torch.arange(height + width - 1, device=x.device)[:, None] - i
    inside, j = (j >= 0) & (j < width), j.clamp(0, width - 1)
    a_top, b_top, a_left, b_left = (t[:, i, j].unbind(1) for t in (*top, *left))
    first_row, first_col = (i == 0)[:, None, None], (j == 0)[..., None, None]
    h, diagonals = x.new_zeros(batch, height, *A_top.shape), []
    for k in range(height + width - 1):
        from_top = a_top[k] * F.pad(h, (0, 0, 0, 0, 1, 0))[:, :-1] + b_top[k]
        from_left = a_left[k] * h + b_left[k]
        h = torch.where(first_row, from_left, torch.where(first_col[k], from_top, 0.5 * (from_top + from_left)))
        h = torch.where(inside[k][:, None, None], h, 0.0)
        diagonals.append(h)
    # Back: cell (i, j) lies on diagonal i + j.
    columns = i[:, None] + torch.arange(width, device=x.device)
    states = torch.stack(diagonals, 1)[:, columns, i[:, None]]
    return (states * C[..., None, :]).sum(-1) + D * x


def reference(**inputs: Any) -> Tensor:
    """The float64 truth: the op's own reference, or, where that would take minutes, the form by diagonals, which is held
    to it at the smaller shapes, for a few channels at a time so that gradients fit in memory."""
    _, height, width, dim = inputs["x"].shape
    if height * width <= SMALL:
        return grid_scan(**inputs, backend="reference")

    def part(d: slice) -> Tensor:
        wide = {k: v for k, v in inputs.items() if not isinstance(v, Tensor) or k in ("B_top", "B_left", "C")}
        cut = {k: v[d] if k.startswith("A_") else v[..., d] for k, v in inputs.items() if k not in wide}
        return torch_diagonals(**wide, **cut)

    parts = [slice(first, first + CHANNELS) for first in range(0, dim, CHANNELS)]
    return torch.cat([checkpoint(part, d, use_reentrant=False) for d in parts], dim=-1)


def compiled(inputs: dict[str, Any]) -> Prepared:
    """The plain form through torch.compile."""
    call = compiled_anew(torch_diagonals)
    return Prepared(lambda: call(**inputs))


def too_large(height: int, width: int, dim: int, dstate: int, dtype: torch.dtype) -> str | None:
    """By diagonals, about ten tensors of (diagonals, height, dim, dstate) stand in memory at once, with gradients more."""
    size = (height + width - 1) * height * dim * dstate * dtype.itemsize
    return f"its tensors of {size / 2**30:.1f} GiB, of which it keeps ten or more" if size > 2**29 else None


def chain(inputs: dict[str, Any]) -> Prepared:
    """One chain scan over the same cells, row after row, with what comes from the left: the measure of a grid."""
    left = {"dt": "dt_left", "A": "A_left", "B": "B_left", "dt_bias": "dt_bias_left"}
    given = {name: inputs[left.get(name, name)] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus")}

    def call() -> Tensor:
        flat: dict[str, Any] = {
            k: v.flatten(1, 2) if isinstance(v, Tensor) and v.ndim == 4 else v for k, v in given.items()
        }
        y = selective_scan(**flat)
        assert isinstance(y, Tensor)
        return y.view(inputs["x"].shape)

    # It has one side alone: where the other's gradients are asked for, it gives its own.
    leaves = inputs | {name.replace("left", "top"): inputs[name] for name in left.values()}
    return Prepared(call, leaves=leaves)


def exponentials(batch: int, height: int, width: int, dim: int, dstate: int, mode: str) -> float:
    """Two to a state: once forward; in backward once more, as decays are not kept."""
    return 2 * batch * height * width * dim * dstate * (1 if mode == "fwd" else 2)


def multiply_adds(batch: int, height: int, width: int, dim: int, dstate: int, mode: str) -> float:
    """Per state and cell forward h (2 decays, 2 inputs), its weight, and y; backward h again (5) and the gradients of h
    (C dy, two decays, weight), C, and for each side B, x through b, a, dt and A."""
    return batch * height * width * dim * dstate * (6 if mode == "fwd" else 6 + 5 + 5 + 10)


def bytes_moved(batch: int, height: int, width: int, dim: int, dstate: int, dtype: torch.dtype, mode: str) -> float:
    """Forward x, both dt in and y out, three weights; backward x, both dt and dy in, dx and both ddt out, the weights and
    their gradients."""
    wide, narrow = (4, 3) if mode == "fwd" else (4 + 7, 3 + 6)
    return batch * height * width * (wide * dim + narrow * dstate) * dtype.itemsize


register(
    Bench(
        op=grid_scan,
        inputs=grid_scan_inputs,
        shapes={
            f"{size}x{size}, {dim} channels, {'1 state' if dstate == 1 else f'{dstate} states'}": {
                "batch": 1, "height": size, "width": size, "dim": dim, "dstate": dstate,
            }
            for size in (56, 224)
            for dim in (96, 192)
            for dstate in (1, 16)
        },
        fixed={"optional": ("D", "dt_bias_top", "dt_bias_left"), "requires_grad": False},
        parameters=("A_top", "A_left", "D", "dt_bias_top", "dt_bias_left"),
        bytes_moved=bytes_moved,
        exps=exponentials,
        fmas=multiply_adds,
        reference=reference,
        rivals={
            "torch, by diagonals": Rival(call=torch_diagonals, declines=too_large),
            "torch.compile, by diagonals": Rival(prepare=compiled, declines=too_large),
            "selective_scan over the rows": Rival(prepare=chain, contrast=True, note="a chain: one of the two terms"),
        },
    )
)  # fmt: skip
