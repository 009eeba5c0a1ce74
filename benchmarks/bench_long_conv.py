"""long_conv against the direct sum, and against the published way: a flipped copy and a transform per direction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import long_conv
from ssmkit.ops.long_conv import STARTS
from ssmkit.testing import long_conv_inputs

from . import Bench, Rival, register

CORNERS = tuple(STARTS[2])
BOTH = tuple(STARTS[1])


def directions(x: Tensor, start: Any) -> list[list[int]]:
    """The axes that each direction flips."""
    known = STARTS[x.ndim - 2]
    names = start if isinstance(start, tuple) else (start or next(iter(known)),)
    return [[axis + 1 for axis, back in enumerate(known[name]) if back] for name in names]


def flipped_transforms(x: Tensor, kernel: Tensor, D: Tensor, start: Any) -> Tensor:
    """Flip the input, transform, multiply, transform back, flip back: once per direction, at twice the size."""
    kernels = kernel if isinstance(start, tuple) else kernel[None]
    axes = list(range(1, x.ndim - 1))
    lengths = [2 * x.shape[axis] for axis in axes]
    y = D * x
    for taps, flips in zip(kernels, directions(x, start), strict=True):
        spectrum = torch.fft.rfftn(x.flip(flips), s=lengths, dim=axes)
        weights = torch.fft.rfftn(taps, s=lengths, dim=[-n for n in reversed(axes)]).movedim(0, -1)
        out = torch.fft.irfftn(spectrum * weights, s=lengths, dim=axes)
        for axis in axes:
            out = out.narrow(axis, 0, x.shape[axis])
        y = y + out.flip(flips)
    return y


def direct(x: Tensor, kernel: Tensor, D: Tensor, start: Any) -> Tensor:
    """torch's own depthwise convolution, once per direction."""
    kernels = kernel if isinstance(start, tuple) else kernel[None]
    convolve = F.conv1d if x.ndim == 3 else F.conv2d
    y = D * x
    for taps, flips in zip(kernels, directions(x, start), strict=True):
        pads = [pad for length in reversed(taps.shape[1:]) for pad in (length - 1, 0)]
        before = F.pad(x.flip(flips).movedim(-1, 1), pads)
        weights = taps.flip(list(range(1, taps.ndim)))[:, None]
        y = y + convolve(before, weights, groups=x.shape[-1]).movedim(1, -1).flip(flips)
    return y


def reference(x: Tensor, kernel: Tensor, D: Tensor, start: Any) -> Tensor:
    """The published way in float64: the op's own takes a pass per tap."""
    return flipped_transforms(x, kernel, D, start)


def inputs(
    batch: int, dim: int, seqlen: int, side: int, *, start: Any, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """A sequence of `seqlen` tokens, or square images of this side."""
    cells = (seqlen,) if seqlen else (side, side)
    start = start if isinstance(start, str) else tuple(start)  # a list, where it was written down and read again
    return long_conv_inputs(batch, *cells, dim, start=start, dtype=dtype, device=device)


def cells_of(seqlen: int, side: int) -> int:
    return seqlen or side * side


def bytes_moved(batch: int, dim: int, dtype: torch.dtype, mode: str, start: Any, seqlen: int, side: int) -> int:
    """x and the kernels in, y out; with backward also dy in, dx and the kernels' gradients out, x and kernels again."""
    image = cells_of(seqlen, side) * dim
    kernels = 4 * image * (1 if isinstance(start, str) else len(start))
    return batch * image * dtype.itemsize * (2 if mode == "fwd" else 5) + kernels * (1 if mode == "fwd" else 3)


def too_many_taps(batch: int, dim: int, start: Any, seqlen: int, side: int) -> str | None:
    """The direct sum takes the square of the cells."""
    products = batch * dim * cells_of(seqlen, side) ** 2 * (1 if isinstance(start, str) else len(start))
    return f"{products:.1e} products" if products > 5e9 else None


register(
    Bench(
        op=long_conv,
        inputs=inputs,
        shapes={
            "2-D SSM in a ViT at 32 pixels, 32 images": {"batch": 32, "side": 8, "dim": 192, "start": CORNERS},
            "56x56 cells, 96 channels, 4 corners": {"batch": 1, "side": 56, "dim": 96, "start": CORNERS},
            "224x224 cells, 96 channels, 4 corners": {"batch": 1, "side": 224, "dim": 96, "start": CORNERS},
            "4096 tokens, causal": {"batch": 1, "seqlen": 4096, "dim": 256, "start": "first"},
            "4096 tokens, both ways": {"batch": 1, "seqlen": 4096, "dim": 256, "start": BOTH},
        },
        fixed={"seqlen": 0, "side": 0},
        bytes_moved=bytes_moved,
        parameters=("kernel", "D"),
        reference=reference,
        rivals={
            "torch, flips and transforms": flipped_transforms,
            "torch, direct": Rival(call=direct, declines=too_many_taps),
        },
    )
)
