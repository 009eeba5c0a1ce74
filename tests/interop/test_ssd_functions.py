"""The functions around mamba_chunk_scan_combined and their stages: what is built of them, cut and packed."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssmkit.interop import layout
from ssmkit.interop.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
from ssmkit.interop.mamba_ssm.modules.ssd_minimal import segsum, ssd_minimal_discrete
from ssmkit.interop.mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan, chunk_scan_ref
from ssmkit.interop.mamba_ssm.ops.triton.ssd_chunk_state import (
    _chunk_cumsum_fwd,
    _chunk_state_fwd,
    chunk_state,
    chunk_state_ref,
    chunk_state_varlen,
)
from ssmkit.interop.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    mamba_conv1d_scan_ref,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
    ssd_selective_scan,
)
from ssmkit.interop.mamba_ssm.ops.triton.ssd_state_passing import (
    _state_passing_fwd,
    state_passing,
    state_passing_ref,
)
from ssmkit.testing import assert_close, run, to_double


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def ssd_arguments(batch=1, seqlen=11, dtype=torch.float64):
    return {
        "x": normal(batch, seqlen, 4, 5, dtype=dtype),
        "dt": normal(batch, seqlen, 4, seed=1, dtype=dtype).abs(),
        "A": -normal(4, seed=2, dtype=dtype).exp(),
        "B": normal(batch, seqlen, 2, 3, seed=3, dtype=dtype),
        "C": normal(batch, seqlen, 2, 3, seed=4, dtype=dtype),
    }


def test_compiled_states_of_packed_sequences():
    """Nothing is read of the offsets, whether they end with the row or before it."""

    def states_of(args, **walk):
        return mamba_chunk_scan_combined(**args, **walk, chunk_size=4, return_varlen_states=True)

    args, compiled = ssd_arguments(), torch.compile(states_of, fullgraph=True, backend="aot_eager")
    for last, end in ((1, 11), (-1, 8)):
        walk = {"seq_idx": torch.tensor([[0] * 4 + [1] * 4 + [last] * 3]), "cu_seqlens": torch.tensor([0, 4, end])}
        for actual, expected in zip(compiled(args, **walk), states_of(args, **walk), strict=True):
            assert_close("compiled", actual, expected)


def test_offsets_on_a_gpu_are_read_once(monkeypatch):
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    read, last_read = [], layout._early_end
    monkeypatch.setattr(layout, "_early_end", lambda *args: read.append(args) or last_read(*args))
    numbers, offsets = (torch.tensor(t).as_subclass(Elsewhere) for t in ([[0, 0, 1, -1]], [0, 2, 3]))
    assert [layout.early_end(offsets, numbers, 4) for _ in range(3)] == [3] * 3 and len(read) == 1
    offsets[-1] = 4
    assert [layout.early_end(offsets, numbers, 4) for _ in range(2)] == [None] * 2 and len(read) == 2
    assert layout.early_end(offsets, numbers.clone(), 4) is None and len(read) == 3


def test_states_of_packed_sequences():
    """Varlen states are the final states of the sequences run apart; the initial state is seen by the first."""
    args, offsets = ssd_arguments(), torch.tensor([0, 4, 11])
    seq_idx = torch.tensor([[0] * 4 + [1] * 7])
    initial = normal(1, 4, 5, 3, seed=5, dtype=torch.float64)
    options = {"chunk_size": 4, "return_final_states": True}
    out, final, states = mamba_chunk_scan_combined(
        **args, **options, initial_states=initial, seq_idx=seq_idx, cu_seqlens=offsets, return_varlen_states=True
    )
    for number, (start, end) in enumerate(((0, 4), (4, 11))):
        part = {key: value if key == "A" else value[:, start:end] for key, value in args.items()}
        y, state = mamba_chunk_scan_combined(**part, **options, initial_states=initial if number == 0 else None)
        assert_close("out", out[:, start:end], y)
        assert_close("state", states[number : number + 1], state)
    assert torch.equal(final, states[1:])
    # Cut by the numbers alone; a row that starts with another number than 0 does not see the initial state.
    numbered, last = mamba_chunk_scan_combined(**args, **options, initial_states=initial, seq_idx=seq_idx)
    assert_close("out", numbered, out)
    assert_close("final", last, final)
    late = mamba_chunk_scan_combined(**args, chunk_size=4, initial_states=initial, seq_idx=seq_idx + 3)
    assert_close("late", late, mamba_chunk_scan_combined(**args, chunk_size=4, seq_idx=seq_idx))
    # Padding after the last sequence, which the offsets leave out.
    numbers = torch.tensor([[0] * 4 + [1] * 4 + [-1] * 3])
    padded, _, left = mamba_chunk_scan_combined(
        **args, **options, seq_idx=numbers, cu_seqlens=torch.tensor([0, 4, 8]), return_varlen_states=True
    )
    part = {key: value if key == "A" else value[:, :8] for key, value in args.items()}
    y, _, states = mamba_chunk_scan_combined(
        **part, **options, seq_idx=numbers[:, :8], cu_seqlens=torch.tensor([0, 4, 8]), return_varlen_states=True
    )
    assert_close("out", padded[:, :8], y)
    assert_close("states", left, states)
    assert not padded[:, 8:].any()
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        mamba_chunk_scan_combined(**args, chunk_size=4, return_varlen_states=True)
    with pytest.raises(ValueError, match="state_dtype must be no wider"):
        mamba_chunk_scan_combined(**ssd_arguments(dtype=torch.float32), chunk_size=4, state_dtype=torch.float64)


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.1, 0.6)], ids=["free", "limited"])
def test_scans_agree(limits):
    """Mamba-2's map by the scan of Mamba-1."""
    args = ssd_arguments(batch=2, dtype=torch.float32)
    args |= {"D": normal(4, seed=6), "dt_bias": normal(4, seed=7), "z": normal(2, 11, 4, 5, seed=8)}
    options = {"dt_softplus": True, "dt_limit": limits}
    expected = mamba_chunk_scan_combined(**to_double(args), **options, chunk_size=4, backend="reference")
    assert_close("scan", ssd_selective_scan(**args, **options), expected)
    if limits[0] == 0:
        assert_close("plain", mamba_chunk_scan(**args, dt_softplus=True, chunk_size=3), expected)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("extra", [0, 6], ids=["all channels scanned", "beside an MLP"])
def test_fused_layer_is_its_parts(extra, norm_before_gate):
    """In fp32, against its parts in fp64."""
    heads, headdim, groups, dstate = 4, 3, 2, 5
    dim = heads * headdim
    conv = dim + 2 * groups * dstate
    inputs = {
        "zxbcdt": normal(2, 9, 2 * extra + dim + conv + heads),
        "conv1d_weight": normal(conv, 4, seed=1),
        "conv1d_bias": normal(conv, seed=2),
        "dt_bias": normal(heads, seed=3),
        "A": -normal(heads, seed=4).exp(),
        "D": normal(heads, seed=5),
    }
    weights = {"rmsnorm_weight": normal(dim, seed=6), "outproj_weight": normal(7, extra + dim, seed=7)}
    walk = {
        "seq_idx": torch.tensor([[0] * 4 + [1] * 5, [0] * 9]),
        "initial_states": normal(2, heads, headdim, dstate, seed=8),
    }
    options = {"chunk_size": 4, "headdim": headdim, "ngroups": groups}
    out, state = mamba_split_conv1d_scan_combined(
        **inputs, **weights, **walk, **options, norm_before_gate=norm_before_gate, return_final_states=True
    )

    def parts(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, outproj_weight, **walk):
        z0, x0, z, xBC, dt = zxbcdt.split((extra, extra, dim, conv, heads), dim=-1)
        xBC = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, walk.get("seq_idx"), activation="silu").mT
        x, B, C = xBC.split((dim, groups * dstate, groups * dstate), dim=-1)
        x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
        y, final = mamba_chunk_scan_combined(
            x, dt, A, B, C, 4, D, None, dt_bias, **walk, dt_softplus=True, return_final_states=True, backend="reference"
        )
        y, gate = y.flatten(-2), F.silu(z)
        y = y if norm_before_gate else y * gate
        y = F.rms_norm(y.unflatten(-1, (groups, -1)), (dim // groups,), eps=1e-6).flatten(-2) * rmsnorm_weight
        y = y * gate if norm_before_gate else y
        return torch.cat([F.silu(z0) * x0, y], dim=-1) @ outproj_weight.T, final

    expected, final = parts(**to_double(inputs | weights | walk))
    assert_close("out", out, expected)
    assert_close("state", state, final)
    reference = mamba_split_conv1d_scan_ref(**inputs, **weights, **options, norm_before_gate=norm_before_gate)
    assert_close("reference", reference, parts(**to_double(inputs | weights))[0])
    if not extra:
        plain = mamba_split_conv1d_scan_combined(**inputs, **options)
        z, xBC, dt = to_double(inputs)["zxbcdt"].split((dim, conv, heads), dim=-1)
        rest = {key: value for key, value in to_double(inputs).items() if key != "zxbcdt"}
        unfused = mamba_conv1d_scan_ref(xBC=xBC, dt=dt, z=z, **rest, chunk_size=4, dt_softplus=True, ngroups=groups)
        assert_close("without norm", plain, unfused)
    with pytest.raises(ValueError, match="headdim must be given"):
        mamba_split_conv1d_scan_combined(**inputs, chunk_size=4, ngroups=groups)


def test_minimal_form_takes_any_length():
    """Cut where the chunks do not end; the last chunk's padding leaves the state alone."""
    X, A = normal(2, 11, 3, 4), -normal(2, 11, 3, seed=1).abs()
    B, C = normal(2, 11, 3, 5, seed=2), normal(2, 11, 3, 5, seed=3)
    whole, state = ssd_minimal_discrete(X, A, B, C, 11)
    cut, last = ssd_minimal_discrete(X, A, B, C, 4)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(last, state)
    assert torch.equal(segsum(torch.tensor([1.0, 2.0])), torch.tensor([[0.0, -math.inf], [2.0, 0.0]]))


def stages(x, dt, A, B, C, D=None, z=None, seq_idx=None, chunk_size=4):
    """The chunked scan by its stages, the states before each chunk and what they come from."""
    if seq_idx is None:
        dA_cumsum, steps = _chunk_cumsum_fwd(dt, A, chunk_size, dt_softplus=True)
        added = chunk_state(B, x, steps, dA_cumsum)
        before, final = state_passing(added.flatten(-2), dA_cumsum[..., -1])
        return chunk_scan(B, C, x, steps, dA_cumsum, before.unflatten(-1, added.shape[-2:]), D, z), final
    dA_cumsum, steps = _chunk_cumsum_fwd(dt, A, chunk_size, dt_softplus=True)
    added = _chunk_state_fwd(B, x, steps, dA_cumsum, seq_idx=seq_idx)
    before, _ = _state_passing_fwd(added.flatten(-2), dA_cumsum[..., -1], seq_idx=seq_idx, chunk_size=chunk_size)
    return dA_cumsum, steps, before.unflatten(-1, added.shape[-2:])


def test_stages_make_the_scan():
    """Cumulated decays, the chunks' states, their passing and the scan give ssd's output, gradients and final state."""
    inputs = ssd_arguments(batch=2, seqlen=12) | {
        "D": normal(4, seed=6, dtype=torch.float64),
        "z": normal(2, 12, 4, 5, seed=7, dtype=torch.float64),
    }
    inputs = {key: value.requires_grad_() for key, value in inputs.items()}
    weights = {"out": normal(2, 12, 4, 5, seed=8), "state": normal(2, 4, 15, seed=9)}

    def whole(**inputs):
        out, state = mamba_chunk_scan_combined(
            **inputs, chunk_size=4, dt_softplus=True, return_final_states=True, backend="reference"
        )
        return out, state.flatten(-2)

    actual, expected = run(stages, inputs, weights), run(whole, inputs, weights)
    for key, value in expected.items():
        # 12 tokens in float64, where both sides round
        torch.testing.assert_close(actual[key], value, rtol=1e-11, atol=1e-11)


def test_stages_of_packed_sequences():
    """chunk_state_varlen: sequences that end inside chunks, fill them, run over them or are empty."""
    args, offsets = ssd_arguments(seqlen=15), torch.tensor([0, 3, 8, 8, 9, 15])
    seq_idx = torch.tensor([[0] * 3 + [1] * 5 + [3] + [4] * 6])
    dA_cumsum, steps, before = stages(**args, seq_idx=seq_idx)
    states = chunk_state_varlen(args["B"][0], args["x"][0], steps[0], dA_cumsum[0], offsets, before[0])
    _, expected = mamba_chunk_scan_combined(
        **args, chunk_size=4, dt_softplus=True, cu_seqlens=offsets, return_varlen_states=True, backend="reference"
    )
    torch.testing.assert_close(states, expected.to(states.dtype), rtol=1e-11, atol=1e-11)


def test_references_of_stages_are_float64():
    args = ssd_arguments(batch=2, seqlen=8, dtype=torch.float32)
    dA_cumsum, steps = _chunk_cumsum_fwd(args["dt"], args["A"], 4)
    added = chunk_state_ref(args["B"], args["x"], steps, dA_cumsum)
    assert_close("states", chunk_state(args["B"], args["x"], steps, dA_cumsum), added.double())
    for actual, expected in zip(
        state_passing(added.flatten(-2), dA_cumsum[..., -1], added[:, 0].flatten(-2)),
        state_passing_ref(added.flatten(-2), dA_cumsum[..., -1], added[:, 0].flatten(-2)),
        strict=True,
    ):
        assert_close("passed", actual, expected.double())
    scan = (args["B"], args["C"], args["x"], steps, dA_cumsum, added)
    assert_close("scan", chunk_scan(*scan), chunk_scan_ref(*scan).double())
    narrow = [t.bfloat16() for t in scan[:3]]
    assert chunk_scan(*narrow, *scan[3:]).dtype == torch.bfloat16
    assert chunk_state(narrow[0], narrow[2], steps, dA_cumsum, states_in_fp32=False).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x must have 2 \* 4 tokens"):
        chunk_scan(*[t[:, :7] for t in scan[:3]], *scan[3:])
    with pytest.raises(ValueError, match=r"x must have at most 2 \* 4 tokens"):
        chunk_state(normal(2, 9, 2, 3), normal(2, 9, 4, 5), steps, dA_cumsum)
    with pytest.raises(ValueError, match="groups that divide the 4 heads, got 3"):
        chunk_state(normal(2, 8, 3, 3), args["x"], steps, dA_cumsum)
    with pytest.raises(ValueError, match="chunk_size must be given with seq_idx"):
        _state_passing_fwd(added.flatten(-2), dA_cumsum[..., -1], seq_idx=torch.zeros(2, 8, dtype=torch.int32))
