"""Inputs, comparisons and runnable backends, shared by tests and benchmarks."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmkit.backends import Backend, refusal
from ssmkit.ops._define import acc_dtype
from ssmkit.ops._tree import Tree, grid_edges
from ssmkit.paths import ScanPath, cross

EPS32 = torch.finfo(torch.float32).eps
# A slack for gradients of parameters. They are sums over all tokens, of terms of both signs: their error is that of the
# terms, and the sum may be several times smaller than they are.
CANCELLATION = 8.0


def device_of(backend: str) -> torch.device:
    """Where a backend's test tensors live: GPU backends on the GPU, or interpreted on the CPU where there is none."""
    return torch.device("cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu")


def available(op: str, *, reference: bool = False) -> list[str]:
    """Backends of `op` that can run here, most preferred first; with `reference`, that too."""
    rows: tuple[Backend, ...] = importlib.import_module(f"ssmkit.ops.{op}").BACKENDS
    usable = [
        row.name
        for row in rows
        if refusal(Backend(row.name, row.device, row.module), device_of(row.name).type, {}) is None
    ]
    return usable + ["reference"] * reference


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Allowed relative RMS and maximum error of a result of `dtype`, from the arithmetic.

    Rounding the result costs half an eps of its dtype; accumulating costs a few eps of the state's dtype.
    """
    real = dtype.to_real() if dtype.is_complex else dtype
    eps = torch.finfo(real).eps
    accumulation = eps if real == torch.float64 else EPS32
    return eps / 2 + 4 * accumulation, eps + 16 * accumulation


def assert_close(name: str, actual: Tensor, expected: Tensor, *, slack: float = 1.0) -> None:
    """Compare with a float64 result: relative RMS for the bulk, relative maximum for the worst element.

    `slack` multiplies both bounds; whoever passes it states the cause beside the call.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, e = actual.detach().cpu().to(wide), expected.detach().cpu().to(wide)
    assert torch.isfinite(torch.view_as_real(a) if a.is_complex() else a).all(), f"{name}: not finite"
    if e.numel() == 0:
        return
    rms_bound, max_bound = (slack * bound for bound in bounds(actual.dtype))
    error = (a - e).abs()
    scale_rms, scale_max = e.abs().square().mean().sqrt(), e.abs().max()
    # A result that is exactly zero must be met exactly.
    rms, worst = error.square().mean().sqrt() / scale_rms.clamp_min(1e-300), error.max() / scale_max.clamp_min(1e-300)
    assert rms <= rms_bound, f"{name}: RMS error {rms:.3g} of the expected RMS, allowed {rms_bound:.3g}"
    assert worst <= max_bound, f"{name}: worst error {worst:.3g} of the expected maximum, allowed {max_bound:.3g}"


def to_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies of the numbers in float64 (complex128), gradients asked for where they were; the rest unchanged."""

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        wide = torch.complex128 if value.is_complex() else torch.float64
        return value.detach().to(wide, copy=True).requires_grad_(value.requires_grad)

    return {name: widen(value) for name, value in inputs.items()}


def run(
    op: Callable[..., Any], inputs: dict[str, Any], cotangents: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Call `op` with keyword inputs; return its outputs and, as "d" + name, the gradient of every input that asks for one.

    Args:
        op: Returns a tensor or a tuple of tensors, named in order by the keys of `cotangents`.
        cotangents: For each output, the weight of its elements in the differentiated sum.
    """
    leaves = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    outputs = op(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip(cotangents, outputs, strict=True))
    pairs = [(out, cotangents[name].to(out)) for name, out in named.items() if out.requires_grad]
    grads = torch.autograd.grad(
        [out for out, _ in pairs],
        list(leaves.values()),
        [cot for _, cot in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return {**{k: v.detach() for k, v in named.items()}, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def selective_scan_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    dstate: int,
    *,
    ngroups: int = 1,
    nseq: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    complex_A: bool = False,
    constant_B: bool = False,
    constant_C: bool = False,
    optional: tuple[str, ...] = ("D", "z", "dt_bias", "initial_state"),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `selective_scan` with decays like those of a trained layer, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = acc.to_complex() if complex_A else acc

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=kind if kind.is_complex else acc).to(kind)

    def weights(constant: bool) -> Tensor:
        if constant:
            return normal(dim, dstate, kind=wide)
        return normal(batch, seqlen, ngroups, dstate, kind=wide if complex_A else dtype)

    A = -torch.rand(dim, dstate, generator=generator, dtype=acc) * 4 - 0.1
    inputs = {
        "x": normal(batch, seqlen, dim),
        "dt": (normal(batch, seqlen, dim).float() - 1).to(dtype),
        "A": torch.complex(A, normal(dim, dstate, kind=acc)) if complex_A else A,
        "B": weights(constant_B),
        "C": weights(constant_C),
        "D": normal(dim, kind=acc),
        "z": normal(batch, seqlen, dim),
        "dt_bias": normal(dim, kind=acc) - 2,
        "initial_state": normal(batch if nseq is None else nseq, dim, dstate, kind=wide),
    }
    kept = {k: v.to(device) for k, v in inputs.items() if k in ("x", "dt", "A", "B", "C") or k in optional}
    return {**{k: v.requires_grad_(requires_grad) for k, v in kept.items()}, "dt_softplus": True}


def cross_selective_scan_inputs(
    batch: int,
    height: int,
    width: int,
    dim: int,
    dstate: int,
    *,
    paths: tuple[ScanPath, ...] | None = None,
    ngroups: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("D", "z", "dt_bias"),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `cross_selective_scan` over an image, drawn on the CPU from `seed`; without paths, VMamba's.

    With a rank, dt comes in its low-rank form, with the `dt_weight` that expands it to about the same sizes.
    """
    paths = cross(height, width) if paths is None else paths
    scans = [
        selective_scan_inputs(batch, height * width, dim, dstate, ngroups=ngroups, dtype=dtype, seed=seed + k)
        for k in range(len(paths))
    ]
    per_path = {name: torch.stack([scan[name].detach() for scan in scans], dim=2) for name in ("dt", "B", "C")}
    per_path |= {name: torch.stack([scan[name].detach() for scan in scans]) for name in ("A", "D", "dt_bias")}
    drawn = {"x": scans[0]["x"].detach(), "z": scans[0]["z"].detach()} | per_path
    if rank:
        made = torch.Generator().manual_seed(seed)
        drawn["dt"] = torch.randn(batch, height * width, len(paths), rank, generator=made).to(dtype)
        drawn["dt_weight"] = torch.randn(len(paths), dim, rank, generator=made).to(drawn["A"].dtype) / rank**0.5
        optional = (*optional, "dt_weight")
    kept = {k: drawn[k].to(device) for k in ("x", "dt", "A", "B", "C", *optional)}
    return {**{k: v.requires_grad_(requires_grad) for k, v in kept.items()}, "paths": paths, "dt_softplus": True}


def grid_scan_inputs(
    batch: int,
    height: int,
    width: int,
    dim: int,
    dstate: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("D", "z", "dt_bias_top", "dt_bias_left"),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `grid_scan` with decays like those of a trained layer, drawn on the CPU from `seed`."""
    sides = [
        selective_scan_inputs(
            batch, height * width, dim, dstate, dtype=dtype, requires_grad=False, seed=2 * seed + i,
            optional=("D", "z", "dt_bias"),
        )
        for i in range(2)
    ]  # fmt: skip
    image = (batch, height, width)
    inputs = {"x": sides[0]["x"]}
    for name in ("dt", "A", "B", "dt_bias"):
        inputs |= {f"{name}_top": sides[0][name], f"{name}_left": sides[1][name]}
    inputs |= {name: sides[0][name] for name in ("C", "D", "z")}
    inputs = {k: v if v.ndim < 3 else v.reshape(*image, v.shape[-1]) for k, v in inputs.items()}
    always = ("x", "dt_top", "dt_left", "A_top", "A_left", "B_top", "B_left", "C")
    kept = {k: v.to(device) for k, v in inputs.items() if k in always or k in optional}
    return {**{k: v.requires_grad_(requires_grad) for k, v in kept.items()}, "dt_softplus": True}


def ssd_inputs(
    batch: int,
    seqlen: int,
    nheads: int,
    headdim: int,
    dstate: int,
    *,
    ngroups: int = 1,
    nseq: int | None = None,
    walks: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("D", "z", "dt_bias", "initial_state"),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `ssd` with decays like those of a trained layer, drawn on the CPU from `seed`.

    `walks` is 2 for an initial state of a bidirectional call.
    """
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=acc).to(kind)

    state = (batch if nseq is None else nseq, nheads, headdim, dstate)
    inputs = {
        "x": normal(batch, seqlen, nheads, headdim),
        "dt": (normal(batch, seqlen, nheads).float() - 1).to(dtype),
        "A": -torch.rand(nheads, generator=generator, dtype=acc) * 4 - 0.1,
        "B": normal(batch, seqlen, ngroups, dstate),
        "C": normal(batch, seqlen, ngroups, dstate),
        "D": normal(nheads, kind=acc),
        "z": normal(batch, seqlen, nheads, headdim),
        "dt_bias": normal(nheads, kind=acc) - 2,
        "initial_state": normal(*((walks,) if walks > 1 else ()), *state, kind=acc),
    }
    kept = {k: v.to(device) for k, v in inputs.items() if k in ("x", "dt", "A", "B", "C") or k in optional}
    return {**{k: v.requires_grad_(requires_grad) for k, v in kept.items()}, "dt_softplus": True}


def ssd_noncausal_inputs(
    batch: int,
    seqlen: int,
    nheads: int,
    headdim: int,
    dstate: int,
    *,
    optional: tuple[str, ...] = ("D", "dt_bias"),
    **options: Any,
) -> dict[str, Any]:
    """Keyword inputs of `ssd_noncausal`: those of `ssd` without what only a walk has."""
    return ssd_inputs(batch, seqlen, nheads, headdim, dstate, optional=optional, **options)


def rms_norm_inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("bias", "residual", "z"),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `rms_norm` on x of this shape, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = {name: torch.randn(shape, generator=generator, dtype=acc).to(dtype) for name in ("x", "residual", "z")}
    drawn |= {name: torch.randn(shape[-1], generator=generator, dtype=acc) for name in ("weight", "bias")}
    kept = {k: drawn[k].to(device) for k in ("x", "weight", "bias", "residual", "z") if k in ("x", "weight", *optional)}
    return {k: v.requires_grad_(requires_grad) for k, v in kept.items()}


def selective_state_step_inputs(
    batch: int,
    dim: int,
    dstate: int,
    *,
    optional: tuple[str, ...] = ("D", "z", "dt_bias"),
    **options: Any,
) -> dict[str, Any]:
    """Keyword inputs of `selective_state_step`: those of a scan over one token, without gradients."""
    options = {"requires_grad": False} | options
    inputs = selective_scan_inputs(batch, 1, dim, dstate, optional=(*optional, "initial_state"), **options)
    rows = {k: v.squeeze(1) for k, v in inputs.items() if k in ("x", "dt", "B", "C", "z")}
    return {"state": inputs.pop("initial_state")} | inputs | rows


def ssd_step_inputs(
    batch: int,
    nheads: int,
    headdim: int,
    dstate: int,
    *,
    optional: tuple[str, ...] = ("D", "z", "dt_bias"),
    **options: Any,
) -> dict[str, Any]:
    """Keyword inputs of `ssd_step`: those of `ssd` over one token, without gradients."""
    options = {"requires_grad": False} | options
    inputs = ssd_inputs(batch, 1, nheads, headdim, dstate, optional=(*optional, "initial_state"), **options)
    rows = {k: v.squeeze(1) for k, v in inputs.items() if k in ("x", "dt", "B", "C", "z")}
    return {"state": inputs.pop("initial_state")} | inputs | rows


def causal_conv1d_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    width: int,
    *,
    nseq: int | None = None,
    activation: str | None = "silu",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("bias", "initial_state"),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `causal_conv1d`, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=acc).to(kind)

    inputs = {
        "x": normal(batch, seqlen, dim),
        "weight": normal(dim, width, kind=acc) / width**0.5,
        "bias": normal(dim, kind=acc),
        "initial_state": normal(batch if nseq is None else nseq, width - 1, dim),
    }
    kept = {k: v.to(device) for k, v in inputs.items() if k in ("x", "weight") or k in optional}
    return {**{k: v.requires_grad_(requires_grad) for k, v in kept.items()}, "activation": activation}


def causal_conv1d_step_inputs(
    batch: int,
    dim: int,
    width: int,
    *,
    seqlen: int | None = None,
    state_len: int | None = None,
    optional: tuple[str, ...] = ("bias",),
    **options: Any,
) -> dict[str, Any]:
    """Keyword inputs of `causal_conv1d_step`: one token, or `seqlen` of them, and a state of width - 1 or `state_len`."""
    given: dict[str, Any] = {"requires_grad": False, "optional": (*optional, "initial_state")} | options
    inputs = causal_conv1d_inputs(batch, 1 if seqlen is None else seqlen, dim, width, **given)
    state = inputs.pop("initial_state")
    if state_len is not None:
        state = causal_conv1d_inputs(batch, 1, dim, state_len + 1, **given)["initial_state"]
    return inputs | {"x": inputs["x"].squeeze(1) if seqlen is None else inputs["x"], "state": state}


def linear_scan_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    *,
    nseq: int | None = None,
    constant_a: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("initial_state",),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `linear_scan`, decays of absolute value 0.4 to 1 (of any phase if complex), drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    acc = acc_dtype(dtype)
    rows = (dim,) if constant_a else (batch, seqlen, dim)
    a = 0.4 + 0.6 * torch.rand(rows, generator=generator, dtype=torch.float64)
    if dtype.is_complex:
        a = torch.polar(a, torch.rand(rows, generator=generator, dtype=torch.float64) * 6.28)
    inputs = {
        "a": a.to(acc if constant_a else dtype),
        "b": torch.randn(batch, seqlen, dim, generator=generator, dtype=acc).to(dtype),
        "initial_state": torch.randn(batch if nseq is None else nseq, dim, generator=generator, dtype=acc),
    }
    kept = {k: v.to(device) for k, v in inputs.items() if k in ("a", "b", *optional)}
    return {k: v.requires_grad_(requires_grad) for k, v in kept.items()}


def long_conv_inputs(
    batch: int,
    *size: int,
    taps: tuple[int, ...] | None = None,
    start: str | tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("D",),
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `long_conv` over `size` = seqlen, dim or height, width, dim; kernels by default of that size."""
    generator = torch.Generator().manual_seed(seed)
    acc = acc_dtype(dtype)
    *cells, dim = size
    taps = tuple(cells) if taps is None else taps
    directions = (len(start),) if isinstance(start, tuple) else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=acc)

    kernel = normal(*directions, dim, *taps)
    for axis, length in enumerate(reversed(taps), start=1):
        decay = torch.exp(-torch.arange(length, dtype=acc) / (1 + length / 4))
        kernel = kernel * decay.view(-1, *[1] * (axis - 1))
    inputs = {"x": normal(batch, *size).to(dtype), "kernel": kernel, "D": normal(dim)}
    kept = {k: v.to(device) for k, v in inputs.items() if k in ("x", "kernel", *optional)}
    return {**{k: v.requires_grad_(requires_grad) for k, v in kept.items()}, "start": start}


def ssm2d_kernel_inputs(
    height: int,
    width: int,
    ngroups: int,
    channels: int,
    dstate: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `ssm2d_kernel` like those of a layer, |A| and B within 0..1, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide)

    A, B, C = normal(4, ngroups, dstate), normal(2, ngroups, dstate), normal(2, channels, dstate)
    if dtype.is_complex:
        A = torch.polar(A.real.sigmoid(), 2 * torch.pi * A.imag.sigmoid())
        B = torch.complex(B.real.sigmoid(), B.imag.sigmoid())
    else:
        A, B = A.sigmoid(), B.sigmoid()
    drawn = {
        name: value.to(device, dtype).requires_grad_(requires_grad)
        for name, value in zip("ABC", (A, B, C), strict=True)
    }
    return {**drawn, "height": height, "width": width}


def linear_step_inputs(
    batch: int,
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = ("bias",),
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `linear_step`, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"x": (batch, in_features), "weight": (out_features, in_features), "bias": (out_features,)}
    kept = {name: shape for name, shape in shapes.items() if name in ("x", "weight", *optional)}
    return {name: torch.randn(s, generator=generator, dtype=acc).to(dtype).to(device) for name, s in kept.items()}


def minimum_spanning_tree_inputs(
    batch: int,
    rows: int,
    cols: int,
    *,
    edges: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `minimum_spanning_tree` for images of rows x cols tokens, or for so many tokens joined by `edges`."""
    generator = torch.Generator().manual_seed(seed)
    edges = grid_edges(rows, cols) if edges is None else edges
    weights = torch.rand(batch, len(edges), generator=generator, dtype=torch.float64)
    return {"weights": weights.to(device, dtype), "edges": edges.to(device), "seqlen": rows * cols}


def tree_scan_inputs(
    batch: int,
    rows: int,
    cols: int,
    dim: int,
    *,
    edges: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword inputs of `tree_scan`: decays of 0.4 to 1, and random spanning trees of images or of `edges`."""
    from ssmkit.ops.minimum_spanning_tree import minimum_spanning_tree

    scan = linear_scan_inputs(
        batch, rows * cols, dim, dtype=dtype, device=device, optional=(), requires_grad=requires_grad, seed=seed
    )
    graph = minimum_spanning_tree_inputs(batch, rows, cols, edges=edges, seed=seed)
    backend = "cpu" if "cpu" in available("minimum_spanning_tree") else "reference"
    tree = minimum_spanning_tree(**graph, backend=backend)
    return {**scan, "tree": Tree(*(table.to(device) for table in tree))}
