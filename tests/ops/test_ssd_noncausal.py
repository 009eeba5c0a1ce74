"""ssd_noncausal: each backend against the float64 reference, the laws of a sum without an order, the official numbers."""

from functools import partial

import pytest
import torch
from golden_cases import load, names

from ssmkit.ops.ssd_noncausal import BACKENDS, ssd_noncausal, ssd_noncausal_bwd, ssd_noncausal_fwd, ssd_noncausal_ref
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, run, ssd_noncausal_inputs, to_double

SHAPES = {  # batch, seqlen, nheads, headdim, dstate
    "smallest": (1, 1, 1, 1, 1),
    "one past a chunk": (2, 65, 2, 33, 7),
    "more than a span, more states than a tile": (1, 270, 3, 12, 70),
    "VSSD's head": (1, 49, 2, 64, 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
backends = pytest.mark.parametrize("backend", available("ssd_noncausal"))
every_backend = pytest.mark.parametrize("backend", available("ssd_noncausal", reference=True))


def cotangents(inputs, nseq=None):
    """Weights of y and of the state."""
    generator = torch.Generator().manual_seed(1)
    batch, _, *head = inputs["x"].shape
    dy = torch.randn(inputs["x"].shape, generator=generator).to(inputs["x"].dtype)
    state = torch.randn(batch if nseq is None else nseq, *head, inputs["B"].shape[3], generator=generator)
    return {"y": dy, "state": state}


def check(name, actual, expected, dtype, backend, ddt=None):
    """One result within the bounds of its arithmetic."""
    slack = 1.0
    if name in ("dA", "dD", "ddt_bias"):
        # A few sums over all tokens, whose terms cancel: the rounding of the terms is large beside the result.
        slack = CANCELLATION
    if name == "ddt_bias" and ddt is not None:
        # The sums of ddt: the few of them that come may cancel to a hundredth of their terms, which are known here.
        terms = ddt.abs().sum((0, 1))
        slack = max(slack, float(terms.norm() / expected.norm()))
    if backend == "triton" and dtype.itemsize == 2:
        # tl.dot takes its operands in the dtype of x, so that states and gradients carry its rounding too, several times.
        actual, slack = actual.to(dtype), max(slack, 4.0)
    assert_close(name, actual, expected, slack=slack)


def compare(inputs, backend, nseq=None, **options):
    """One backend against the reference in float64, outputs and all gradients."""
    weights = cotangents(inputs, nseq)
    options["return_state"] = True
    actual = run(ssd_noncausal, inputs, weights, backend=backend, **options)
    expected = run(ssd_noncausal, to_double(inputs), weights, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        check(name, actual[name], expected[name], inputs["x"].dtype, backend, expected.get("ddt"))


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, backend):
    compare(ssd_noncausal_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


PADS = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.7
OPTIONS = {
    "bare": ({"optional": ()}, {}),
    "skip": ({"optional": ("D",)}, {}),
    "bias": ({"optional": ("dt_bias",)}, {}),
    "without softplus": ({}, {"dt_softplus": False}),
    "groups": ({"ngroups": 3}, {}),
    "interleaved groups": ({"ngroups": 3}, {"interleaved_groups": True}),
    "pads": ({"ngroups": 2}, {"mask": PADS}),
}


@backends
@pytest.mark.parametrize(("made", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(made, options, backend):
    device = device_of(backend)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    inputs = ssd_noncausal_inputs(2, 40, 6, 9, 6, device=device, **made)
    compare({k: v for k, v in inputs.items() if k not in options}, backend, **options)


@backends
def test_skip_per_channel(backend):
    inputs = ssd_noncausal_inputs(2, 17, 3, 9, 6, device=device_of(backend))
    inputs["D"] = torch.randn(3, 9, generator=torch.Generator().manual_seed(2)).to(device_of(backend)).requires_grad_()
    compare(inputs, backend)


@backends
def test_packed_images(backend):
    lengths = [64, 0, 1, 265, 20]
    offsets = torch.tensor([0, *lengths], device=device_of(backend)).cumsum(0).to(torch.int32)
    inputs = ssd_noncausal_inputs(1, sum(lengths), 2, 9, 6, ngroups=2, device=device_of(backend))
    compare(inputs, backend, nseq=5, cu_seqlens=offsets)


@backends
def test_sums_beyond_the_range_of_half_precision(backend):
    """Nothing normalises the state: over an image of bright tokens fp16 would overflow."""
    inputs = ssd_noncausal_inputs(1, 200, 1, 5, 4, dtype=torch.float16, device=device_of(backend), requires_grad=False)
    inputs |= {"x": inputs["x"].abs() * 200, "B": inputs["B"].abs() * 200, "C": inputs["C"] * 1e-3}
    y, state = ssd_noncausal(**inputs, return_state=True, backend=backend)
    assert state.max() > torch.finfo(torch.float16).max
    check("y", y, ssd_noncausal(**to_double(inputs), backend="reference"), torch.float16, backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names("vssd_op*"))
def test_official_numbers(name, dtype, backend):
    case, device = load(name), device_of(backend)
    inputs = {k: v.to(device, dtype) for k, v in case.inputs.items()}
    groups = case.meta["args"]["ngroups"]
    inputs |= {k: inputs[k].unflatten(2, (groups, -1)) for k in "BC"}
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}

    def official(A, **tensors):
        # its sign is flipped unless asked otherwise
        A = A if case.meta["args"]["ssd_positve_dA"] else -A
        return ssd_noncausal(A=A, **tensors, interleaved_groups=True, backend=backend)

    actual = run(official, inputs, {"y": case.cotangents["y"]})
    expected = case.outputs | {f"d{k.removeprefix('in.')}": v for k, v in case.gradients.items()}
    assert actual.keys() == expected.keys()
    for key in actual:
        given = actual[key].view(expected[key].shape)
        if dtype == torch.float64:
            assert (given.cpu() - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max(), key
        else:
            check(key, given, expected[key], dtype, backend)


# Laws, in float64 so that they hold to rounding


def sums(inputs, backend, **options):
    return run(ssd_noncausal, inputs, cotangents(inputs), backend=backend, return_state=True, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


PER_TOKEN = ("x", "dt", "B", "C")


@every_backend
def test_the_order_of_tokens_does_not_matter(backend):
    device = device_of(backend)
    inputs = ssd_noncausal_inputs(2, 37, 2, 5, 3, dtype=torch.float64, device=device, requires_grad=False)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
    moved = inputs | {k: inputs[k][:, order] for k in PER_TOKEN}
    y, state = ssd_noncausal(**inputs, return_state=True, backend=backend)
    y_moved, state_moved = ssd_noncausal(**moved, return_state=True, backend=backend)
    close(y_moved, y[:, order])
    close(state_moved, state)


@every_backend
def test_pads_can_be_removed(backend):
    device = device_of(backend)
    inputs = ssd_noncausal_inputs(1, 37, 2, 5, 3, dtype=torch.float64, device=device)
    real = (torch.rand(1, 37, generator=torch.Generator().manual_seed(3)) < 0.6).to(device)
    whole = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for name in PER_TOKEN:
        whole[name][~real] = float("nan")
    whole = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
    few = {k: (v.detach()[:, real[0]] if k in PER_TOKEN else v.detach()).requires_grad_()
           for k, v in inputs.items() if isinstance(v, torch.Tensor)}  # fmt: skip
    few |= {"dt_softplus": True}
    weights = cotangents(inputs)
    actual = run(ssd_noncausal, whole, weights, mask=real, return_state=True, backend=backend)
    weights["y"] = weights["y"].to(device)[:, real[0]]
    expected = run(ssd_noncausal, few, weights, return_state=True, backend=backend)
    for name in actual:
        given = actual[name]
        if name == "y" or name.removeprefix("d") in PER_TOKEN:
            assert (given[~real] == 0).all(), name
            given = given[:, real[0]]
        close(given, expected[name])


@every_backend
def test_packed_equals_separate(backend):
    device = device_of(backend)
    inputs = ssd_noncausal_inputs(1, 40, 2, 5, 3, dtype=torch.float64, device=device, requires_grad=False)
    offsets = torch.tensor([0, 11, 11, 40], device=device)
    y, state = ssd_noncausal(**inputs, cu_seqlens=offsets, return_state=True, backend=backend)
    for place, (start, end) in enumerate(((0, 11), (11, 11), (11, 40))):
        alone = inputs | {k: inputs[k][:, start:end] for k in PER_TOKEN}
        y_alone, state_alone = ssd_noncausal(**alone, return_state=True, backend=backend)
        close(y[:, start:end], y_alone)
        close(state[place], state_alone[0])


@every_backend
def test_views_and_other_strides(backend):
    inputs = ssd_noncausal_inputs(2, 19, 4, 5, 6, ngroups=2, device=device_of(backend))
    parts = {k: inputs[k].detach().flatten(2) for k in ("x", "B", "C", "dt")}
    rows = torch.cat([*parts.values()], -1).split([part.shape[2] for part in parts.values()], -1)
    views = {k: row.unflatten(2, inputs[k].shape[2:]).requires_grad_() for k, row in zip(parts, rows, strict=True)}
    turned = {k: inputs[k].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for k in PER_TOKEN}
    expected = sums(inputs, backend)
    for other in (inputs | views, inputs | turned):
        actual = sums(other, backend)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("shape", [(0, 6, 2, 4, 3), (2, 0, 2, 4, 3), (2, 3, 2, 0, 4)], ids=str)
def test_empty(shape, backend):
    inputs = ssd_noncausal_inputs(*shape, device=device_of(backend))
    results = sums(inputs, backend)
    assert results["y"].shape == shape[:4]
    assert results["state"].shape == (shape[0], *shape[2:])
    assert (results["state"] == 0).all()
    assert (results["dA"] == 0).all()


@every_backend
def test_no_states_leave_the_skip(backend):
    inputs = ssd_noncausal_inputs(2, 5, 3, 4, 0, device=device_of(backend), optional=("D",))
    results = sums(inputs, backend)
    torch.testing.assert_close(results["y"], (inputs["D"][:, None] * inputs["x"]).detach())


@backends
def test_backward_gives_the_same_bits_twice(backend):
    inputs = ssd_noncausal_inputs(1, 300, 2, 5, 6, device=device_of(backend))
    first, second = sums(inputs, backend), sums(inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif("cpu" not in available("ssd_noncausal"), reason="the compiled library is not built")
def test_the_number_of_threads_changes_no_bit():
    inputs, before = ssd_noncausal_inputs(2, 300, 3, 20, 18, ngroups=3), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(sums(inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_the_reference(interleaved):
    inputs = ssd_noncausal_inputs(2, 3, 4, 2, 3, ngroups=2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    tensors += [torch.randn(4, 2, dtype=torch.float64, requires_grad=True), inputs["dt_bias"]]
    torch.autograd.gradcheck(lambda *t: ssd_noncausal_ref(*t, mask, None, True, interleaved), tensors)


@backends
def test_opcheck(backend):
    inputs = ssd_noncausal_inputs(1, 5, 4, 3, 2, ngroups=2, device=device_of(backend))
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    tensors += [inputs["D"].detach()[:, None].expand(4, 3).contiguous().requires_grad_(), inputs["dt_bias"]]
    offsets = torch.tensor([0, 2, 5], device=device_of(backend))
    torch.library.opcheck(ssd_noncausal_fwd, (*tensors, None, offsets, True, True, backend))
    plain = [t.detach() for t in tensors]
    state = ssd_noncausal_fwd(*plain, None, None, True, False, backend)[1]
    torch.library.opcheck(ssd_noncausal_bwd, (plain[0], state, *plain, None, None, state, True, False, backend))


@backends
def test_compile_fullgraph(backend):
    call = partial(ssd_noncausal, backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = ssd_noncausal_inputs(2, 6, 4, 3, 5, device=device_of(backend))
    weights = {"y": cotangents(inputs)["y"]}
    actual, expected = run(compiled, inputs, weights), run(call, inputs, weights)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


BAD = {
    "x without heads": ({"x": torch.zeros(2, 6, 12)}, r"x must have shape \(batch, seqlen, nheads, headdim\)"),
    "dt per channel": ({"dt": torch.zeros(2, 6, 4, 3)}, r"dt must have shape \(2, 6, 4\)"),
    "A per state": ({"A": torch.zeros(4, 5)}, r"A must have shape \(4,\)"),
    "B without groups": ({"B": torch.zeros(2, 6, 5)}, r"B must have shape \(batch, seqlen, ngroups, dstate\)"),
    "C in other groups": ({"C": torch.zeros(2, 6, 2, 5)}, r"C must have shape \(2, 6, 1, 5\)"),
    "groups that do not divide": ({k: torch.zeros(2, 6, 3, 5) for k in "BC"}, "B has 3 groups, which must divide nheads"),
    "B of another dtype": ({"B": torch.zeros(2, 6, 1, 5).half()}, "B must be of dtype float32 like x"),
    "D of another shape": ({"D": torch.zeros(4, 5)}, r"D must have shape \(4, 3\)"),
    "a bias too wide": ({"dt_bias": torch.zeros(4).double()}, "dt_bias must be of dtype .* because x is float32"),
    "a mask of numbers": ({"mask": torch.ones(2, 6)}, "mask must be of dtype bool"),
    "packed rows": ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens packs sequences into one row"),
    "another device": ({"A": torch.zeros(4, device="meta")}, "A must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "simd"}, "backend must be one of auto, reference, cuda, triton, cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ssd_noncausal(**(ssd_noncausal_inputs(2, 6, 4, 3, 5, requires_grad=False) | change))


def test_a_backend_asked_for_by_name_never_falls_back():
    inputs = ssd_noncausal_inputs(1, 1, 1, 1, 1)
    elsewhere = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for row in BACKENDS:
        with pytest.raises(
            NotImplementedError, match=f"asked for '{row.name}'.*{row.name}: needs a {row.device} tensor"
        ):
            ssd_noncausal(**elsewhere, backend=row.name)
