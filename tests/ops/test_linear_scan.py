"""linear_scan: every backend against the float64 reference, the official numbers."""

import pytest
import torch
from golden_cases import load, names
from laws import BAD_OFFSETS

from ssmkit.ops import linear_scan
from ssmkit.ops.linear_scan import BACKENDS, linear_scan_bwd, linear_scan_fwd
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, linear_scan_inputs, run, to_double

SHAPES = {  # batch, seqlen, dim
    "smallest": (1, 1, 1),
    "odd everything": (3, 37, 7),
    "one past a block of tokens": (2, 65, 33),
    "wider than a slice of vectors": (2, 20, 301),
}
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
backends = pytest.mark.parametrize("backend", available("linear_scan"))
every_backend = pytest.mark.parametrize("backend", available("linear_scan", reference=True))
kinds = pytest.mark.parametrize("constant_a", [False, True], ids=["a per token", "a constant"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def cotangents(inputs, seed=1):
    """Weights of h and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    b, state = inputs["b"], inputs.get("initial_state")
    nseq = b.shape[0] if state is None else state.shape[0]
    wide = torch.complex128 if b.is_complex() else torch.float64
    dh = torch.randn(b.shape, generator=generator, dtype=wide).to(b.dtype)
    return {"h": dh, "final_state": torch.randn(nseq, b.shape[2], generator=generator, dtype=wide).to(dh)}


def compare(inputs, backend, **options):
    """One backend against the reference in float64, outputs and all gradients."""
    weights = cotangents(inputs)
    actual = run(linear_scan, inputs, weights, return_final_state=True, backend=backend, **options)
    expected = run(linear_scan, to_double(inputs), weights, return_final_state=True, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        slack = CANCELLATION if name == "da" and inputs["a"].ndim == 1 else 1.0
        assert_close(name, actual[name], expected[name], slack=slack)
    return actual


@backends
@kinds
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, constant_a, backend):
    compare(linear_scan_inputs(*shape, dtype=dtype, constant_a=constant_a, device=device_of(backend)), backend)


@backends
@directions
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["fp32", "complex64"])
@pytest.mark.parametrize("optional", [(), ("initial_state",)], ids=["bare", "initial state"])
def test_options(optional, dtype, constant_a, reverse, backend):
    options = {"dtype": dtype, "constant_a": constant_a, "optional": optional, "device": device_of(backend)}
    compare(linear_scan_inputs(2, 21, 5, **options), backend, reverse=reverse)


@backends
def test_final_state_alone_has_a_gradient(backend):
    inputs = linear_scan_inputs(2, 9, 5, device=device_of(backend))
    grads = {}
    for name in (backend, "reference"):
        final = linear_scan(**inputs, return_final_state=True, backend=name).final_state
        grads[name] = torch.autograd.grad(final.square().sum(), list(inputs.values()))
    for actual, expected in zip(grads[backend], grads["reference"], strict=True):
        assert_close("gradient", actual, expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=["complex128", "complex64"])
@pytest.mark.parametrize("name", names("s5_reset_operator*"))
def test_official_numbers(name, dtype, backend):
    case = load(name)
    device = device_of(backend)
    a, b = (case.inputs[k].to(device, dtype)[None].requires_grad_() for k in ("A", "b"))
    resets = case.inputs["reset"].bool().to(device)[None]
    dh = case.cotangents["b"][None]
    actual = run(linear_scan, {"a": a, "b": b}, {"h": dh}, resets=resets, backend=backend)
    expected = {"h": case.outputs["b"], "da": case.gradients["in.A"], "db": case.gradients["in.b"]}
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        if dtype == torch.complex128:
            worst = (value[0].cpu() - expected[key]).abs().max() / expected[key].abs().max()
            assert worst <= 1e-10, f"{key}: {worst:.3g}"
        else:
            assert_close(key, value[0], expected[key])


# Gradients of the irregular walks


IRREGULAR = {
    "resets": {"resets": torch.arange(40).remainder(9).eq(3).expand(2, 40)},
    "pads left and right": {"mask": torch.arange(40).sub(20).abs().le(12).expand(2, 40)},
    "pads and resets": {
        "mask": torch.arange(40).remainder(5).ne(2).expand(2, 40),
        "resets": torch.arange(40).remainder(7).eq(2).expand(2, 40),
    },
}


@backends
@directions
@kinds
@pytest.mark.parametrize("walk", IRREGULAR.values(), ids=IRREGULAR)
def test_gradients_along_irregular_walks(walk, constant_a, reverse, backend):
    walk = {k: v.to(device_of(backend)) for k, v in walk.items()}
    compare(
        linear_scan_inputs(2, 40, 9, constant_a=constant_a, device=device_of(backend)), backend, reverse=reverse, **walk
    )


@backends
@directions
@kinds
def test_gradients_of_packed_sequences(constant_a, reverse, backend):
    lengths = [33, 0, 1, 20, 0]
    offsets = torch.tensor([0, *lengths], device=device_of(backend)).cumsum(0).to(torch.int32)
    options = {"nseq": len(lengths), "constant_a": constant_a, "device": device_of(backend)}
    compare(linear_scan_inputs(1, sum(lengths), 9, **options), backend, reverse=reverse, cu_seqlens=offsets)


@backends
def test_pads_get_no_gradient(backend):
    device = device_of(backend)
    inputs = linear_scan_inputs(2, 20, 5, device=device)
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[:, 12:15] = False
    grads = run(linear_scan, inputs, cotangents(inputs), return_final_state=True, backend=backend, mask=mask)
    for name in ("da", "db"):
        assert (grads[name][:, 12:15] == 0).all(), name
        assert (grads[name][:, 11] != 0).any(), name


@pytest.mark.parametrize("backend", [b for b in available("linear_scan", reference=True) if b != "triton"])
@directions
@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["fp64", "complex128"])
def test_gradcheck(dtype, constant_a, reverse, backend):
    inputs = linear_scan_inputs(2, 6, 3, dtype=dtype, constant_a=constant_a, device=device_of(backend))
    resets, mask = torch.zeros(2, 2, 6, dtype=torch.bool, device=device_of(backend))
    resets[1, 3] = mask[0, 2] = True

    def call(*values):
        named = dict(zip(inputs, values, strict=True))
        return tuple(
            linear_scan(**named, resets=resets, mask=~mask, reverse=reverse, return_final_state=True, backend=backend)
        )

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


# Work cut over the length


SPLIT = {  # dtype, constant a, packed
    "fp32": (torch.float32, False, False),
    "constant a": (torch.float32, True, False),
    "complex, constant a": (torch.complex64, True, False),
    "bf16": (torch.bfloat16, True, False),
    "packed": (torch.float32, False, True),
}


@pytest.mark.skipif("cpu" not in available("linear_scan"), reason="the compiled library is not built")
@directions
@pytest.mark.parametrize(("dtype", "constant_a", "packed"), SPLIT.values(), ids=SPLIT)
def test_cpu_threads_share_the_length_of_few_channels(dtype, constant_a, packed, reverse):
    lengths = [700, 0, 3, 897] if packed else [1600]
    resets = torch.arange(1600).remainder(611).eq(300)[None]
    mask = torch.arange(1600).remainder(13).ne(5)[None]
    options = {"resets": resets, "mask": mask, "reverse": reverse}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    torch.set_num_threads(16)
    compare(linear_scan_inputs(1, 1600, 5, nseq=len(lengths), dtype=dtype, constant_a=constant_a), "cpu", **options)


@pytest.mark.skipif("triton" not in available("linear_scan"), reason="Triton cannot run here")
@directions
@pytest.mark.parametrize(("dtype", "constant_a", "packed"), SPLIT.values(), ids=SPLIT)
def test_triton_programs_share_the_length_of_few_channels(dtype, constant_a, packed, reverse, monkeypatch):
    from ssmkit.kernels import linear_scan as kernels

    monkeypatch.setattr(kernels, "MIN_SEGMENT", 16)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 8)
    device = device_of("triton")
    lengths = [40, 0, 3, 27] if packed else [70]
    b = torch.empty(1, 70, 5, dtype=dtype, device=device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0) if packed else None
    assert kernels.Plan(b, offsets).nsplits > 1
    options = {"cu_seqlens": offsets, "reverse": reverse, "resets": torch.arange(70, device=device).eq(31)[None]}
    inputs = linear_scan_inputs(1, 70, 5, nseq=len(lengths), dtype=dtype, constant_a=constant_a, device=device)
    compare(inputs, "triton", **options)


def test_length_is_split_only_where_it_pays():
    split_length = pytest.importorskip("ssmkit.kernels.linear_scan").split_length
    assert split_length(programs=1000, seqlen=1 << 20, processors=132) == 1
    assert split_length(programs=8, seqlen=64, processors=132) == 1
    assert split_length(programs=8, seqlen=4096, processors=132) == 32
    assert split_length(programs=400, seqlen=4096, processors=132) == 1
    assert split_length(programs=100, seqlen=1 << 20, processors=132) == 6


# Registration


def operands(backend, **options):
    """Arguments of the registered forward."""
    inputs = linear_scan_inputs(2, 9, 4, device=device_of(backend), **options)
    flags = torch.zeros(2, 9, dtype=torch.uint8, device=device_of(backend))
    return (inputs["a"], inputs["b"], inputs.get("initial_state"), flags, None)


@backends
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=["bf16", "complex64"])
def test_opcheck(dtype, constant_a, backend):
    tensors = operands(backend, dtype=dtype, constant_a=constant_a)
    torch.library.opcheck(linear_scan_fwd, (*tensors, False, True, backend))
    detached = [t if t is None else t.detach() for t in tensors]
    h, final_state, states = linear_scan_fwd(*detached, False, True, backend)
    a, _, *rest = detached
    kept = states if states.numel() else h
    args = (torch.ones_like(h), torch.ones_like(final_state), a, kept, *rest, False, backend)
    torch.library.opcheck(linear_scan_bwd, args)


@backends
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@kinds
def test_compile_fullgraph(constant_a, dynamic, backend):
    device = device_of(backend)

    def layer(**inputs):
        out = linear_scan(**inputs, return_final_state=True, backend=backend)
        return linear_scan(inputs["a"], out.h, reverse=True, backend=backend), out.final_state

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (9, 12):
        inputs = linear_scan_inputs(2, seqlen, 6, constant_a=constant_a, device=device)
        actual, expected = (run(f, inputs, cotangents(inputs)) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_export(backend):
    class Layer(torch.nn.Module):
        def forward(self, a, b):
            return linear_scan(a, b, backend=backend)

    length = torch.export.Dim("length", min=2, max=64)
    args, longer = (
        tuple(linear_scan_inputs(2, n, 4, device=device_of(backend), optional=(), requires_grad=False).values())
        for n in (9, 17)
    )
    program = torch.export.export(Layer(), args, dynamic_shapes=({1: length}, {1: length}))
    torch.testing.assert_close(program.module()(*longer), Layer()(*longer))


# Layouts, sizes, bits


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["fp32", "complex64"])
def test_views_and_lazy_conjugates(dtype, backend):
    plain = linear_scan_inputs(2, 12, 6, dtype=dtype, device=device_of(backend))
    wide = torch.cat([plain["a"].detach(), plain["b"].detach()], dim=-1)
    a, b = wide.split(6, dim=-1)
    views = {
        "slices of a projection": {"a": a, "b": b},
        "batch in the middle": {k: plain[k].detach().transpose(0, 1).contiguous().transpose(0, 1) for k in "ab"},
        "channels first": {k: plain[k].detach().transpose(1, 2).contiguous().transpose(1, 2) for k in "ab"},
        "conjugated twice": {k: plain[k].detach().conj().resolve_conj().conj() for k in "ab"},
    }
    expected = run(linear_scan, plain, cotangents(plain), return_final_state=True, backend=backend)
    for label, changed in views.items():
        strided = plain | {k: v.requires_grad_() for k, v in changed.items()}
        actual = run(linear_scan, strided, cotangents(plain), return_final_state=True, backend=backend)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), f"{label}: {name}"


@backends
def test_a_repeated_row_is_not_copied_out(backend):
    constant = linear_scan_inputs(2, 12, 6, constant_a=True, device=device_of(backend))
    repeated = constant | {"a": constant["a"].detach().expand(2, 12, 6).requires_grad_()}
    expected, actual = (
        run(linear_scan, each, cotangents(each), return_final_state=True, backend=backend)
        for each in (constant, repeated)
    )
    assert torch.equal(actual["h"], expected["h"])
    torch.testing.assert_close(actual["da"].sum((0, 1)), expected["da"])


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=["no batch", "no tokens", "no channels"])
@kinds
def test_empty(constant_a, shape, backend):
    inputs = linear_scan_inputs(*shape, constant_a=constant_a, device=device_of(backend))
    out = run(linear_scan, inputs, cotangents(inputs), return_final_state=True, backend=backend)
    assert out["h"].shape == shape
    last = inputs["initial_state"].detach() if shape[1] == 0 else out["final_state"]
    torch.testing.assert_close(out["final_state"], last)
    assert all(out[f"d{name}"].shape == inputs[name].shape for name in inputs)
    if shape[1] == 0:
        torch.testing.assert_close(out["dinitial_state"].cpu(), cotangents(inputs)["final_state"])
    if constant_a:
        assert (out["da"] == 0).all()


@backends
@kinds
def test_backward_gives_the_same_bits_twice(constant_a, backend):
    inputs = linear_scan_inputs(2, 50, 40, constant_a=constant_a, device=device_of(backend))
    once, twice = (
        run(linear_scan, inputs, cotangents(inputs), return_final_state=True, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(once[name], twice[name]) for name in once)


@backends
def test_states_are_kept_where_a_sum_over_tokens_needs_them(backend):
    for dtype, constant_a, save, kept in (
        (torch.bfloat16, True, True, True),
        (torch.bfloat16, True, False, False),
        (torch.bfloat16, False, True, False),
        (torch.float32, True, True, False),
    ):
        tensors = operands(backend, dtype=dtype, constant_a=constant_a, requires_grad=False)
        *_, states = linear_scan_fwd(*tensors, False, save, backend)
        assert (states.numel() > 0) == kept


# Refusals


def good():
    return linear_scan_inputs(2, 6, 4, requires_grad=False)


BAD = {
    "b not three axes": ({"b": torch.zeros(2, 6)}, r"b must have shape \(batch, seqlen, dim\), got \(2, 6\)"),
    "b of integers": ({"b": torch.zeros(2, 6, 4, dtype=torch.int64)}, "b must be of dtype float32"),
    "a too short": ({"a": torch.zeros(2, 5, 4)}, r"a must have shape \(2, 6, 4\).*got \(2, 5, 4\)"),
    "a of two axes": ({"a": torch.zeros(6, 4)}, r"a must have shape \(batch, seqlen, dim\) or \(dim,\), got \(6, 4\)"),
    "a constant of another width": ({"a": torch.zeros(5)}, r"a must have shape \(4,\) \(dim\), got \(5,\)"),
    "a of another dtype": ({"a": torch.zeros(2, 6, 4).half()}, "a must be of dtype float32 like b, got float16"),
    "a wider than the state": (
        {"a": torch.zeros(4).double()},
        "a must be of dtype .* because b is float32, got float64",
    ),
    "a complex, b real": ({"a": torch.zeros(4).cfloat()}, "a must be of dtype .* because b is float32, got complex64"),
    "a real, b complex": ({"b": torch.zeros(2, 6, 4).cfloat()}, "a must be of dtype complex64 like b, got float32"),
    "initial state of another batch": ({"initial_state": torch.zeros(3, 4)}, r"initial_state must have shape \(2, 4\)"),
    "initial state of integers": (
        {"initial_state": torch.zeros(2, 4, dtype=torch.int32)},
        "initial_state must be of dtype .* got int32",
    ),
    "resets of floats": ({"resets": torch.zeros(2, 6)}, "resets must be of dtype bool"),
    "mask too short": ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must have shape \(2, 6\)"),
    "another device": ({"a": torch.zeros(4, device="meta")}, "a must be on cpu like b, got meta"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 6])}, "b must have batch 1, got 2"),
    "unknown backend": ({"backend": "cudnn"}, "backend must be one of auto, reference, cuda, triton, cpu; got 'cudnn'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(**(good() | change))


@pytest.mark.parametrize(("offsets", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_bad_offsets(offsets, message):
    inputs = linear_scan_inputs(1, 6, 4, optional=(), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        linear_scan(**inputs, cu_seqlens=torch.tensor(offsets, dtype=torch.int64))


def test_a_backend_asked_for_by_name_never_falls_back():
    elsewhere = {k: v.to("meta") for k, v in good().items()}
    for row in BACKENDS:
        with pytest.raises(NotImplementedError, match=f"asked for '{row.name}'.*{row.name}: "):
            linear_scan(**elsewhere, backend=row.name)
