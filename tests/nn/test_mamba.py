"""Mamba: the official block's numbers and weights, steps, states, pads, packing, compilation."""

from functools import partial

import mixers
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names

from ssmkit.nn import Mamba, MambaStack
from ssmkit.paths import column
from ssmkit.testing import assert_close, device_of

BACKENDS = mixers.usable("selective_scan", "causal_conv1d")
tokens = partial(mixers.tokens, dim=12)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
compiled_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])


def layer(backend="auto", dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    made = Mamba(**({"d_model": 12, "d_state": 4} | options), backend=backend).to(dtype)
    return made.to(device_of(backend))


def official(name, backend, dtype):
    case = load(name)
    options = {k: v for k, v in case.meta["config"].items() if k != "layer_idx"}
    mixer = Mamba(**options, backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    return case, mixer.to(device_of(backend), dtype)


@every_backend
@pytest.mark.parametrize("name", names("mamba1_block*"))
def test_official_block(name, backend):
    for dtype in (torch.float64, torch.float32):
        mixers.check_official_block(*official(name, backend, dtype))


@every_backend
@pytest.mark.parametrize("name", names("mamba1_block*"))
def test_official_step_and_states(name, backend):
    mixers.check_official_steps(*official(name, backend, torch.float64))


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
        assert_close("y", ours.double()(hidden).float(), theirs(hidden))


@every_backend
def test_a_path_is_a_gather_before_and_a_scatter_after(backend):
    mixer, hidden, path = layer(backend), tokens(backend, seqlen=12), column(3, 4)
    torch.testing.assert_close(mixer(hidden, path=path), mixer(hidden[:, path.tokens()])[:, path.inverse()])


@every_backend
def test_step_equals_forward(backend):
    mixers.check_step_equals_forward(layer(backend), tokens(backend))


@every_backend
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11])
def test_carried_state_equals_one_pass(cut, backend):
    mixers.check_carried_state(layer(backend), tokens(backend), cut)


def test_inference_params_like_the_official_ones():
    mixer, hidden = layer(layer_idx=3), tokens()
    cache, expected = mixers.inference_params(), mixer(hidden)
    for _ in range(2):  # the second prompt starts from fresh states
        torch.testing.assert_close(mixers.prompt_and_steps(mixer, hidden, cache), expected)
    assert set(cache.key_value_memory_dict) == {3}


def test_inference_params_of_a_layer_that_was_moved():
    mixers.check_inference_params_elsewhere(layer(layer_idx=3), tokens())


def test_inference_params_in_a_compiled_layer():
    mixer, hidden = layer(layer_idx=3), tokens()
    compiled, cache = torch.compile(mixer, fullgraph=True, backend="aot_eager"), mixers.inference_params()
    for _ in range(2):
        torch.testing.assert_close(mixers.prompt_and_steps(compiled, hidden, cache, prompt=10), mixer(hidden))


def test_inference_params_are_read_again_for_other_batches():
    mixer, hidden = layer(layer_idx=3), tokens()
    cache = mixers.inference_params()
    for rows in (hidden, hidden[:1], hidden):
        torch.testing.assert_close(mixers.prompt_and_steps(mixer, rows, cache, prompt=10), mixer(rows))
    with torch.no_grad():
        cache.seqlen_offset = 0
        packed = mixer(hidden.flatten(0, 1)[None], inference_params=cache, cu_seqlens=torch.tensor([0, 11, 22]))
        torch.testing.assert_close(packed[0].unflatten(0, (2, 11)), mixer(hidden))


PADDED = {
    "left": [3, 4, 5, 6, 7, 8, 9, 10],
    "right": [0, 1, 2, 3],
    "both": [4, 5, 6],
    "inside": [0, 1, 2, 6, 9, 10],
}


@every_backend
@pytest.mark.parametrize("side", PADDED)
def test_pads_change_nothing(side, backend):
    mixers.check_pads(layer(backend), tokens(backend), PADDED[side], values=(0.0, -10.0, 1e4))


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
    for output in mixers.low_precision(mixer, layer(backend, dtype), hidden, dtype, [dtype, torch.float32]):
        # Four roundings to dtype between input and output, each of the size of one eps.
        assert (output - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@compiled_backend
def test_compile_fullgraph(backend):
    mixer, hidden = layer(backend, torch.float32), tokens(backend, dtype=torch.float32)
    mixers.check_compile_fullgraph(mixer, hidden, mask=torch.arange(11, device=hidden.device).lt(8).expand(2, 11))


@pytest.mark.slow
def test_compile_with_inductor():
    mixers.check_compile_with_inductor(layer("auto", torch.float32), tokens(dtype=torch.float32))


@compiled_backend
def test_export(backend):
    inputs = (tokens(backend, seqlen=seqlen, dtype=torch.float32) for seqlen in (11, 20))
    mixers.check_export(layer(backend, torch.float32), *inputs)


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
    mixers.check_bad_states(mixer, hidden, walk="mask, resets, cu_seqlens or path")
    with pytest.raises(ValueError, match="make_mixer makes the mixers, so d_state would go unused"):
        MambaStack(12, 1, make_mixer=lambda index: mixer, d_state=8)
    with pytest.raises(ValueError, match="initial_state must have shape"):
        mixer(hidden, state=mixer.allocate_inference_cache(3))
