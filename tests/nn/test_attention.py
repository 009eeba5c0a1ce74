"""MHA: the written-out formula, steps, states, pads, resets, packing; GatedMLP."""

from functools import partial
from itertools import pairwise

import mixers
import pytest
import torch
import torch.nn.functional as F
from laws import same

from ssmkit.nn import MHA, Block, GatedMLP, RMSNorm

BATCH, SEQLEN, DIM = 2, 11, 12
OPTIONS = {
    "plain": {"num_heads": 3},
    "grouped, rotary": {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "rotary_emb_dim": 4},
    "all": {
        "num_heads": 2,
        "num_heads_kv": 1,
        "head_dim": 8,
        "mlp_dim": 200,
        "d_conv": 3,
        "rotary_emb_dim": 8,
        "rotary_emb_base": 100.0,
        "rotary_emb_interleaved": True,
        "softmax_scale": 0.5,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
    },
}
tokens = partial(mixers.tokens, batch=BATCH, seqlen=SEQLEN, dim=DIM)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def layer(options, dtype=torch.float64, **more):
    torch.manual_seed(0)
    return MHA(DIM, **options, **more).to(dtype)


def written_out(mha, x):
    """Token by token and head by head; rotation as a complex product."""
    qkv = x @ mha.in_proj.weight.T + (0 if mha.in_proj.bias is None else mha.in_proj.bias)
    qkv, up, gate = qkv.split((mha.qkv_dim, mha.mlp_dim // 2, mha.mlp_dim // 2), dim=-1)
    if mha.d_conv:
        past = F.pad(qkv, (0, 0, mha.d_conv - 1, 0))
        taps = mha.conv1d.weight[:, 0]
        qkv = sum(past[:, k : k + x.shape[1]] * taps[:, k] for k in range(mha.d_conv)) + mha.conv1d.bias
    size, rot = mha.head_dim, mha.rotary_emb_dim

    def turn(head):
        if not rot:
            return head
        pairs = head[..., :rot].unflatten(-1, (-1, 2) if mha.rotary_emb_interleaved else (2, -1))
        a, b = pairs.unbind(-1 if mha.rotary_emb_interleaved else -2)
        rate = mha.rotary_emb_base ** (-torch.arange(rot // 2, dtype=x.dtype) * 2 / rot)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rate
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
        stacked = torch.stack((turned.real, turned.imag), dim=-1 if mha.rotary_emb_interleaved else -2)
        return torch.cat((stacked.flatten(-2), head[..., rot:]), dim=-1)

    outputs = []
    for head in range(mha.num_heads):
        kv = head // (mha.num_heads // mha.num_heads_kv)
        keys_at = mha.num_heads * size + kv * size
        values_at = keys_at + mha.num_heads_kv * size
        q, k = turn(qkv[..., head * size : (head + 1) * size]), turn(qkv[..., keys_at : keys_at + size])
        v = qkv[..., values_at : values_at + size]
        score = q @ k.transpose(1, 2) * (mha.softmax_scale or size**-0.5)
        score = score.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        outputs.append(score.softmax(-1) @ v)
    return mha.out_proj(torch.cat([*outputs, up * F.silu(gate)], dim=-1))


@every_option
def test_formula(options):
    mha, x = layer(options), tokens()
    same(mha(x), written_out(mha, x))


@every_option
def test_steps_and_pieces_equal_one_pass(options):
    mha, x = layer(options), tokens()
    expected = mha(x)
    for cuts in ((0, 4, 11), (1, 10, 11), (11, 11)):
        state = mha.allocate_inference_cache(BATCH, SEQLEN)
        parts, begin = [], 0
        for cut in cuts:
            parts.append(mha(x[:, begin:cut], state=state))
            begin = cut
        same(torch.cat(parts, dim=1), expected)
        # A state given away and overwritten afterwards does not spoil the gradients.
        torch.cat(parts, dim=1).sum().backward()
    state = mha.allocate_inference_cache(BATCH, SEQLEN)
    same(mixers.steps(mha, x, state), expected)
    assert state.lengths.tolist() == [SEQLEN] * BATCH


def test_gradients_through_a_state_are_those_of_one_pass():
    mha, x = layer(OPTIONS["all"]), tokens()
    expected = torch.autograd.grad(mha(x).square().sum(), [*mha.parameters()])
    state = mha.allocate_inference_cache(BATCH, SEQLEN)
    actual = torch.autograd.grad(mha(x, state=state).square().sum(), [*mha.parameters()])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@every_option
@pytest.mark.parametrize("stateful", [False, True], ids=["no state", "state"])
def test_pads_are_removable(options, stateful):
    mha, x = layer(options), tokens()
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.bool)
    mask[0, :3] = mask[1, 4:6] = mask[1, -1:] = False
    # Room for the longer row and one token more: pads take none.
    state = mha.allocate_inference_cache(BATCH, SEQLEN - 2) if stateful else None
    with torch.no_grad():
        y = mha(x, mask=mask, state=state)
        following = tokens(seqlen=1, seed=2)
        after = mha.step(following, *state)[0] if stateful else None
        for row in range(BATCH):
            real = x[row : row + 1, mask[row]]
            same(y[row : row + 1, mask[row]], mha(real))
            if stateful:
                same(after[row : row + 1], mha(torch.cat([real, following[row : row + 1]], dim=1))[:, -1:])


@every_option
@pytest.mark.parametrize("stateful", [False, True], ids=["no state", "state"])
def test_resets_are_separate_sequences(options, stateful):
    mha, x = layer(options), tokens()
    resets = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    resets[0, 4] = resets[0, 9] = resets[1, 0] = resets[1, 7] = True
    mask = torch.ones_like(resets)
    mask[0, 9] = False  # a pad that resets: what follows starts anew
    state = mha.allocate_inference_cache(BATCH, SEQLEN + 1) if stateful else None
    with torch.no_grad():
        y = mha(x, resets=resets, mask=mask, state=state)
        following = tokens(seqlen=1, seed=2)
        same(y[:1, :4], mha(x[:1, :4]))
        same(y[:1, 4:9], mha(x[:1, 4:9]))
        same(y[:1, 10:], mha(x[:1, 10:]))
        same(y[1:, :7], mha(x[1:, :7]))
        same(y[1:, 7:], mha(x[1:, 7:]))
        if stateful:
            after = mha.step(following, *state)[0]
            same(after[:1], mha(torch.cat([x[:1, 10:], following[:1]], dim=1))[:, -1:])
            same(after[1:], mha(torch.cat([x[1:, 7:], following[1:]], dim=1))[:, -1:])


@every_option
@pytest.mark.parametrize("stateful", [False, True], ids=["no state", "state"])
def test_packed_equals_separate(options, stateful):
    mha, x = layer(options), tokens(batch=1)
    offsets = [0, 4, 4, 5, 11]  # one of them empty
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    state = mha.allocate_inference_cache(4, 12) if stateful else None
    pieces = [x[:, begin:end] for begin, end in pairwise(offsets)]
    with torch.no_grad():
        y = mha(x, cu_seqlens=cu_seqlens, state=state)
        same(y, torch.cat([mha(piece) for piece in pieces], dim=1))
        if stateful:
            assert state.lengths.tolist() == [4, 0, 1, 6]
            again = mha(x, cu_seqlens=cu_seqlens, state=state)
            same(again, torch.cat([mha(torch.cat([p, p], dim=1))[:, p.shape[1] :] for p in pieces], dim=1))


def test_causality():
    mha, x = layer(OPTIONS["all"]), tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(mha(x)[:, 5].sum(), x)
    assert (gradient[:, 6:] == 0).all() and (gradient[:, :6] != 0).any(-1).all()


def test_inference_params():
    mha, x = layer(OPTIONS["all"], layer_idx=3), tokens()
    params, expected = mixers.inference_params(max_seqlen=SEQLEN), mha(x)
    for _ in range(2):  # offset 0 starts afresh
        same(mixers.prompt_and_steps(mha, x, params), expected)
    mixers.check_inference_params_elsewhere(mha, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_near(dtype):
    mha, x = layer(OPTIONS["all"]), tokens()
    expected = mha(x)
    state = mha.to(dtype).allocate_inference_cache(BATCH, SEQLEN)
    for y in (mha(x.to(dtype)), mha(x.to(dtype), state=state)):
        assert y.dtype == dtype
        # Queries and keys are rounded before an exponential, so errors of the result are a few eps.
        assert (y - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_empty_sequence():
    mha = layer(OPTIONS["all"])
    assert mha(tokens(seqlen=0)).shape == (BATCH, 0, DIM)


BAD = {
    "heads": ({"num_heads": 5}, {}, "num_heads must divide embed_dim 12, got 5"),
    "groups": ({"num_heads": 4, "num_heads_kv": 3}, {}, "num_heads_kv must divide num_heads 4, got 3"),
    "rotation": (
        {"num_heads": 3, "rotary_emb_dim": 6},
        {},
        "rotary_emb_dim must be even and at most head_dim 4, got 6",
    ),
    "acausal": ({"num_heads": 3, "causal": False}, {}, "causal must be True"),
    "no heads": ({"num_heads": 0}, {}, "num_heads must be at least 1, got 0"),
    "mask": ({"num_heads": 3}, {"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask must have shape \(2, 11\)"),
    "offsets": ({"num_heads": 3}, {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
}


@pytest.mark.parametrize(("options", "call", "message"), BAD.values(), ids=BAD)
def test_errors(options, call, message):
    with pytest.raises(ValueError, match=message):
        layer(options)(tokens(), **call)


def test_a_full_state_is_refused():
    mha = layer(OPTIONS["plain"])
    state = mha.allocate_inference_cache(BATCH, 4)
    mha(tokens(seqlen=4), state=state)
    with pytest.raises(ValueError, match="the state holds 4 tokens, got 5; allocate it with a larger max_seqlen"):
        mha.step(tokens(seqlen=1), *state)
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        mha.allocate_inference_cache(BATCH)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 12\), got \(2, 11, 12\)"):
        mha.step(tokens(), *state)


def test_a_state_of_another_batch_is_refused():
    mha = layer(OPTIONS["plain"])
    for sequences in (1, BATCH + 1):
        state = mha.allocate_inference_cache(sequences, 11)
        with pytest.raises(ValueError, match=f"state must hold {BATCH} sequences, got {sequences}"):
            mha(tokens(), state=state)
        with pytest.raises(ValueError, match=f"state must hold {BATCH} sequences, one for each row of x"):
            mha.step(tokens(seqlen=1), *state)
        assert not state.lengths.any()


def test_gated_mlp():
    mlp = GatedMLP(DIM, 20, bias=True).double()
    assert mlp.fc1.weight.shape == (256, DIM)
    assert mlp.fc2.weight.shape == (DIM, 128)
    x = tokens()
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    y, gate = hidden[..., :128], hidden[..., 128:]
    same(mlp(x), (y * gate * gate.sigmoid()) @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert GatedMLP(48).fc2.weight.shape == (48, 128)
    with pytest.raises(ValueError, match="hidden_features must be at least 1, got 0"):
        GatedMLP(DIM, 0)


def test_block_with_an_mlp():
    block = Block(layer(OPTIONS["plain"]), RMSNorm(DIM), mlp=GatedMLP(DIM, 20), norm2=RMSNorm(DIM)).double()
    x = tokens()
    hidden, residual = block(x)
    middle = x + block.mixer(F.rms_norm(x, (DIM,), eps=1e-5))
    torch.testing.assert_close(residual, middle)
    torch.testing.assert_close(hidden, block.mlp(F.rms_norm(middle, (DIM,), eps=1e-5)))
    with pytest.raises(ValueError, match="mlp and norm2 belong together"):
        Block(layer(OPTIONS["plain"]), RMSNorm(DIM), mlp=GatedMLP(DIM, 20))
