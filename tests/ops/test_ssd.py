"""ssd: every backend against the float64 recurrence, outputs and gradients; what is registered, layouts, refusals."""

import math

import pytest
import torch
from ssd_cases import check, compare, cotangents, products_in

from ssmkit.ops.ssd import BACKENDS, chunk_for, ssd, ssd_bwd, ssd_fwd
from ssmkit.testing import available, device_of, run, ssd_inputs, to_double

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
