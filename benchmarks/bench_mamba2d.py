"""The whole Mamba2D mixer, projections and local path included, against the same weights over plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ssmkit.nn import Mamba2D

from . import Bench, Rival, register
from .bench_grid_scan import reference as grid_reference
from .bench_grid_scan import terms, too_large, torch_diagonals
from .layers import layer_inputs, loaded

# The projections add up to 2 * d_model products in fp32, more than the few roundings that the tests' bounds are for.
SLACK = 4.0
KEPT = ("AT_log", "AL_log", "D")
STATES = 16
FEW = 32 * 32  # cells, up to which a call per cell is not waited for in vain


def mamba2d_inputs(
    batch: int, height: int, width: int, d_model: int, *, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Images, and the parameters of a fresh layer under their names in its state dict."""
    shape = (batch, height, width, d_model)
    return layer_inputs(lambda: Mamba2D(d_model, local_path=True), "x", shape, KEPT, dtype, device)


def torch_cells(
    x: Tensor, dt_top: Tensor, dt_left: Tensor, A_top: Tensor, A_left: Tensor, B_top: Tensor, B_left: Tensor,
    C: Tensor, D: Tensor, dt_bias_top: Tensor, dt_bias_left: Tensor, dt_softplus: bool,
) -> Tensor:  # fmt: skip
    """The equations in plain torch, one cell after another."""
    a_top, b_top = (t.unbind(1) for t in terms(x, dt_top, A_top, B_top, dt_bias_top, dt_softplus))
    a_left, b_left = (t.unbind(1) for t in terms(x, dt_left, A_left, B_left, dt_bias_left, dt_softplus))
    above: list[Tensor] = []
    rows = []
    for i in range(x.shape[1]):
        row: list[Tensor] = []
        for j in range(x.shape[2]):
            left = torch.addcmul(b_left[i][:, j], a_left[i][:, j], row[-1]) if j else b_left[i][:, j]
            top = torch.addcmul(b_top[i][:, j], a_top[i][:, j], above[j]) if i else left
            row.append(left if i == 0 else top if j == 0 else 0.5 * (left + top))
        rows.append((torch.stack(row, 1) * C[:, i, :, None]).sum(-1))
        above = row
    return torch.stack(rows, 1) + D * x


class Plain(Mamba2D):
    """The layer over a scan in plain torch."""

    plain: Callable[..., Tensor]

    def scan(self, x: Tensor) -> Tensor:
        """As `Mamba2D.scan`, from the top left corner."""
        return self.plain(**self.scan_inputs(x))


def plain(scan: Callable[..., Tensor], **options: Any) -> Rival:
    """The layer over `scan`."""

    def make(inputs: dict[str, Any]) -> Plain:
        layer = Plain(inputs["x"].shape[-1], local_path=True)
        layer.plain = scan
        return layer

    return loaded(make, "x", **options)


def reference(x: Tensor, **weights: Tensor) -> Tensor:
    """The layer in float64."""
    layer = Plain(x.shape[-1], local_path=True).double()
    layer.plain = grid_reference
    return functional_call(layer, weights, (x,))


def diagonals_decline(height: int, width: int, d_model: int, dtype: torch.dtype) -> str | None:
    return too_large(height, width, d_model, STATES, dtype)


def cells_decline(height: int, width: int) -> str | None:
    return f"it takes {height * width} cells one after another" if height * width > FEW else None


def products(batch: int, height: int, width: int, d_model: int, mode: str) -> float:
    """The projections: in, out, to steps and weights of both sides, from the rank of the steps; the local path's two."""
    rank = -(-d_model // 16)
    per_cell = d_model * (2 * d_model + 4 * rank + 3 * STATES + 4 * d_model)
    return batch * height * width * per_cell * (1 if mode == "fwd" else 3)


def fmas(batch: int, height: int, width: int, d_model: int, mode: str) -> float:
    """The local path's convolution, and the scan: 6 per state and cell, 26 with backward."""
    return batch * height * width * d_model * (18 + 6 * STATES if mode == "fwd" else 54 + 26 * STATES)


def exps(batch: int, height: int, width: int, d_model: int, mode: str) -> float:
    """Two per state and cell, and as many in backward."""
    return 2 * batch * height * width * d_model * STATES * (1 if mode == "fwd" else 2)


def bytes_moved(batch: int, height: int, width: int, d_model: int, dtype: torch.dtype, mode: str) -> float:
    """Weights, input and output once; with backward the weights again, and a gradient for each."""
    rank = -(-d_model // 16)
    weights = d_model * (6 * d_model + 4 * rank + 5 * STATES + 18)
    return dtype.itemsize * (weights + 2 * batch * height * width * d_model) * (1 if mode == "fwd" else 3)


def square(side: int, d_model: int) -> dict[str, int]:
    return {"batch": 1, "height": side, "width": side, "d_model": d_model}


register(
    Bench(
        name="mamba2d",
        op=loaded(lambda inputs: Mamba2D(inputs["x"].shape[-1], local_path=True), "x"),
        inputs=mamba2d_inputs,
        shapes={
            "Mamba2D-T, first stage": square(56, 64),
            "Mamba2D-T, second stage": square(28, 128),
            "Mamba2D-T, first stage of 896x896": square(224, 64),
        },
        bytes_moved=bytes_moved,
        exps=exps,
        fmas=fmas,
        products=products,
        slack=SLACK,
        parameters=tuple(name for name, _ in Mamba2D(1, local_path=True).named_parameters()),
        reference=reference,
        rivals={
            "torch, by diagonals": plain(torch_diagonals, declines=diagonals_decline),
            "torch, cell by cell": plain(torch_cells, declines=cells_decline),
        },
    )
)
