"""cross_selective_scan: every backend against the float64 reference, the sum of its scans, official numbers; refusals."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load
from hypothesis import given
from hypothesis import strategies as st
from laws import law, same

from ssmkit import ScanPath
from ssmkit.ops import cross_selective_scan, selective_scan
from ssmkit.ops.cross_selective_scan import BACKENDS, cross_selective_scan_bwd, cross_selective_scan_fwd
from ssmkit.paths import continuous, cross, row, windows
from ssmkit.testing import (
    CANCELLATION,
    assert_close,
    available,
    cross_selective_scan_inputs,
    device_of,
    run,
    to_double,
)

SHAPES = {  # batch, height, width, dim, dstate
    "one token": (2, 1, 1, 9, 1),
    "one row": (1, 1, 7, 3, 2),
    "one column": (1, 9, 1, 3, 2),
    "odd everything": (3, 3, 5, 7, 5),
    "one state, one past a checkpoint": (1, 5, 13, 35, 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("cross_selective_scan"))
every_backend = pytest.mark.parametrize("backend", available("cross_selective_scan", reference=True))
PER_PATH = ("dt", "B", "C")


def cotangent(inputs, merge="sum"):
    batch, seqlen, dim = inputs["x"].shape
    shape = (batch, seqlen, dim) if merge == "sum" else (batch, seqlen, len(inputs["paths"]), dim)
    return {"y": torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs["x"].dtype)}


def compare(inputs, backend, **options):
    """One backend against the reference in float64, the output and all gradients."""
    weights = cotangent(inputs, options.get("merge", "sum"))
    actual = run(cross_selective_scan, inputs, weights, backend=backend, **options)
    expected = run(cross_selective_scan, to_double(inputs), weights, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        # The gradients of parameters are sums over all tokens, of terms of both signs.
        slack = CANCELLATION if name in ("dA", "dD", "ddt_bias", "ddt_weight") else 1.0
        assert_close(name, actual[name], expected[name], slack=slack)


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, backend):
    compare(cross_selective_scan_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


OPTIONS = {
    "bare": {"optional": ()},
    "gate": {"optional": ("z",)},
    "D": {"optional": ("D",)},
    "bias": {"optional": ("dt_bias",)},
    "groups": {"ngroups": 3},
    "low-rank dt": {"rank": 2},
    "low-rank dt, one path, groups": {"rank": 5, "ngroups": 2, "paths": (ScanPath.reverse(12),), "optional": ()},
    "one path": {"paths": (ScanPath.reverse(12),)},
    "two tables": {"paths": continuous(3, 4)},
    "restarts": {"paths": (row(3, 4), windows(3, 4, 2).with_restarts([0, 5, 9]), cross(3, 4)[3])},
}


@backends
@pytest.mark.parametrize("merge", ["sum", "stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, merge, backend):
    inputs = cross_selective_scan_inputs(2, 3, 4, 6, 3, dtype=dtype, device=device_of(backend), **options)
    compare(inputs, backend, merge=merge)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("paths", [None, OPTIONS["restarts"]["paths"]], ids=["cross", "restarts"])
def test_pads_and_resets(paths, dtype, backend):
    tokens = torch.arange(12)
    flags = {
        "mask": tokens.remainder(5).ne(2).expand(2, 12).to(device_of(backend)),
        "resets": tokens.remainder(7).eq(2).expand(2, 12).to(device_of(backend)),
    }
    inputs = cross_selective_scan_inputs(2, 3, 4, 6, 3, paths=paths, dtype=dtype, device=device_of(backend))
    compare(inputs, backend, **flags)
    grads = run(cross_selective_scan, inputs, cotangent(inputs), backend=backend, **flags)
    for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
        assert (grads[name][:, 2::5] == 0).all(), name


@backends
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float64, 17)], ids=str)
def test_low_rank_dt_over_several_chunks_and_blocks(dtype, rank, backend):
    """Ranks and channels that fill no vector, pads among the tokens."""
    paths = cross(5, 13)[1:3]
    inputs = cross_selective_scan_inputs(
        1, 5, 13, 35, 2, paths=paths, rank=rank, dtype=dtype, device=device_of(backend)
    )
    mask = torch.arange(65).remainder(7).ne(2).expand(1, 65).to(device_of(backend))
    compare(inputs, backend, mask=mask)
    assert (run(cross_selective_scan, inputs, cotangent(inputs), backend=backend, mask=mask)["ddt"][:, 2::7] == 0).all()


@every_backend
def test_low_rank_dt_is_its_expansion(backend):
    inputs = cross_selective_scan_inputs(1, 3, 5, 6, 2, rank=4, dtype=torch.float64, device=device_of(backend))
    full = {k: v for k, v in inputs.items() if k != "dt_weight"}
    full["dt"] = torch.einsum("blkr,kdr->blkd", inputs["dt"], inputs["dt_weight"])
    same(cross_selective_scan(**inputs, backend=backend), cross_selective_scan(**full, backend=backend))


@backends
def test_without_softplus(backend):
    inputs = cross_selective_scan_inputs(2, 3, 4, 6, 3, optional=(), device=device_of(backend))
    inputs["dt"] = inputs["dt"].detach().exp().mul(0.1).requires_grad_()
    compare(inputs | {"dt_softplus": False}, backend)


@pytest.mark.skipif("cpu" not in available("cross_selective_scan"), reason="the compiled library is not built")
def test_more_threads_than_channels():
    """Then every path's length is cut among them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            compare(cross_selective_scan_inputs(1, 20, 30, 5, 3, dtype=dtype), "cpu")
    finally:
        torch.set_num_threads(threads)


# Laws


def draw(data):
    """Small inputs along any paths, in float64 so that a law holds to rounding."""
    height, width, dim, dstate = (data.draw(st.integers(1, 5)) for _ in range(4))
    orders = data.draw(st.lists(st.permutations(range(height * width)), min_size=1, max_size=3))
    starts = st.lists(st.integers(0, height * width - 1), max_size=2)
    paths = [ScanPath(order, restarts=data.draw(starts)) for order in orders]
    paths = tuple(path.flip() if data.draw(st.booleans()) else path for path in paths)
    return cross_selective_scan_inputs(
        data.draw(st.integers(1, 2)), height, width, dim, dstate, paths=paths, dtype=torch.float64,
        seed=data.draw(st.integers(0, 2**16)),
    )  # fmt: skip


def on(inputs, backend):
    moved = {k: v.detach().to(device_of(backend)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in moved.items()}


def scans(backend, merge="sum", **inputs):
    """One call of selective_scan for each path."""
    paths, shared = inputs["paths"], {name: inputs[name] for name in ("x", "z", "dt_softplus") if name in inputs}
    ys = []
    for k, path in enumerate(paths):
        own = {name: inputs[name][:, :, k] for name in PER_PATH}
        own |= {name: inputs[name][k] for name in ("A", "D", "dt_bias") if name in inputs}
        ys.append(selective_scan(**own, **shared, path=path, backend=backend))
    return torch.stack(ys, dim=2) if merge == "stack" else sum(ys)


@every_backend
@law
@given(data=st.data())
def test_it_is_the_sum_of_one_scan_per_path(backend, data):
    inputs = on(draw(data), backend)
    merge = data.draw(st.sampled_from(["sum", "stack"]))
    weights = cotangent(inputs, merge)
    actual = run(cross_selective_scan, inputs, weights, merge=merge, backend=backend)
    expected = run(lambda **named: scans(backend, merge, **named), inputs, weights)
    for name in expected:
        same(actual[name], expected[name])


@every_backend
@law
@given(data=st.data())
def test_the_order_of_the_paths_does_not_matter(backend, data):
    inputs = draw(data)
    swapped = inputs | {name: inputs[name].flip(2) for name in PER_PATH} | {"paths": inputs["paths"][::-1]}
    swapped |= {name: inputs[name].flip(0) for name in ("A", "D", "dt_bias")}
    y, y_swapped = (cross_selective_scan(**on(given, backend), backend=backend) for given in (inputs, swapped))
    same(y, y_swapped)


@every_backend
@pytest.mark.parametrize("size", [(4, 6), (1, 7), (5, 5)], ids=str)
def test_transposed_image_with_swapped_paths(size, backend):
    height, width = size
    inputs = cross_selective_scan_inputs(2, height, width, 4, 3, dtype=torch.float64, requires_grad=False)
    swap = [1, 0, 3, 2]

    def transposed(tensor):
        return tensor.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)

    other = {name: transposed(inputs[name]) for name in ("x", "z")}
    other |= {name: transposed(inputs[name][:, :, swap]) for name in PER_PATH}
    other |= {name: inputs[name][swap] for name in ("A", "D", "dt_bias")}
    other |= {"paths": cross(width, height), "dt_softplus": True}
    y, y_other = (cross_selective_scan(**on(given, backend), backend=backend) for given in (inputs, other))
    same(transposed(y), y_other)


@every_backend
def test_without_states_each_token_comes_back_once_per_path(backend):
    inputs = cross_selective_scan_inputs(2, 3, 4, 5, 2, optional=("D",), requires_grad=False, device=device_of(backend))
    inputs |= {"C": torch.zeros_like(inputs["C"]), "D": torch.ones_like(inputs["D"])}
    assert torch.equal(cross_selective_scan(**inputs, backend=backend), 4 * inputs["x"])


# Official numbers


SS2D = ["vmamba_ss2d_v05_noz_cf", "vmamba_ss2d_v05"]


def ss2d(x, params, config, backend):
    """VMamba's SS2D from its parameters, around one call of the op."""
    channel_first, npaths = config.get("channel_first", False), 4
    x = x.permute(0, 2, 3, 1) if channel_first else x
    u, z = x @ params["in_proj.weight"].T, None
    if "noz" not in config["forward_type"]:
        u, z = u.chunk(2, dim=-1)
    u = F.conv2d(
        u.permute(0, 3, 1, 2), params["conv2d.weight"], params.get("conv2d.bias"), padding=1, groups=u.shape[-1]
    )
    (_, dim, height, width), dstate, rank = u.shape, params["A_logs"].shape[1], params["dt_projs.weight"].shape[1]
    tokens = F.silu(u).flatten(2).transpose(1, 2)
    projected = (tokens @ params["x_proj.weight"].T).unflatten(-1, (npaths, -1))
    low_rank, B, C = projected.split((rank, dstate, dstate), dim=-1)
    dt = torch.einsum("blkr,kdr->blkd", low_rank, params["dt_projs.weight"].view(npaths, dim, rank))
    A = -params["A_logs"].exp().view(npaths, dim, dstate)
    y = cross_selective_scan(
        tokens, dt, A, B, C, cross(height, width), D=params["Ds"].view(npaths, dim), dt_bias=params["dt_projs_bias"],
        dt_softplus=True, backend=backend,
    )  # fmt: skip
    y = F.layer_norm(y, (dim,), params["out_norm.weight"], params["out_norm.bias"]).unflatten(1, (height, width))
    y = (y if z is None else y * F.silu(z)) @ params["out_proj.weight"].T
    return y.permute(0, 3, 1, 2) if channel_first else y


@every_backend
@pytest.mark.parametrize("name", SS2D)
def test_official_ss2d(name, backend):
    case = load(name)
    leaves = {"x": case.inputs["x"], **case.params}
    leaves = {k: v.double().to(device_of(backend)).requires_grad_() for k, v in leaves.items()}
    y = ss2d(leaves["x"], {k: v for k, v in leaves.items() if k != "x"}, case.meta["config"], backend)
    grads = torch.autograd.grad(y, list(leaves.values()), case.cotangents["y"].to(y))
    expected = {"y": case.outputs["y"], "dx": case.gradients["in.x"]}
    expected |= {f"d{k}": case.gradients[f"param.{k}"] for k in case.params}
    actual = {"y": y} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(key, actual[key].detach().float(), value)  # the file's numbers are rounded to fp32


# Registration


GRADCHECK = {
    "all options": {},
    "bare": {"optional": ()},
    "groups": {"ngroups": 2},
    "low-rank dt": {"rank": 2, "optional": ("dt_bias",)},
    "restarts": {"paths": (ScanPath([3, 0, 5, 4, 1, 2], restarts=[1]), ScanPath.reverse(6))},
}


@pytest.mark.parametrize("backend", [b for b in available("cross_selective_scan", reference=True) if b != "triton"])
@pytest.mark.parametrize("merge", ["sum", "stack"])
@pytest.mark.parametrize("options", GRADCHECK.values(), ids=GRADCHECK)
def test_gradcheck(options, merge, backend):
    inputs = cross_selective_scan_inputs(1, 2, 3, 2, 2, dtype=torch.float64, device=device_of(backend), **options)
    names, leaves = zip(*((k, v) for k, v in inputs.items() if isinstance(v, torch.Tensor)), strict=True)
    mask = torch.tensor([[True, True, False, True, True, True]], device=device_of(backend))

    def call(*values):
        named = dict(zip(names, values, strict=True))
        return cross_selective_scan(
            **named, paths=inputs["paths"], dt_softplus=True, mask=mask, merge=merge, backend=backend
        )

    assert torch.autograd.gradcheck(call, leaves)


@backends
@pytest.mark.parametrize(("merged", "rank"), [(True, 0), (False, 0), (True, 2), (False, 2)])
def test_opcheck(merged, rank, backend):
    device = device_of(backend)
    inputs = cross_selective_scan_inputs(2, 3, 4, 4, 3, rank=rank, device=device)
    tensors = [inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight")]
    orders = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int().to(device).unsqueeze(0)
    flags = torch.zeros(1, 2, 12, dtype=torch.uint8, device=device)
    walks = (orders, [-1, 0, -1, 0], flags, [-1, -1, 0, -1], [False, False, True, True])
    torch.library.opcheck(cross_selective_scan_fwd, (*tensors, *walks, True, merged, True, backend))
    tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    y, checkpoints = cross_selective_scan_fwd(*tensors, *walks, True, merged, True, backend)
    args = (torch.ones_like(y), *tensors, *walks, checkpoints, True, merged, backend)
    torch.library.opcheck(cross_selective_scan_bwd, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@backends
def test_compile_fullgraph(backend, dynamic):
    device = device_of(backend)

    def layer(height, width, **inputs):
        return cross_selective_scan(**inputs, paths=cross(height, width), backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height, width in ((3, 5), (5, 7)):
        inputs = cross_selective_scan_inputs(2, height, width, 6, 4, device=device)
        del inputs["paths"]
        actual, expected = (run(f, inputs, cotangent(inputs), height=height, width=width) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_views_of_one_projection_give_the_same_bits(backend):
    plain = cross_selective_scan_inputs(2, 3, 4, 6, 4, device=device_of(backend))
    wide = torch.cat([plain[name].detach().flatten(3) for name in PER_PATH], dim=-1)
    views = dict(zip(PER_PATH, wide.split((6, 4, 4), dim=-1), strict=True))
    x, z = torch.cat([plain["x"].detach(), plain["z"].detach()], dim=-1).chunk(2, dim=-1)
    strided = plain | {k: v.requires_grad_() for k, v in {**views, "x": x, "z": z}.items()}
    swapped = {k: plain[k].detach().transpose(0, 1).contiguous().transpose(0, 1) for k in ("x", "z", *PER_PATH)}
    swapped = plain | {k: v.requires_grad_() for k, v in swapped.items()}
    expected = run(cross_selective_scan, plain | {k: plain[k] for k in PER_PATH}, cotangent(plain), backend=backend)
    for other in (strided, swapped):
        actual = run(cross_selective_scan, other, cotangent(plain), backend=backend)
        for name in expected:
            assert torch.equal(actual[name].view_as(expected[name]), expected[name]), name


@every_backend
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 3), (2, 0, 3, 4, 3), (2, 2, 3, 0, 3), (2, 2, 3, 4, 0)],
    ids=["no batch", "no tokens", "no channels", "no states"],
)  # fmt: skip
def test_empty(shape, rank, backend):
    inputs = cross_selective_scan_inputs(*shape, rank=rank, device=device_of(backend))
    for merge in ("sum", "stack"):
        out = run(cross_selective_scan, inputs, cotangent(inputs, merge), merge=merge, backend=backend)
        assert out["y"].shape == cotangent(inputs, merge)["y"].shape
        for name in (name for name, value in inputs.items() if isinstance(value, torch.Tensor)):
            assert out[f"d{name}"].shape == inputs[name].shape
            assert torch.isfinite(out[f"d{name}"]).all(), name


@backends
def test_backward_gives_the_same_bits_twice(backend):
    inputs = cross_selective_scan_inputs(2, 3, 5, 40, 8, dtype=torch.bfloat16, device=device_of(backend))
    once, twice = (run(cross_selective_scan, inputs, cotangent(inputs), backend=backend) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@backends
def test_no_state_is_kept_without_gradients(backend):
    inputs = cross_selective_scan_inputs(1, 10, 13, 4, 2, device=device_of(backend), requires_grad=False)
    tensors = [inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight")]
    walks = (None, [-1] * 4, None, [-1] * 4, [False, True, False, True])
    assert cross_selective_scan_fwd(*tensors, *walks, True, True, False, backend)[1].numel() == 0


# Refusals


BAD = {
    "x not three axes": ({"x": torch.zeros(2, 6)}, r"x must have shape \(batch, seqlen, dim\), got \(2, 6\)"),
    "dt of one path": ({"dt": torch.zeros(2, 6, 4)}, r"dt must have shape \(2, 6, 4, 4\) .*got \(2, 6, 4\)"),
    "dt of another dtype": ({"dt": torch.zeros(2, 6, 4, 4).half()}, "dt must be of dtype float32 like x, got float16"),
    "A of one path": ({"A": torch.zeros(4, 3)}, r"A must have shape \(npaths, dim, dstate\), got \(4, 3\)"),
    "A of too many paths": ({"A": torch.zeros(5, 4, 3)}, r"A must have shape \(4, 4, 3\) .*got \(5, 4, 3\)"),
    "A complex": ({"A": torch.zeros(4, 4, 3).cfloat()}, "A must be of dtype .* got complex64"),
    "B without a length": ({"B": torch.zeros(2, 4, 3)}, r"B must have shape \(2, 6, 4, 3\)"),
    "groups that do not divide": ({"C": torch.zeros(2, 6, 4, 3, 3)}, "C has 3 groups, which must divide dim 4"),
    "D of one path": ({"D": torch.zeros(4)}, r"D must have shape \(4, 4\)"),
    "z per path": ({"z": torch.zeros(2, 6, 4, 4)}, r"z must have shape \(2, 6, 4\)"),
    "expansion of another rank": (
        {"dt_weight": torch.zeros(4, 4, 2)},
        r"dt must have shape \(2, 6, 4, 2\) \(batch, seqlen, npaths, rank of dt_weight\), got \(2, 6, 4, 4\)",
    ),
    "expansion of one path": ({"dt_weight": torch.zeros(4, 2)}, r"dt_weight must have shape \(npaths, dim, rank\)"),
    "expansion of no rank": ({"dt_weight": torch.zeros(4, 4, 0), "dt": torch.zeros(2, 6, 4, 0)}, "dt_weight .* got 0"),
    "mask too short": ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must have shape \(2, 6\)"),
    "another device": ({"D": torch.zeros(4, 4, device="meta")}, "D must be on cpu like x, got meta"),
    "a path of another length": (
        {"paths": (*cross(2, 3)[:3], ScanPath.identity(5))},
        r"paths\[3\] must visit 6 tokens like x, got 5",
    ),
    "no paths": ({"paths": ()}, "paths must hold at least one ScanPath, got none"),
    "unknown merge": ({"merge": "mean"}, "merge must be one of sum, stack; got 'mean'"),
    "unknown backend": ({"backend": "cudnn"}, "backend must be one of auto, reference, cuda, triton, cpu; got 'cudnn'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    inputs = cross_selective_scan_inputs(2, 2, 3, 4, 3, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        cross_selective_scan(**(inputs | change))


def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("cross_selective_scan"))
    inputs = cross_selective_scan_inputs(2, 2, 3, 4, 3, requires_grad=False)
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        cross_selective_scan(**inputs, backend=name)
