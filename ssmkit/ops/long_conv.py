"""Long convolution: each channel of a sequence or an image with a kernel as long as the input itself, by FFT.

    y_i = D x_i + sum over directions e, taps m of  k_{e,m} x_{i - e m}                    (1)

e is +1 or -1 on each axis: the kernel runs from the start that the direction names to the far end. Linear time-invariant
state-space layers apply their impulse responses so: S4 (Gu et al. 2021, arXiv:2111.00396) along a sequence, 2-D SSM
(Baron et al. 2023, arXiv:2306.06635) over an image.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.backends import Backend, choose
from ssmkit.ops._check import FLOATS, check_device, check_dtype, check_shape, check_sizes, parameter_dtypes
from ssmkit.ops._define import acc_dtype

# PyTorch's own transforms, which serve every device.
BACKENDS = (
    Backend("fft", device="cuda", module="torch.fft"),
    Backend("fft", device="cpu", module="torch.fft"),
)

# For each direction, which axes run backwards. The first is the default.
STARTS: dict[int, dict[str, tuple[bool, ...]]] = {
    1: {"first": (False,), "last": (True,)},
    2: {
        "top_left": (False, False),
        "bottom_left": (True, False),
        "top_right": (False, True),
        "bottom_right": (True, True),
    },
}


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    D: Tensor | None = None,
    start: str | Sequence[str] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution over the token axis or over both axes of an image, with nothing wrapped around.

        y_i = D x_i + sum over directions e, taps m of  k_{e,m} x_{i - e m}                    (1)

    The taps of all directions, and D at the tap of the token itself, make one kernel before the transform: however many
    directions there are, one transform of x and one back. Taps that reach past the input are left out.

    Args:
        x: Input                       (batch, seqlen, dim) or (batch, height, width, dim)    fp32, bf16, fp16, fp64
        kernel: Taps, from the token itself on      (dim, length) or (dim, rows, cols), with a tuple of directions
            (ndirections, dim, ...)                 fp32, bf16, fp16 (fp64 with x)
        D: Weight of the input in the output        (dim,)    like kernel
        start: Where the direction starts: "first" (causal, the default) or "last" token; "top_left" (the default),
            "bottom_left", "top_right" or "bottom_right" corner. A tuple of them adds up several directions, each with
            its kernel.
        backend: "auto", "reference", or "fft".
    Returns:
        y of the shape and dtype of x, summed in fp32 (fp64 for fp64).
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
    """
    flips = check(x, kernel, D, start)
    kernels = kernel if start is not None and not isinstance(start, str) else kernel[None]
    if choose("long_conv", BACKENDS, backend, x) == "reference":
        return long_conv_ref(x, kernels, D, flips)
    return by_fft(x, kernels, D, flips)


def check(
    x: Tensor, kernel: Tensor, D: Tensor | None, start: str | Sequence[str] | None
) -> tuple[tuple[bool, ...], ...]:
    """Refuse what does not fit. Returns for each direction which axes run backwards."""
    if x.ndim not in (3, 4):
        raise ValueError(f"x must have shape (batch, seqlen, dim) or (batch, height, width, dim), got {tuple(x.shape)}")
    check_dtype("x", x, FLOATS)
    check_sizes(x)
    axes, dim = x.ndim - 2, x.shape[-1]
    known = STARTS[axes]
    several = start is not None and not isinstance(start, str)
    names = (next(iter(known)),) if start is None else (start,) if isinstance(start, str) else tuple(start)
    for name in names:
        if name not in known:
            raise ValueError(f"start must be of {', '.join(known)} for x of {x.ndim} axes, got {name!r}")
    if not names:
        raise ValueError("start must name at least one direction, got none")
    legend = f"{'ndirections, ' * several}dim, {'length' if axes == 1 else 'rows, cols'}"
    if kernel.ndim != axes + 1 + several:
        raise ValueError(f"kernel must have shape ({legend}), got {tuple(kernel.shape)}")
    check_shape("kernel", kernel, ((len(names),) if several else ()) + (dim, *kernel.shape[-axes:]), legend)
    if 0 in kernel.shape[-axes:]:
        raise ValueError(f"kernel must have at least one tap on each axis, got {tuple(kernel.shape)}")
    check_dtype("kernel", kernel, *parameter_dtypes(x))
    if D is not None:
        check_shape("D", D, (dim,), "dim")
        check_dtype("D", D, *parameter_dtypes(x))
    check_device(x, kernel=kernel, D=D)
    return tuple(known[name] for name in names)


def long_conv_ref(x: Tensor, kernels: Tensor, D: Tensor | None, flips: Sequence[Sequence[bool]]) -> Tensor:
    """Equation (1), one tap at a time, in float64."""
    x_ = x.double()
    size = x.shape[1:-1]
    y = x_ * 0.0 if D is None else x_ * D.double()
    for kernel, backwards in zip(kernels.double(), flips, strict=True):
        for tap in product(*(range(min(taps, cells)) for taps, cells in zip(kernel.shape[1:], size, strict=True))):
            # x moved by `tap` cells away from the start, zeros coming in
            moved = x_
            pads: list[int] = []
            for axis, (m, back) in enumerate(zip(tap, backwards, strict=True), start=1):
                moved = moved.narrow(axis, m if back else 0, size[axis - 1] - m)
                pads = [0, m, *pads] if back else [m, 0, *pads]
            of_tap = (slice(None), *tap)
            y = y + kernel[of_tap] * F.pad(moved, (0, 0, *pads))
    return y.to(x.dtype)


def by_fft(x: Tensor, kernels: Tensor, D: Tensor | None, flips: Sequence[Sequence[bool]]) -> Tensor:
    """Equation (1) by transforms of a size that the kernel, both ways, cannot wrap around."""
    acc = acc_dtype(x.dtype)
    size = x.shape[1:-1]
    # of each axis, the farthest tap either way
    reach = [max(0, min(taps, cells) - 1) for taps, cells in zip(kernels.shape[2:], size, strict=True)]
    before = [far if any(back) else 0 for far, back in zip(reach, zip(*flips, strict=True), strict=True)]
    after = [0 if all(back) else far for far, back in zip(reach, zip(*flips, strict=True), strict=True)]

    whole = _around(D, before, after, acc)
    for kernel, backwards in zip(kernels.to(acc).unbind(), flips, strict=True):
        taps = kernel
        pads: list[int] = []
        for axis, back in enumerate(backwards):
            taps = taps.narrow(axis + 1, 0, reach[axis] + 1)
            edge = (before[axis] - reach[axis], after[axis]) if back else (before[axis], after[axis] - reach[axis])
            pads = [*edge, *pads]
        taps = F.pad(taps.flip([axis + 1 for axis, back in enumerate(backwards) if back]), pads)
        whole = taps if whole is None else whole + taps
    assert whole is not None  # there is a direction
    if x.numel() == 0:
        return x * whole.flatten(1)[:, 0].to(x.dtype)

    # Channels first: transforms and their product then run over dense memory.
    lengths = [good_size(cells + far) for cells, far in zip(size, reach, strict=True)]
    axes = list(range(-len(size), 0))
    dense = x.movedim(-1, 1).to(acc).contiguous()
    spectrum = torch.fft.rfftn(dense, s=lengths, dim=axes) * torch.fft.rfftn(whole, s=lengths, dim=axes)
    y = torch.fft.irfftn(spectrum, s=lengths, dim=axes)
    for axis, cells, first in zip(axes, size, before, strict=True):
        y = y.narrow(axis, first, cells)
    return y.movedim(1, -1).to(x.dtype).contiguous()


def _around(D: Tensor | None, before: Sequence[int], after: Sequence[int], acc: torch.dtype) -> Tensor | None:
    """D as a kernel: at the tap of the token itself."""
    if D is None:
        return None
    pads: list[int] = []
    for edge in zip(before, after, strict=True):
        pads = [*edge, *pads]
    return F.pad(D.to(acc).view(-1, *[1] * len(before)), pads)


def good_size(least: int) -> Any:
    """The smallest size from `least` on whose only prime factors are 2, 3 and 5: transforms of others are slower."""
    size = max(1, least)
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
