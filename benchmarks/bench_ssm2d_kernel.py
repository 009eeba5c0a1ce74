"""ssm2d_kernel against its recurrence in plain torch, row by row, and against tables of powers as published."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ssmkit.ops import ssm2d_kernel
from ssmkit.testing import ssm2d_kernel_inputs

from . import Bench, Prepared, Rival, register

# Cells of a kernel up to which tables of powers are made.
FEW = 12 * 12


def read_out(h: Tensor, v: Tensor, C: Tensor) -> Tensor:
    """K of states (height, width, ngroups, dstate)."""
    ngroups, dstate = h.shape[2:]
    weights = C.unflatten(1, (-1, ngroups)) / dstate**0.5
    K = torch.einsum("mgn,ijgn->mgij", weights[0], h) + torch.einsum("mgn,ijgn->mgij", weights[1], v)
    return (K.real if K.is_complex() else K).flatten(0, 1)


def torch_rows(A: Tensor, B: Tensor, C: Tensor, height: int, width: int) -> Tensor:
    """The recurrence, one cell of the row's own direction after another, whole rows in the other."""
    zero = torch.zeros_like(B[0])
    rows_h: list[Tensor] = []
    rows_v: list[Tensor] = []
    for i in range(height):
        halves = [1.0 if i == 0 or j == 0 else 0.5 for j in range(width)]
        if i == 0:
            v = torch.stack([B[1], *[zero] * (width - 1)])
        else:
            factor = B.new_tensor(halves)[:, None, None]
            v = factor * (A[2] * rows_h[-1] + A[3] * rows_v[-1])
        from_v = A[1] * v
        cells: list[Tensor] = []
        for j in range(width):
            first = zero if i else B[0]
            cells.append(halves[j] * (torch.addcmul(from_v[j - 1], A[0], cells[-1])) if j else first)
        rows_h.append(torch.stack(cells))
        rows_v.append(v)
    return read_out(torch.stack(rows_h), torch.stack(rows_v), C)


Monomials = Counter[tuple[int, ...]]  # powers of A_1 to A_4, and 0 or 1 for B -> coefficient


def times(cell: Monomials, matrix: int, factor: float) -> Monomials:
    grown: Monomials = Counter()
    for powers, coefficient in cell.items():
        grown[tuple(n + (k == matrix) for k, n in enumerate(powers))] = factor * coefficient  # type: ignore[assignment]
    return grown


def polynomials(height: int, width: int) -> list[tuple[Monomials, Monomials]]:
    """h and v of every cell as polynomials of A, linear in B."""
    cells: dict[tuple[int, int], tuple[Monomials, Monomials]] = {}
    nothing: tuple[Monomials, Monomials] = (Counter(), Counter())
    for i in range(height):
        for j in range(width):
            factor = 0.5 if i and j else 1.0
            left, above = cells.get((i, j - 1), nothing), cells.get((i - 1, j), nothing)
            h, v = times(left[0], 0, factor), times(above[0], 2, factor)
            h.update(times(left[1], 1, factor))
            v.update(times(above[1], 3, factor))
            if i == j == 0:
                h[0, 0, 0, 0, 0], v[0, 0, 0, 0, 1] = 1, 1
            cells[i, j] = h, v
    return list(cells.values())


def tables(inputs: dict[str, Any]) -> Prepared:
    """Powers, their products, and sums over the monomials of every cell; the tables made beforehand."""
    A, B, C, height, width = inputs.values()
    cells = [polynomial for cell in polynomials(height, width) for polynomial in cell]
    most = max(len(cell) for cell in cells)
    powers, coefficients = torch.zeros(4, len(cells), most), torch.zeros(2, len(cells), most)
    for row, cell in enumerate(cells):
        for column, (monomial, coefficient) in enumerate(cell.items()):
            powers[:, row, column] = torch.tensor(monomial[:4], dtype=torch.float32)
            coefficients[monomial[4], row, column] = coefficient
    powers = powers[..., None, None]
    coefficients = coefficients.to(A.dtype)

    def call() -> Tensor:
        monomials = (A[:, None, None] ** powers).prod(0)
        of_B = torch.einsum("bcr,bgn->crgn", coefficients, B)
        states = (monomials * of_B).sum(1).unflatten(0, (height, width, 2))
        h, v = states.unbind(2)
        return read_out(h, v, C)

    held = (powers.numel() + coefficients.numel()) * 4
    return Prepared(call, held=held, note="tables made beforehand")


def too_large(height: int, width: int) -> str | None:
    return f"tables of {height * width} cells" if height * width > FEW else None


def fmas(height: int, width: int, ngroups: int, channels: int, dstate: int, mode: str) -> int:
    """Four per state and cell, with backward eight more; two products with the states' weights, with backward four more."""
    states, reads = 4 * ngroups * dstate, 2 * channels * dstate
    return height * width * (states + reads) * (1 if mode == "fwd" else 3)


def bytes_moved(height: int, width: int, ngroups: int, channels: int, dstate: int, mode: str) -> int:
    """K out; with backward dK in, and the states of all groups out and in."""
    kernel, states = 4 * channels, 8 * ngroups * dstate
    return height * width * (kernel if mode == "fwd" else 2 * kernel + 2 * states)


def layer(side: int, n_ssm: int, embed_dim: int) -> dict[str, int]:
    """Four directions."""
    return {"height": side, "width": side, "ngroups": 4 * n_ssm, "channels": 4 * embed_dim, "dstate": 16}


register(
    Bench(
        op=ssm2d_kernel,
        inputs=ssm2d_kernel_inputs,
        shapes={
            "ViT at 32 pixels": layer(8, 1, 192),
            "ViT at 32 pixels, 8 models": layer(8, 8, 192),
            "ConvNeXt, first stage": layer(56, 2, 96),
            "56x56, 8 models": layer(56, 8, 192),
        },
        fixed={"requires_grad": False},
        fmas=fmas,
        bytes_moved=bytes_moved,
        parameters=("A", "B", "C"),
        rivals={
            "torch, row by row": torch_rows,
            "torch, tables of powers": Rival(prepare=tables, declines=too_large),
        },
    )
)
