"""ssd: every backend against the float64 recurrence, the two references against each other, the official numbers."""

import math

import pytest
import torch
from golden_cases import load, names

from ssmkit import native
from ssmkit.ops._ssd_reference import ssd_quadratic, ssd_ref
from ssmkit.ops.ssd import BACKENDS, chunk_for, ssd, ssd_bwd, ssd_fwd
from ssmkit.testing import CANCELLATION, assert_close, available, device_of, run, ssd_inputs, to_double

SHAPES = {  # batch, seqlen, nheads, headdim, dstate
    "one short of a chunk": (2, 63, 2, 8, 16),
    "one past a chunk": (1, 65, 4, 33, 7),
    "odd everything": (3, 37, 3, 7, 5),
    "three chunks, more states than a tile": (1, 130, 2, 20, 70),
    "Mamba-2's head": (1, 70, 2, 64, 128),
    "more channels than a tile": (1, 20, 1, 80, 3),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
PER_TOKEN = ("x", "dt", "B", "C", "z")
backends = pytest.mark.parametrize("backend", available("ssd"))
every_backend = pytest.mark.parametrize("backend", available("ssd", reference=True))


def cotangents(inputs, *, nseq=None, bidirectional=False, seed=1):
    """Weights of y and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, nheads, headdim = inputs["x"].shape
    state = (batch if nseq is None else nseq, nheads, headdim, inputs["B"].shape[3])
    dy = torch.randn(inputs["x"].shape, generator=generator).to(inputs["x"].dtype)
    return {"y": dy, "final_state": torch.randn((2,) * bidirectional + state, generator=generator)}


def products_in(dtype, backend):
    """Whether a backend's matrix products take their operands in this half precision: tl.dot does, and AVX-512's in bf16."""
    if backend == "triton":
        return dtype.itemsize == 2
    return backend == "cpu" and dtype == torch.bfloat16 and native.library().cpu_capability() == "avx512_bf16"


def check(name, actual, expected, dtype, backend):
    """One result within the bounds of its arithmetic."""
    slack = 1.0
    if name in ("dA", "dD", "ddt_bias"):
        # A few sums over all tokens, whose terms cancel: the rounding of the terms is large beside the result.
        slack = CANCELLATION
    if dtype == torch.float64:
        # The exponent of a decay is a sum over its chunk, in fp64 too: its rounding is amplified by its size, some 20.
        slack = max(slack, 4.0)
    if products_in(dtype, backend):
        # Operands are rounded to the dtype of x, so that states and sums in fp32 carry its rounding too.
        actual = actual.to(dtype)
        if backend == "triton":
            # Each product's operands anew, states and gradients several times.
            slack = max(slack, 4.0)
    assert_close(name, actual, expected, slack=slack)


def compare(inputs, backend, *, nseq=None, chunk=None, **options):
    """One backend against the recurrence in float64, outputs and all gradients."""
    weights = cotangents(inputs, nseq=nseq, bidirectional=options.get("bidirectional", False))
    options["return_final_state"] = True
    actual = run(ssd, inputs, weights, backend=backend, chunk=chunk, **options)
    expected = run(ssd, to_double(inputs), weights, backend="reference", **options)
    assert actual.keys() == expected.keys()
    for name in actual:
        check(name, actual[name], expected[name], inputs["x"].dtype, backend)


@backends
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, backend):
    compare(ssd_inputs(*shape, dtype=dtype, device=device_of(backend)), backend)


@backends
def test_one_token_of_one_number(backend):
    # seed 3: dt's two gradients do not cancel
    compare(ssd_inputs(1, 1, 1, 1, 1, device=device_of(backend), seed=3), backend)


TOKENS = torch.arange(70)
RESETS = TOKENS.remainder(9).eq(3).expand(2, 70)
PADS = TOKENS.remainder(5).ne(2).expand(2, 70)
OPTIONS = {
    "bare": ({"optional": ()}, {}),
    "gate alone": ({"optional": ("z",)}, {}),
    "groups": ({"ngroups": 2}, {}),
    "a group per head": ({"ngroups": 4}, {}),
    "dt_limit": ({}, {"dt_limit": (0.05, 0.1)}),
    "reverse": ({}, {"reverse": True}),
    "resets": ({}, {"resets": RESETS}),
    "pads": ({}, {"mask": PADS}),
    "pads and resets, reversed": ({"ngroups": 2}, {"mask": PADS, "resets": RESETS, "reverse": True}),
    "bidirectional": ({"walks": 2}, {"bidirectional": True}),
    "bidirectional, pads, resets": (
        {"walks": 2, "ngroups": 2},
        {"bidirectional": True, "mask": PADS, "resets": RESETS},
    ),
    "chunks of one": ({}, {"chunk": 1}),
    "chunks of 17": ({}, {"chunk": 17, "resets": RESETS}),
    "a chunk longer than the sequence": ({}, {"chunk": 1000, "resets": RESETS}),
}


@backends
@pytest.mark.parametrize(("made", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(made, options, backend):
    device = device_of(backend)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    compare(ssd_inputs(2, 70, 4, 9, 6, device=device, **made), backend, **options)


@backends
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"bidirectional": True}], ids=str)
def test_packed_sequences(options, backend):
    lengths = [64, 0, 1, 65, 20]
    offsets = torch.tensor([0, *lengths], device=device_of(backend)).cumsum(0).to(torch.int32)
    walks = 2 if options.get("bidirectional") else 1
    inputs = ssd_inputs(1, sum(lengths), 4, 9, 6, ngroups=2, nseq=5, walks=walks, device=device_of(backend))
    compare(inputs, backend, nseq=5, cu_seqlens=offsets, **options)


@backends
def test_bidirectional_in_half_precision(backend):
    inputs = ssd_inputs(1, 70, 2, 9, 6, walks=2, dtype=torch.bfloat16, device=device_of(backend))
    compare(inputs, backend, bidirectional=True)


@backends
def test_without_softplus(backend):
    inputs = ssd_inputs(2, 37, 3, 9, 4, device=device_of(backend))
    inputs["dt"] = inputs["dt"].detach().exp().mul(0.1).requires_grad_()
    inputs["dt_bias"] = inputs["dt_bias"].detach().abs().mul(0.01).requires_grad_()
    compare(inputs | {"dt_softplus": False}, backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1e4, 1e-5], ids=["strong", "vanishing"])
def test_extreme_decays(scale, dtype, backend):
    inputs = ssd_inputs(1, 150, 2, 9, 6, dtype=dtype, device=device_of(backend))
    inputs["A"] = (inputs["A"].detach() * scale).requires_grad_()
    weights = cotangents(inputs)
    actual = run(ssd, inputs, weights, return_final_state=True, backend=backend)
    expected = run(ssd, to_double(inputs), weights, return_final_state=True, backend="reference")
    for name in actual:
        if scale > 1 and name in ("dA", "dinitial_state"):
            # Made of what is left of decays of e^-20 and less: the rounding of dt counts as often as the exponent is
            # large, and below 1e-30 numbers are lost altogether.
            bound = torch.finfo(dtype).eps if products_in(dtype, backend) else 1e-4
            error = (actual[name].cpu() - expected[name].cpu()).abs().max()
            assert error <= bound * expected[name].abs().max() + 1e-30, f"{name}: {error:.3g}"
        else:
            check(name, actual[name], expected[name], dtype, backend)


@backends
def test_step_sizes_that_decay_by_e_to_the_million(backend):
    inputs = ssd_inputs(1, 70, 2, 9, 6, device=device_of(backend), optional=("initial_state",))
    inputs["dt"] = inputs["dt"].detach().abs().mul(1e6).requires_grad_()
    compare(inputs | {"dt_softplus": False}, backend)


@every_backend
@pytest.mark.parametrize("softplus", [True, False])
def test_a_nan_in_dt_is_not_hidden(softplus, backend):
    inputs = ssd_inputs(2, 40, 2, 9, 6, device=device_of(backend), requires_grad=False) | {"dt_softplus": softplus}
    inputs["dt"][0, 20, 1] = math.nan
    y, final_state = ssd(**inputs, return_final_state=True, backend=backend, dt_limit=(0.0, 1.0))
    assert y[0, 20:, 1].isnan().all() and final_state[0, 1].isnan().all()
    assert y[0, :, 0].isfinite().all() and y[1].isfinite().all() and final_state[1].isfinite().all()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_reset_hides_the_past_to_the_last_bit(dtype, backend):
    device = device_of(backend)
    inputs = ssd_inputs(1, 90, 2, 9, 6, dtype=dtype, device=device, requires_grad=False)
    resets = torch.zeros(1, 90, dtype=torch.bool, device=device)
    resets[:, 70] = True
    huge = inputs | {name: inputs[name].clone() for name in ("x", "initial_state")}
    huge["x"][:, :70] *= 1e25
    huge["initial_state"] *= 1e25
    for options in ({}, {"chunk": 16}):
        plain, hidden = (
            ssd(**given, resets=resets, return_final_state=True, backend=backend, **options) for given in (inputs, huge)
        )
        assert torch.equal(plain.y[:, 70:], hidden.y[:, 70:])
        assert torch.equal(plain.final_state, hidden.final_state)


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"resets": torch.arange(300).remainder(70).eq(69).expand(1, 300)}], ids=len)
@pytest.mark.skipif("cpu" not in available("ssd"), reason="the compiled library is not built")
def test_heads_fewer_than_threads(options, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for nheads in (1, 5):
            compare(ssd_inputs(1, 300, nheads, 9, 6), "cpu", **options)
    finally:
        torch.set_num_threads(before)


# The two references


REFERENCES = {
    "plain": {},
    "reverse": {"reverse": True},
    "bidirectional": {"bidirectional": True},
    "resets": {"resets": torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) < 0.3},
    "pads": {"mask": torch.rand(2, 19, generator=torch.Generator().manual_seed(1)) < 0.7},
    "one token": {"tokens": 1},
    "limits": {"dt_min": 0.1, "dt_max": 0.3},
    "strong decay": {"rate": 1e5},
}


@pytest.mark.parametrize("options", REFERENCES.values(), ids=REFERENCES)
def test_the_quadratic_form_is_the_recurrence(options):
    seqlen, rate = options.get("tokens", 19), options.get("rate", 1.0)
    walks = 2 if options.get("bidirectional") else 1
    inputs = ssd_inputs(2, seqlen, 4, 3, 5, ngroups=2, walks=walks, dtype=torch.float64)
    inputs["A"] = (inputs["A"].detach() * rate).requires_grad_()
    leaves = [inputs[name] for name in ("x", "dt", "A", "B", "C", "z", "dt_bias", "initial_state")]
    x, dt, A, B, C, z, bias, initial = leaves
    D = inputs["D"].detach()[:, None].expand(4, 3)
    args = (
        x, dt, A, B, C, D, z, bias, initial, options.get("resets"), options.get("mask"), None, True,
        options.get("dt_min", 0.0), options.get("dt_max", math.inf), options.get("reverse", False), walks == 2,
    )  # fmt: skip
    outputs = [form(*args) for form in (ssd_ref, ssd_quadratic)]
    grads = [torch.autograd.grad(y.square().sum() + h.sin().sum(), leaves) for y, h in outputs]
    for recurrent, quadratic in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(quadratic, recurrent, rtol=1e-11, atol=1e-12 * recurrent.abs().max().item())


# The official implementation


OURS = {"initial_states": "initial_state", "out": "y", "final_states": "final_state"}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [name for name in names("ssd_*") if "minimal" not in name])
def test_official_numbers(name, dtype, backend):
    case, device = load(name), device_of(backend)
    inputs = {OURS.get(k, k): v.to(device) for k, v in case.inputs.items()}
    sequence = inputs.pop("seq_idx", None)
    inputs = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    low, high = case.meta["args"]["dt_limit"]
    options = {"dt_softplus": case.meta["args"]["dt_softplus"], "dt_limit": (low, math.inf if high is None else high)}
    if sequence is not None:
        options["resets"] = sequence != torch.cat([sequence[:, :1], sequence[:, :-1]], dim=1)
    with_state = "final_states" in case.outputs
    weights = {OURS[k]: v for k, v in case.cotangents.items()}
    if with_state:
        weights.setdefault("final_state", torch.zeros_like(case.outputs["final_states"]))
    expected = {OURS[k]: v for k, v in case.outputs.items()}
    for key, value in case.gradients.items():
        name = key.removeprefix("in.")
        expected[f"d{OURS.get(name, name)}"] = value

    options |= {"return_final_state": with_state, "chunk": case.meta["args"]["chunk_size"]}
    actual = run(ssd, inputs, weights, backend=backend, **options)
    assert actual.keys() == expected.keys()
    for key in actual:
        if dtype == torch.float64:
            worst = (actual[key].cpu() - expected[key]).abs().max() / expected[key].abs().max()
            assert worst <= 1e-10, f"{key}: {worst:.3g}"
        else:
            check(key, actual[key], expected[key], dtype, backend)


@every_backend
@pytest.mark.parametrize("name", names("ssd_minimal*"))
def test_official_minimal_form(name, backend):
    case, device = load(name), device_of(backend)
    X, log_decay, B, C = (case.inputs[k].to(device).double().requires_grad_() for k in ("X", "A", "B", "C"))
    initial = case.inputs.get("initial_states")
    inputs = {"X": X, "A": log_decay, "B": B, "C": C}
    if initial is not None:
        inputs["initial_states"] = initial.to(device).double().requires_grad_()

    def minimal(X, A, B, C, initial_states=None):
        """Its X is our dt x, its A our dt A."""
        one = torch.full(A.shape[2:], -1.0, dtype=A.dtype, device=A.device)
        state = None if initial_states is None else initial_states[:, 0]
        out = ssd(X / -A[..., None], -A, one, B, C, initial_state=state, return_final_state=True, backend=backend)
        return tuple(out)

    weights = {"Y": case.cotangents["Y"], "final_state": case.cotangents["final_state"]}
    actual = run(minimal, inputs, weights)
    expected = case.outputs | {f"d{k.removeprefix('in.')}": v for k, v in case.gradients.items()}
    assert actual.keys() == expected.keys()
    for key in actual:
        worst = (actual[key].cpu() - expected[key]).abs().max() / expected[key].abs().max()
        assert worst <= 1e-10, f"{key}: {worst:.3g}"


@backends
def test_pads_get_no_gradient(backend):
    inputs = ssd_inputs(2, 20, 2, 5, 3, device=device_of(backend))
    mask = torch.ones(2, 20, dtype=torch.bool, device=device_of(backend))
    mask[:, 12:15] = False
    grads = run(ssd, inputs, cotangents(inputs), return_final_state=True, backend=backend, mask=mask)
    for name in PER_TOKEN:
        assert (grads[f"d{name}"][:, 12:15] == 0).all(), name
        assert (grads[f"d{name}"][:, 11] != 0).any(), name


# Registration


def op_arguments(inputs, backend, *, bidirectional=False):
    """The registered op's tensors and options."""
    wide = inputs["D"].detach()[:, None].expand(*inputs["x"].shape[2:]).contiguous()
    D = wide.requires_grad_(inputs["D"].requires_grad)
    flags = torch.zeros(inputs["x"].shape[:2], dtype=torch.uint8, device=inputs["x"].device)
    tensors = [inputs[n] for n in ("x", "dt", "A", "B", "C")] + [D] + [inputs[n] for n in OPTIONAL[1:]]
    options = (True, 0.0, math.inf, False, bidirectional, chunk_for(backend, torch.float32, None))
    return [*tensors, flags, None], options


@backends
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
def test_opcheck(bidirectional, backend):
    inputs = ssd_inputs(2, 9, 2, 3, 4, walks=1 + bidirectional, device=device_of(backend))
    tensors, options = op_arguments(inputs, backend, bidirectional=bidirectional)
    torch.library.opcheck(ssd_fwd, (*tensors, *options, True, backend))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in tensors]
    y, final_state, checkpoints, ungated = ssd_fwd(*detached, *options, True, backend)
    grads = (torch.ones_like(y), torch.ones_like(final_state))
    torch.library.opcheck(ssd_bwd, (*grads, *detached, checkpoints, ungated, *options, backend))


@backends
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic, backend):
    def layer(**inputs):
        out = ssd(**inputs, return_final_state=True, backend=backend)
        return out.y + 1, out.final_state

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (19, 23):
        inputs = ssd_inputs(2, seqlen, 2, 6, 4, device=device_of(backend))
        actual, expected = (run(f, inputs, cotangents(inputs)) for f in (compiled, layer))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@backends
def test_export(backend):
    class Layer(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return ssd(x, dt, A, B, C, dt_softplus=True, bidirectional=True, backend=backend)

    def args(seqlen):
        inputs = ssd_inputs(2, seqlen, 2, 4, 3, device=device_of(backend), optional=(), requires_grad=False)
        return tuple(inputs[name] for name in ("x", "dt", "A", "B", "C"))

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        Layer(), args(9), dynamic_shapes=({1: length}, {1: length}, {}, {1: length}, {1: length})
    )
    torch.testing.assert_close(program.module()(*args(17)), Layer()(*args(17)))


# Layouts, sizes, bits


@backends
def test_views_of_a_wider_projection(backend):
    plain = ssd_inputs(2, 20, 2, 6, 4, device=device_of(backend))
    wide = torch.cat([plain[name].detach().flatten(2) for name in ("z", "x", "B", "C", "dt")], dim=-1)
    z, x, B, C, dt = wide.split((12, 12, 4, 4, 2), dim=-1)
    views = {"x": x.unflatten(-1, (2, 6)), "z": z.unflatten(-1, (2, 6)), "dt": dt}
    views |= {"B": B.unflatten(-1, (1, 4)), "C": C.unflatten(-1, (1, 4))}
    strided = plain | {name: view.requires_grad_() for name, view in views.items()}
    transposed = plain | {name: plain[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
                          for name in views}  # fmt: skip
    expected = run(ssd, plain, cotangents(plain), return_final_state=True, backend=backend)
    for other in (strided, transposed):
        actual = run(ssd, other, cotangents(plain), return_final_state=True, backend=backend)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


@backends
def test_skip_weights_per_channel(backend):
    inputs = ssd_inputs(2, 20, 2, 6, 4, device=device_of(backend))
    per_channel = inputs | {"D": inputs["D"].detach()[:, None].expand(2, 6).contiguous().requires_grad_()}
    once, wide = (run(ssd, given, cotangents(inputs), return_final_state=True, backend=backend)
                  for given in (inputs, per_channel))  # fmt: skip
    assert torch.equal(once["y"], wide["y"])
    torch.testing.assert_close(wide["dD"].sum(1), once["dD"])


@every_backend
@pytest.mark.parametrize("walks", [1, 2])
@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 3, 4), (2, 0, 2, 3, 4), (2, 5, 0, 3, 4)], ids=["no batch", "no tokens", "no heads"]
)
def test_empty(shape, walks, backend):
    inputs = ssd_inputs(*shape, walks=walks, device=device_of(backend))
    weights = cotangents(inputs, bidirectional=walks == 2)
    out = run(ssd, inputs, weights, return_final_state=True, bidirectional=walks == 2, backend=backend)
    assert out["y"].shape == shape[:4]
    torch.testing.assert_close(out["final_state"], inputs["initial_state"].detach())
    torch.testing.assert_close(out["dinitial_state"].cpu(), weights["final_state"])
    assert all(out[f"d{name}"].shape == inputs[name].shape for name in ("x", "dt", "A", "B", "C", "D"))
    assert all((out[f"d{name}"] == 0).all() for name in ("A", "B", "C", "D"))


@backends
def test_backward_gives_the_same_bits_twice(backend):
    inputs = ssd_inputs(2, 150, 4, 16, 20, ngroups=2, device=device_of(backend))
    once, twice = (run(ssd, inputs, cotangents(inputs), return_final_state=True, backend=backend) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@backends
def test_nothing_is_kept_without_gradients(backend):
    inputs = ssd_inputs(1, 130, 2, 4, 3, device=device_of(backend), requires_grad=False)
    tensors, options = op_arguments(inputs, backend)
    *_, checkpoints, ungated = ssd_fwd(*tensors, *options, False, backend)
    assert checkpoints.numel() == ungated.numel() == 0


# Refusals


def good():
    return ssd_inputs(2, 6, 4, 3, 5, ngroups=2, requires_grad=False)


BAD = {
    "x of three axes": ({"x": torch.zeros(2, 6, 4)}, r"x must have shape \(batch, seqlen, nheads, headdim\), got"),
    "dt per channel": ({"dt": torch.zeros(2, 6, 4, 3)}, r"dt must have shape \(2, 6, 4\) \(batch, seqlen, nheads\)"),
    "A per channel": ({"A": torch.zeros(4, 3)}, r"A must have shape \(4,\) \(nheads\)"),
    "B without groups": ({"B": torch.zeros(2, 6, 5)}, r"B must have shape \(batch, seqlen, ngroups, dstate\)"),
    "groups that do not divide": (
        {"B": torch.zeros(2, 6, 3, 5), "C": torch.zeros(2, 6, 3, 5)}, "B has 3 groups, which must divide nheads 4"),
    "C unlike B": ({"C": torch.zeros(2, 6, 2, 4)}, r"C must have shape \(2, 6, 2, 5\)"),
    "D of another width": ({"D": torch.zeros(4, 2)}, r"D must have shape \(4, 3\)"),
    "D wider than x": ({"D": torch.zeros(4).double()}, "D must be of dtype .* got float64"),
    "z of another dtype": ({"z": torch.zeros(2, 6, 4, 3).half()}, "z must be of dtype float32 like x, got float16"),
    "initial state transposed": ({"initial_state": torch.zeros(2, 4, 5, 3)}, r"initial_state must have shape \(2, 4, 3, 5\)"),
    "one state for two walks": ({"bidirectional": True}, r"initial_state must have shape \(2, 2, 4, 3, 5\) \(walks, "),
    "both ways and reverse": ({"bidirectional": True, "reverse": True, "initial_state": None}, "either reverse or"),
    "limits upside down": ({"dt_limit": (1.0, 0.5)}, r"dt_limit must be \(low, high\) with low <= high"),
    "no chunk": ({"chunk": 0}, "chunk must be a positive number of tokens, got 0"),
    "resets of floats": ({"resets": torch.zeros(2, 6)}, "resets must be of dtype bool"),
    "offsets of a batch": ({"cu_seqlens": torch.tensor([0, 6]), "initial_state": None}, "x must have batch 1, got 2"),
    "another device": ({"D": torch.zeros(4, device="meta")}, "D must be on cpu like x, got meta"),
    "unknown backend": ({"backend": "cudnn"}, "backend must be one of auto, reference, cuda, triton, cpu; got 'cudnn'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**(good() | change))


@pytest.mark.skipif(len(available("ssd")) == len(BACKENDS), reason="every backend runs here")
def test_a_backend_asked_for_by_name_never_falls_back():
    name = next(row.name for row in BACKENDS if row.name not in available("ssd"))
    with pytest.raises(NotImplementedError, match=f"asked for '{name}'.*{name}: "):
        ssd(**good(), backend=name)
