"""What the tests of Mamba, Mamba2, Mamba3 and attention share: inputs, official calling sequences, laws that each holds."""

from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ssmkit.testing import assert_close, available, device_of


def usable(op, *others):
    """Backends of an op, the reference too, on which a layer's other ops run as well."""
    return [
        name
        for name in available(op, reference=True)
        if all(name in [*available(other), "reference"] for other in others)
    ]


def thorough(backends, cases, interpreted):
    """Every case on every backend; of those of interpreted Triton, which take seconds each, only `interpreted`."""
    slow = [] if torch.cuda.is_available() else ["triton"]
    return [(case, backend) for case in cases for backend in backends if backend not in slow or case in interpreted]


def tokens(backend="auto", batch=2, seqlen=11, dim=8, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seqlen, dim, generator=generator, dtype=dtype).to(device_of(backend))


def with_gradients(mixer, hidden, dy, run):
    """The output of run(hidden), and the gradients of the input and of every parameter."""
    hidden = hidden.clone().requires_grad_()
    y = run(hidden)
    return [y.detach(), *torch.autograd.grad(y, [hidden, *mixer.parameters()], dy.to(y))]


def steps(mixer, hidden, state):
    """Outputs of one token after another."""
    with torch.no_grad():
        outputs = [mixer.step(hidden[:, t : t + 1], *state)[0] for t in range(hidden.shape[1])]
    return torch.cat(outputs, dim=1)


def inference_params(**more):
    """Like a fresh InferenceParams of mamba_ssm."""
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, **more)


def prompt_and_steps(mixer, hidden, cache, prompt=7):
    """The official calling sequence: the prompt at offset 0, which starts from fresh states, then one token a call."""
    with torch.no_grad():
        cache.seqlen_offset = 0
        outputs = [mixer(hidden[:, :prompt], inference_params=cache)]
        for token in range(prompt, hidden.shape[1]):
            cache.seqlen_offset = token
            outputs.append(mixer(hidden[:, token : token + 1], inference_params=cache))
    return torch.cat(outputs, dim=1)


def check_inference_params_elsewhere(mixer, hidden):
    """A state is kept in place, but not that of another dtype or device, nor one that may not be written any more."""
    params, expected = inference_params(max_seqlen=hidden.shape[1]), mixer(hidden).detach()
    prompt_and_steps(mixer, hidden, params)
    before = params.key_value_memory_dict[mixer.layer_idx]
    prompt_and_steps(mixer, hidden, params)
    assert params.key_value_memory_dict[mixer.layer_idx] is before
    low = deepcopy(mixer).float()
    torch.testing.assert_close(prompt_and_steps(low, hidden.float(), params), low(hidden.float()))
    torch.testing.assert_close(prompt_and_steps(mixer, hidden, params), expected)
    with torch.inference_mode():
        params.key_value_memory_dict.clear()
        prompt_and_steps(mixer, hidden, params)
    torch.testing.assert_close(prompt_and_steps(mixer, hidden, params), expected)
    params.key_value_memory_dict[mixer.layer_idx] = [part.to("meta") for part in before]
    torch.testing.assert_close(prompt_and_steps(mixer, hidden, params), expected)
    # The prompt read under inference mode, the other tokens not.
    with torch.inference_mode():
        params.key_value_memory_dict.clear()
        params.seqlen_offset = 0
        mixer(hidden[:, :-1], inference_params=params)
    params.seqlen_offset = hidden.shape[1] - 1
    with torch.no_grad():
        torch.testing.assert_close(mixer(hidden[:, -1:], inference_params=params), expected[:, -1:])
        with pytest.raises(ValueError, match=r"holds the states of 2 sequences.*got a batch of 1"):
            mixer(hidden[:1, -1:], inference_params=params)


def check_official_block(case, mixer, carried=False):
    """Outputs and gradients of a stored case, with `carried` the final states too.

    In float64 the stored float32 results are met to their rounding; in float32 to the bounds stored with the case.
    """
    parameter = next(mixer.parameters())
    hidden = case.inputs["hidden_states"].to(parameter).requires_grad_()
    state = mixer.allocate_inference_cache(hidden.shape[0]) if carried else None
    y = mixer(hidden, state=state)
    y.backward(case.cotangents["y"].to(y))
    outputs = {"y": y} | ({f"{key}_state_after": part for key, part in state._asdict().items()} if carried else {})
    got = {"in.hidden_states": hidden.grad, **{f"param.{k}": p.grad for k, p in mixer.named_parameters()}}
    assert got.keys() == case.gradients.keys()
    assert not carried or outputs.keys() == case.outputs.keys()
    allowed = case.meta["expected_fp32_tol"]
    for values, stored, bound in ((outputs, case.outputs, "out_rel_to_max"), (got, case.gradients, "grad_rel_to_max")):
        for key, value in values.items():
            if parameter.dtype == torch.float64:
                assert_close(key, value.float(), stored[key])
            else:
                assert (value.cpu() - stored[key]).abs().max() <= allowed[bound] * stored[key].abs().max(), key


def check_official_steps(case, mixer):
    """Outputs of the official step, and the states that it leaves."""
    hidden = case.inputs["hidden_states"].to(next(mixer.parameters()))
    state = mixer.allocate_inference_cache(hidden.shape[0])
    assert_close("y", steps(mixer, hidden, state).float(), case.outputs["y_step"])
    # The official convolution state also holds the token that leaves it next.
    assert_close("conv_state", state[0].float(), case.outputs["conv_state_after"].transpose(1, 2)[:, 1:])
    assert_close("ssm_state", state[1].float(), case.outputs["ssm_state_after"])


def check_step_equals_forward(mixer, hidden):
    """Without a state and with one, which both leave alike."""
    state, same = (mixer.allocate_inference_cache(hidden.shape[0]) for _ in range(2))
    with torch.no_grad():
        expected = mixer(hidden)
        torch.testing.assert_close(mixer(hidden, state=same), expected)
    torch.testing.assert_close(steps(mixer, hidden, state), expected)
    torch.testing.assert_close(state, same)


def check_carried_state(mixer, hidden, cut):
    """Two calls that hand on the state are one call."""
    state, same = (mixer.allocate_inference_cache(hidden.shape[0]) for _ in range(2))
    expected = mixer(hidden, state=same)
    parts = [mixer(hidden[:, :cut], state=state), mixer(hidden[:, cut:], state=state)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    torch.testing.assert_close(state, same)
    # A state given away and overwritten afterwards does not spoil the gradients.
    torch.cat(parts, dim=1).sum().backward()


def check_pads(mixer, hidden, real, values):
    """Outputs at the `real` tokens are those without the others, whatever stands there."""
    batch, seqlen, _ = hidden.shape
    mask = torch.zeros(seqlen, dtype=torch.bool, device=hidden.device)
    mask[real] = True
    expected = mixer(hidden[:, mask])
    for value in values:
        padded = torch.where(mask[None, :, None], hidden, value)
        torch.testing.assert_close(mixer(padded, mask=mask.expand(batch, seqlen))[:, mask], expected)


def check_packed(mixer, hidden, dy):
    """11 tokens as sequences of 4, 1, 0 and 6: outputs and every gradient, however the cuts are told."""
    expected = with_gradients(
        mixer, hidden, dy, lambda u: torch.cat([mixer(u[:, :4]), mixer(u[:, 4:5]), mixer(u[:, 5:])], dim=1)
    )
    offsets = torch.tensor([0, 4, 5, 5, 11], device=hidden.device)
    numbers = torch.tensor([[0] * 4 + [1] + [2] * 6], dtype=torch.int32, device=hidden.device)
    starts = torch.arange(11, device=hidden.device)[None]
    for told in (
        {"cu_seqlens": offsets},
        {"cu_seqlens": offsets.int(), "seq_idx": numbers},
        {"seq_idx": numbers},
        {"resets": starts.eq(4) | starts.eq(5)},
        {"resets": starts.eq(4), "seq_idx": numbers.clamp(min=1)},
    ):
        actual = with_gradients(mixer, hidden, dy, lambda u, told=told: mixer(u, **told))
        torch.testing.assert_close(actual, expected)


def check_packed_states(mixer, hidden):
    """Three sequences in four packed calls, of which some bring no token of one of them."""
    state, same = (mixer.allocate_inference_cache(3) for _ in range(2))
    with torch.no_grad():
        expected = mixer(hidden, state=same)
        # Tokens of each sequence seen so far.
        for begins, ends in pairwise([(0, 0, 0), (2, 0, 5), (3, 1, 5), (11, 11, 11)]):
            pieces = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
            lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
            offsets = torch.tensor([0, *lengths], device=hidden.device).cumsum(0)
            packed, wanted = (torch.cat([t[i, piece] for i, piece in enumerate(pieces)]) for t in (hidden, expected))
            torch.testing.assert_close(mixer(packed[None], cu_seqlens=offsets, state=state)[0], wanted)
    torch.testing.assert_close(state, same)


def low_precision(mixer, low, hidden, dtype, state_dtypes):
    """Outputs in `dtype`: of forward and step of the layer `low`, and of the float32 `mixer` under autocast."""
    outputs = [low(hidden.to(dtype))]
    assert outputs[0].dtype == dtype
    state = low.allocate_inference_cache(hidden.shape[0])
    assert [part.dtype for part in state] == state_dtypes
    outputs.append(steps(low, hidden.to(dtype), state))
    device = hidden.device.type
    if device != "cpu" or dtype == torch.bfloat16:
        with torch.autocast(device, dtype=dtype):
            outputs.append(mixer(hidden))
        outputs[-1].float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())
    return outputs


def check_compile_fullgraph(mixer, hidden, **walk):
    """Plain, with `walk`, and one step."""
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), mixer(hidden))
    torch.testing.assert_close(compiled(hidden, **walk), mixer(hidden, **walk))
    state, same = (mixer.allocate_inference_cache(hidden.shape[0]) for _ in range(2))
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(step(hidden[:, :1], *state)[0], mixer.step(hidden[:, :1], *same)[0])
    torch.testing.assert_close(state, same)


def check_compile_with_inductor(mixer, hidden):
    compiled = torch.compile(mixer, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), mixer(hidden), rtol=1e-5, atol=1e-6)


def check_export(mixer, hidden, longer):
    """Exported for any length, run on `longer`."""
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(mixer.eval(), (hidden,), dynamic_shapes={"hidden_states": {1: length}})
    torch.testing.assert_close(program.module()(longer), mixer(longer))


def check_bad_states(mixer, hidden, walk):
    """Calls whose state does not fit them are refused, and `walk` names what a single token does not take."""
    width = hidden.shape[2]
    with pytest.raises(
        ValueError, match=rf"hidden_states must have shape \(batch, 1, {width}\), got \(2, 11, {width}\)"
    ):
        mixer.step(hidden, *mixer.allocate_inference_cache(2))
    with pytest.raises(ValueError, match="layer_idx must be given"):
        mixer(hidden, inference_params=inference_params())
    decoding = inference_params()
    decoding.seqlen_offset, mixer.layer_idx = 1, 0
    with pytest.raises(ValueError, match=f"takes no {walk}; pass state instead"):
        mixer(hidden[:, :1], inference_params=decoding, resets=torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="give one of them"):
        mixer(hidden[:, :1], inference_params=decoding, state=mixer.allocate_inference_cache(2))
