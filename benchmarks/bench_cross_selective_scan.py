"""cross_selective_scan: VMamba's four paths over an image, bound by memory with one state, by arithmetic with sixteen."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.ops import cross_selective_scan, selective_scan
from ssmkit.ops._walk import ScanOutput
from ssmkit.paths import ScanPath
from ssmkit.testing import cross_selective_scan_inputs

from . import Bench, Prepared, Rival, official, register
from .reference import carried

NPATHS = 4
CHUNK = 256  # tokens of the reference between two checkpoints
PER_PATH = ("dt", "B", "C")


def own_inputs(k: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """What selective_scan takes for path k, tokens in the order of x."""
    own = {name: inputs[name][:, :, k] for name in PER_PATH} | {name: inputs[name][k] for name in ("A", "D", "dt_bias")}
    return own | {"x": inputs["x"], "dt_softplus": inputs["dt_softplus"]}


def gathered_reference(paths: tuple[ScanPath, ...], **inputs: Any) -> Tensor:
    """The float64 truth: gather, scan by the reference with the state carried from chunk to chunk, scatter, sum."""
    ys = []
    for k, path in enumerate(paths):
        own = own_inputs(k, inputs)
        own |= {name: own[name][:, path.tokens()] for name in ("x", *PER_PATH)}

        def scan(tokens: slice, state: Tensor | None, own: dict[str, Any] = own) -> tuple[Tensor, Tensor]:
            part = {name: t[:, tokens] if name in ("x", *PER_PATH) else t for name, t in own.items()}
            scanned = selective_scan(**part, initial_state=state, return_final_state=True, backend="reference")
            assert isinstance(scanned, ScanOutput)
            return scanned

        ys.append(carried(scan, path.length, CHUNK)[:, path.inverse()])
    return torch.stack(ys).sum(0)


def plain_scans(paths: tuple[ScanPath, ...], **inputs: Any) -> Tensor:
    """One scan per path over the tokens as they lie: the same arithmetic without any path. Added up only for a gradient."""
    outputs = [selective_scan(**own_inputs(k, inputs)) for k in range(len(paths))]
    assert all(isinstance(y, Tensor) for y in outputs)
    last = outputs[-1]
    assert isinstance(last, Tensor)
    return torch.stack([y.sum() for y in outputs if isinstance(y, Tensor)]).sum() if last.requires_grad else last


# x, dt (batch, npaths * dim, seqlen), A, B, C (batch, npaths, dstate, seqlen), D, dt_bias, dt_softplus -> y like x
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]


def four_copies(load: Callable[[], Scan], **options: Any) -> Rival:
    """The published pipeline over one scan of all paths' channels: every tensor copied into each path's order, then the
    outputs copied back and added up."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        scan = load()
        tokens = torch.stack([path.tokens() for path in inputs["paths"]])  # (npaths, seqlen)
        ranks = torch.stack([path.inverse() for path in inputs["paths"]])

        def crossed(t: Tensor) -> Tensor:
            """(batch, seqlen, npaths, any) -> (batch, npaths, any, seqlen), each path's tokens in its order."""
            t = t.permute(0, 2, 3, 1)
            return t.gather(3, tokens[:, None].expand(t.shape))

        def call() -> Tensor:
            x = inputs["x"].unsqueeze(2).expand(-1, -1, NPATHS, -1)
            B, C = (crossed(inputs[name].squeeze(3)) for name in ("B", "C"))
            A, D, dt_bias = (inputs[name].flatten(0, 1) for name in ("A", "D", "dt_bias"))
            x, dt = (crossed(t).flatten(1, 2) for t in (x, inputs["dt"]))
            y = scan(x, dt, A, B, C, D, dt_bias, inputs["dt_softplus"]).unflatten(1, (NPATHS, -1))
            return y.gather(3, ranks[:, None].expand(y.shape)).sum(1).transpose(1, 2)

        return Prepared(call)

    return Rival(prepare=prepare, **options)


def ssmkit_scan() -> Scan:
    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
    ) -> Tensor:
        x, dt = x.transpose(1, 2), dt.transpose(1, 2)
        B, C = (weight.permute(0, 3, 1, 2) for weight in (B, C))
        y = selective_scan(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    return scan


def mamba_ssm_reference() -> Scan:
    reference = official.mamba_ssm("ops.selective_scan_interface").selective_scan_ref

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
    ) -> Tensor:
        y: Tensor = reference(x, dt, A, B, C, D, None, dt_bias, dt_softplus)
        return y

    return scan


def mambapy_pscan() -> Scan:
    pscan = importlib.import_module("mambapy.pscan").pscan

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool
    ) -> Tensor:
        x, dt = x.transpose(1, 2), dt.transpose(1, 2) + dt_bias
        dt = F.softplus(dt) if dt_softplus else dt
        B, C = (w.permute(0, 3, 1, 2).repeat_interleave(x.shape[2] // NPATHS, dim=2) for w in (B, C))
        h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B)
        return ((h * C).sum(3) + D * x).transpose(1, 2)

    return scan


def loop_declines(mode: str) -> str | None:
    """Each step's indexing gets a gradient of full size."""
    return "its backward is quadratic in length" if mode == "fwdbwd" else None


def states(batch: int, height: int, width: int, dim: int, dstate: int, mode: str) -> float:
    """States computed: once forward; in backward once more, as they are not kept."""
    return NPATHS * batch * height * width * dim * dstate * (1 if mode == "fwd" else 2)


def multiply_adds(batch: int, height: int, width: int, dim: int, dstate: int, mode: str) -> float:
    """Per path, state and token as in selective_scan: three forward, ten more backward besides the states again."""
    return NPATHS * batch * height * width * dim * dstate * (3 if mode == "fwd" else 3 + 10)


def bytes_moved(batch: int, height: int, width: int, dim: int, dstate: int, dtype: torch.dtype, mode: str) -> float:
    """Forward x in and y out once, dt, B and C of each path; backward x, dy and dx once, dt, B, C and their gradients."""
    shared, own = (2, 1) if mode == "fwd" else (2 + 3, 1 + 2)
    return batch * height * width * (shared * dim + own * NPATHS * (dim + 2 * dstate)) * dtype.itemsize


register(
    Bench(
        op=cross_selective_scan,
        inputs=cross_selective_scan_inputs,
        shapes={
            f"SS2D, 56x56, {dim} channels, {dstate} states": {
                "batch": 1, "height": 56, "width": 56, "dim": dim, "dstate": dstate
            }
            for dim in (96, 192)
            for dstate in (1, 16)
        },
        fixed={"optional": ("D", "dt_bias"), "requires_grad": False},
        parameters=("A", "D", "dt_bias"),
        bytes_moved=bytes_moved,
        exps=states,
        fmas=multiply_adds,
        reference=gathered_reference,
        rivals={
            "four plain scans": Rival(call=plain_scans, contrast=True, note="tokens as they lie, outputs not added up"),
            "four copies and selective_scan": four_copies(ssmkit_scan),
            "four copies and mamba_ssm reference": four_copies(mamba_ssm_reference, declines=loop_declines),
            "four copies and mambapy pscan": four_copies(mambapy_pscan),
        },
    )
)  # fmt: skip
