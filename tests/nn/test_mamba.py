"""Mamba: the official block's numbers and weights, steps, states, pads, packing, compilation."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.nn import Mamba, MambaStack
from ssmkit.testing import assert_close, available, device_of

BACKENDS = [
    name for name in available("selective_scan", reference=True) if name in [*available("causal_conv1d"), "reference"]
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
compiled_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])


def layer(backend="auto", dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    made = Mamba(**({"d_model": 12, "d_state": 4} | options), backend=backend).to(dtype)
    return made.to(device_of(backend))


def tokens(backend="auto", batch=2, seqlen=11, dim=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seqlen, dim, generator=generator, dtype=dtype).to(device_of(backend))


def official(name, backend, dtype):
    case = load(name)
    options = {k: v for k, v in case.meta["config"].items() if k != "layer_idx"}
    mixer = Mamba(**options, backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    return case, mixer.to(device_of(backend), dtype)


@every_backend
@pytest.mark.parametrize("name", names("mamba1_block*"))
def test_official_block(name, backend):
    """In float64 the stored float32 results are met to their rounding; in float32 to the bounds stored with the case."""
    for dtype in (torch.float64, torch.float32):
        case, mixer = official(name, backend, dtype)
        hidden = case.inputs["hidden_states"].to(device_of(backend), dtype).requires_grad_()
        y = mixer(hidden)
        y.backward(case.cotangents["y"].to(y))
        got = {"in.hidden_states": hidden.grad, **{f"param.{k}": p.grad for k, p in mixer.named_parameters()}}
        assert got.keys() == case.gradients.keys()
        if dtype == torch.float64:
            assert_close("y", y.float(), case.outputs["y"])
            for key, value in got.items():
                assert_close(key, value.float(), case.gradients[key])
        else:
            allowed = case.meta["expected_fp32_tol"]
            pairs = [(y, case.outputs["y"], allowed["out_rel_to_max"])]
            pairs += [(value, case.gradients[key], allowed["grad_rel_to_max"]) for key, value in got.items()]
            for actual, expected, bound in pairs:
                assert (actual.cpu() - expected).abs().max() <= bound * expected.abs().max()


@every_backend
@pytest.mark.parametrize("name", names("mamba1_block*"))
def test_official_step_and_states(name, backend):
    case, mixer = official(name, backend, torch.float64)
    hidden = case.inputs["hidden_states"].to(device_of(backend), torch.float64)
    state = mixer.allocate_inference_cache(hidden.shape[0])
    with torch.no_grad():
        outputs = [mixer.step(hidden[:, t : t + 1], *state)[0] for t in range(hidden.shape[1])]
    assert_close("y", torch.cat(outputs, dim=1).float(), case.outputs["y_step"])
    # The official convolution state also holds the token that leaves it next.
    assert_close("conv_state", state[0].float(), case.outputs["conv_state_after"].transpose(1, 2)[:, 1:])
    assert_close("ssm_state", state[1].float(), case.outputs["ssm_state_after"])


@every_backend
def test_official_language_model(backend):
    """Embedding, our residual stack and the tied head on the official tiny model's weights."""
    case = load("lm_mamba1")
    config = case.meta["config"]
    stack = MambaStack(
        config["d_model"], config["n_layer"], backend=backend, residual_in_fp32=False, **config["ssm_cfg"]
    )
    body = {k.removeprefix("backbone."): v for k, v in case.params.items() if k.startswith("backbone.")}
    embedding = body.pop("embedding.weight").double().to(device_of(backend))
    stack.load_state_dict(body, strict=True)
    stack = stack.double().to(device_of(backend))
    with torch.no_grad():
        ids = case.inputs["input_ids"].to(device_of(backend))
        logits = F.linear(stack(F.embedding(ids, embedding)), embedding)
        assert_close("logits", logits.float(), case.outputs["logits"])

        state = stack.allocate_inference_cache(ids.shape[0])
        logits = F.linear(stack(F.embedding(ids, embedding), state=state), embedding)[:, -1:]
        generated = [ids]
        while True:
            generated.append(logits.argmax(-1))
            if sum(part.shape[1] for part in generated) == case.outputs["generated"].shape[1]:
                break
            logits = F.linear(stack.step(F.embedding(generated[-1], embedding), state), embedding)
    assert torch.equal(torch.cat(generated, dim=1).cpu(), case.outputs["generated"])


def test_transformers_mixer_gives_the_same_numbers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=24, state_size=8, num_hidden_layers=1, use_bias=False)
    torch.manual_seed(0)
    theirs = MambaMixer(config, layer_idx=0).double().eval()
    ours = Mamba(24, d_state=8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    hidden = tokens(dim=24, seqlen=33)
    with torch.no_grad():
        # Its scan runs in float32 whatever the layer's dtype.
        assert_close("y", ours.double()(hidden).float(), theirs(hidden), slack=4)


@every_backend
def test_step_equals_forward(backend):
    mixer, hidden = layer(backend), tokens(backend)
    with torch.no_grad():
        expected = mixer(hidden)
        state = mixer.allocate_inference_cache(2)
        stepped = torch.cat([mixer.step(hidden[:, t : t + 1], *state)[0] for t in range(11)], dim=1)
    torch.testing.assert_close(stepped, expected)


@every_backend
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11])
def test_carried_state_equals_one_pass(cut, backend):
    mixer, hidden = layer(backend), tokens(backend)
    expected = mixer(hidden)
    state = mixer.allocate_inference_cache(2)
    parts = [mixer(hidden[:, :cut], state=state), mixer(hidden[:, cut:], state=state)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    # A state given away and overwritten afterwards does not spoil the gradients.
    torch.cat(parts, dim=1).sum().backward()


def test_inference_params_like_the_official_ones():
    mixer, hidden = layer(layer_idx=3), tokens()
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        expected = mixer(hidden)
        for _ in range(2):  # the second prefill starts from fresh states
            cache.seqlen_offset = 0
            first = mixer(hidden[:, :7], inference_params=cache)
            rest = []
            for token in range(7, 11):
                cache.seqlen_offset = token
                rest.append(mixer(hidden[:, token : token + 1], inference_params=cache))
            torch.testing.assert_close(torch.cat([first, *rest], dim=1), expected)
    assert set(cache.key_value_memory_dict) == {3}


def test_inference_params_are_read_again_for_other_batches():
    mixer, hidden = layer(layer_idx=3), tokens()
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        for rows in (hidden, hidden[:1], hidden):
            cache.seqlen_offset = 0
            first = mixer(rows[:, :10], inference_params=cache)
            cache.seqlen_offset = 10
            rest = mixer(rows[:, 10:11], inference_params=cache)
            torch.testing.assert_close(torch.cat([first, rest], dim=1), mixer(rows))
        cache.seqlen_offset = 0
        packed = mixer(hidden.flatten(0, 1)[None], inference_params=cache, cu_seqlens=torch.tensor([0, 11, 22]))
        torch.testing.assert_close(packed[0].unflatten(0, (2, 11)), mixer(hidden))


@every_backend
@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
def test_pads_change_nothing(side, backend):
    mixer, hidden = layer(backend), tokens(backend)
    mask = torch.zeros(11, dtype=torch.bool)
    mask[
        {"left": [3, 4, 5, 6, 7, 8, 9, 10], "right": [0, 1, 2, 3], "both": [4, 5, 6], "inside": [0, 1, 2, 6, 9, 10]}[
            side
        ]
    ] = True
    mask = mask.to(hidden.device)
    expected = mixer(hidden[:, mask])
    for value in (0.0, -10.0, 1e4):
        padded = torch.where(mask[None, :, None], hidden, value)
        torch.testing.assert_close(mixer(padded, mask=mask.expand(2, 11))[:, mask], expected)


@every_backend
def test_resets_and_packing_equal_separate_sequences(backend):
    mixer, hidden = layer(backend), tokens(backend, batch=1)
    expected = torch.cat([mixer(hidden[:, :4]), mixer(hidden[:, 4:])], dim=1)
    resets = torch.arange(11, device=hidden.device).eq(4)[None]
    torch.testing.assert_close(mixer(hidden, resets=resets), expected)
    offsets = torch.tensor([0, 4, 11], device=hidden.device)
    torch.testing.assert_close(mixer(hidden, cu_seqlens=offsets), expected)


def test_step_sizes_start_between_dt_min_and_dt_max():
    mixer = Mamba(64, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(mixer.dt_proj.bias)
    assert (dt >= 0.002 * (1 - 1e-5)).all()
    assert (dt <= 0.05 * (1 + 1e-5)).all()
    assert mixer.dt_proj.bias._no_reinit
    assert mixer.A_log._no_weight_decay
    assert mixer.D._no_weight_decay
    torch.testing.assert_close(mixer.A_log.exp()[7], torch.arange(1.0, 17.0))
    assert sum(p.numel() for p in Mamba(768).parameters()) == 3_770_880


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype, backend):
    mixer, hidden = layer(backend, torch.float32), tokens(backend, dtype=torch.float32)
    expected = mixer(hidden)
    device = hidden.device.type
    if device == "cpu" and dtype == torch.float16:
        actual = layer(backend, dtype)(hidden.to(dtype))
        assert actual.dtype == dtype
    else:
        with torch.autocast(device, dtype=dtype):
            actual = mixer(hidden)
        actual.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())
    # Four roundings to dtype between input and output, each of the size of one eps.
    assert (actual - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@compiled_backend
def test_compile_fullgraph(backend):
    mixer, hidden = layer(backend, torch.float32), tokens(backend, dtype=torch.float32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), mixer(hidden))
    mask = torch.arange(11, device=hidden.device).lt(8).expand(2, 11)
    torch.testing.assert_close(compiled(hidden, mask=mask), mixer(hidden, mask=mask))
    state, same = mixer.allocate_inference_cache(2), mixer.allocate_inference_cache(2)
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(step(hidden[:, :1], *state)[0], mixer.step(hidden[:, :1], *same)[0])
    torch.testing.assert_close(state, same)


@pytest.mark.slow
def test_compile_with_inductor():
    mixer, hidden = layer("auto", torch.float32), tokens(dtype=torch.float32)
    compiled = torch.compile(mixer, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), mixer(hidden), rtol=1e-5, atol=1e-6)


@compiled_backend
def test_export(backend):
    mixer, hidden = layer(backend, torch.float32).eval(), tokens(backend, dtype=torch.float32)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(mixer, (hidden,), dynamic_shapes={"hidden_states": {1: length}})
    longer = tokens(backend, seqlen=20, dtype=torch.float32)
    torch.testing.assert_close(program.module()(longer), mixer(longer))


@every_backend
def test_stack_equals_plain_residual_blocks(backend):
    torch.manual_seed(0)
    stack = MambaStack(12, 3, d_state=4, backend=backend).double().to(device_of(backend))
    hidden = tokens(backend)
    total = hidden
    for block in stack.layers:
        total = total + block.mixer(F.rms_norm(total, (12,), block.norm.weight, 1e-5))
    expected = F.rms_norm(total, (12,), stack.norm_f.weight, 1e-5)
    torch.testing.assert_close(stack(hidden), expected)
    state = stack.allocate_inference_cache(2)
    with torch.no_grad():
        stepped = torch.cat([stack.step(hidden[:, t : t + 1], state) for t in range(11)], dim=1)
    torch.testing.assert_close(stepped, expected)


@every_backend
def test_stack_keeps_the_residual_in_fp32(backend):
    stack = MambaStack(12, 2, d_state=4, backend=backend, dtype=torch.bfloat16).to(device_of(backend))
    hidden = tokens(backend, dtype=torch.bfloat16)
    _, residual = stack.layers[0](hidden)
    assert residual.dtype == torch.float32
    assert stack(hidden).dtype == torch.bfloat16


BAD = {
    "d_model": ({"d_model": 0}, "d_model must be at least 1, got 0"),
    "d_state": ({"d_state": 0}, "d_state must be at least 1"),
    "dt_rank": ({"dt_rank": 0}, "dt_rank must be 'auto' or at least 1, got 0"),
    "dt_rank by name": ({"dt_rank": "Auto"}, "dt_rank must be 'auto' or at least 1, got 'Auto'"),
    "dt_min": ({"dt_min": 0.0}, "step sizes need 0 < dt_min <= dt_max, got 0.0 and 0.1"),
    "dt_init": ({"dt_init": "zeros"}, "dt_init must be 'random' or 'constant', got 'zeros'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba(**({"d_model": 8} | options))


def test_bad_calls():
    mixer, hidden = layer(), tokens()
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, 1, 12\), got \(2, 11, 12\)"):
        mixer.step(hidden, *mixer.allocate_inference_cache(2))
    with pytest.raises(ValueError, match="layer_idx must be given"):
        mixer(hidden, inference_params=SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0))
    decoding = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=1)
    mixer.layer_idx = 0
    with pytest.raises(ValueError, match="takes no mask, resets or cu_seqlens"):
        mixer(hidden[:, :1], decoding, resets=torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="give one of them"):
        mixer(hidden[:, :1], decoding, state=mixer.allocate_inference_cache(2))
    with pytest.raises(ValueError, match="make_mixer makes the mixers, so d_state would go unused"):
        MambaStack(12, 1, make_mixer=lambda index: mixer, d_state=8)
    with pytest.raises(ValueError, match="initial_state must have shape"):
        mixer(hidden, state=mixer.allocate_inference_cache(3))
