"""Mamba2: the official block's numbers and weights, steps, states, pads, packing, compilation."""

import math
from functools import partial

import mixers
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names
from mixers import tokens

from ssmkit.nn import Mamba2, Mamba2Simple
from ssmkit.testing import assert_close, device_of

BACKENDS = mixers.usable("ssd", "causal_conv1d", "rms_norm", "ssd_step")
thorough = partial(mixers.thorough, BACKENDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
compiled_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
SMALL = {"d_model": 8, "d_state": 4, "headdim": 4, "d_conv": 3}
VARIANTS = {
    "plain": {},
    "groups": {"ngroups": 2},
    "gate after the norm": {"norm_before_gate": True},
    "no norm": {"rmsnorm": False},
    "gated MLP beside": {"d_ssm": 8},
    "limits": {"dt_limit": (0.3, 0.8)},
    "skip per channel": {"D_has_hdim": True},
    "biases": {"bias": True, "conv_bias": False, "conv_init": 0.5},
}
every_variant = pytest.mark.parametrize(("variant", "backend"), thorough(VARIANTS, ["groups"]))
STEPPED = [name for name in names("mamba2_block*") if "y_step" in load(name).outputs]


def layer(backend="auto", dtype=torch.float64, seed=0, kind=Mamba2, **options):
    """With parameters that all matter: D and the norm's weights away from one."""
    torch.manual_seed(seed)
    made = kind(**(SMALL | options), backend=backend).to(dtype)
    for name, parameter in made.named_parameters():
        if name in ("D", "norm.weight", "init_states"):
            torch.nn.init.normal_(parameter)
        if name == "dt_bias":
            torch.nn.init.uniform_(parameter, -2.0, 1.0)
    return made.to(device_of(backend))


def official(name, backend, dtype):
    case = load(name)
    options = {k: v for k, v in case.meta["config"].items() if k != "layer_idx"}
    kind = Mamba2Simple if "simple" in name else Mamba2
    mixer = kind(**options, backend=backend)
    mixer.load_state_dict(case.params, strict=True)
    return case, mixer.to(device_of(backend), dtype)


@pytest.mark.parametrize(
    ("name", "backend"), thorough([*names("mamba2_block*"), "mamba2_simple_block"], ["mamba2_block_g2_bias"])
)
def test_official_block(name, backend):
    for dtype in (torch.float64, torch.float32):
        mixers.check_official_block(*official(name, backend, dtype))


@pytest.mark.parametrize(("name", "backend"), thorough(STEPPED, ["mamba2_block_dmlp"]))
def test_official_step_and_states(name, backend):
    mixers.check_official_steps(*official(name, backend, torch.float64))


def test_transformers_mixer_gives_the_same_numbers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=24, state_size=8, num_heads=6, head_dim=8, n_groups=1, expand=2, chunk_size=16, num_hidden_layers=1
    )
    torch.manual_seed(0)
    theirs = Mamba2Mixer(config, layer_idx=0).double().eval()
    ours = Mamba2(24, d_state=8, headdim=8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    hidden = tokens(dim=24, seqlen=33)
    with torch.no_grad():
        # Its scan and its norm run in float32 whatever the layer's dtype.
        assert_close("y", ours.double()(hidden).float(), theirs(hidden))


@every_variant
def test_step_equals_forward(variant, backend):
    mixers.check_step_equals_forward(layer(backend, **VARIANTS[variant]), tokens(backend, seqlen=5))


@pytest.mark.parametrize(("cut", "backend"), thorough([0, 1, 6], [6]))
def test_carried_state_equals_one_pass(cut, backend):
    mixers.check_carried_state(layer(backend, ngroups=2), tokens(backend), cut)


def test_inference_params_like_the_official_ones():
    mixer, hidden = layer(layer_idx=3), tokens()
    cache, expected = mixers.inference_params(), mixer(hidden)
    for _ in range(2):  # the second prompt starts from fresh states
        torch.testing.assert_close(mixers.prompt_and_steps(mixer, hidden, cache), expected)
    with torch.no_grad():
        # Packed prompts leave a state for each sequence.
        cache.seqlen_offset, cache.key_value_memory_dict = 0, {}
        packed = torch.cat([hidden[0, :4], hidden[1, :7]])[None]
        mixer(packed, cu_seqlens=torch.tensor([0, 4, 11]), inference_params=cache)
        cache.seqlen_offset = 7
        step = mixer(torch.stack([hidden[0, 4:5], hidden[1, 7:8]]), inference_params=cache)
    torch.testing.assert_close(step[:, 0], torch.stack([expected[0, 4], expected[1, 7]]))
    assert set(cache.key_value_memory_dict) == {3}


def test_inference_params_of_a_layer_that_was_moved():
    mixers.check_inference_params_elsewhere(layer(layer_idx=3), tokens())


def test_flattened_input_like_the_official_one():
    mixer, hidden = layer(layer_idx=0), tokens()
    expected = mixer(hidden)
    torch.testing.assert_close(mixer(hidden.flatten(0, 1), 11), expected.flatten(0, 1))
    cache = mixers.inference_params()
    with torch.no_grad():
        rows = []
        for token in range(3):
            rows.append(mixer(hidden[:, token], seqlen=1, inference_params=cache))
            cache.seqlen_offset += 1
    torch.testing.assert_close(torch.stack(rows, dim=1), expected[:, :3])


@pytest.mark.parametrize(("side", "backend"), thorough(["left", "inside"], ["inside"]))
def test_pads_change_nothing(side, backend):
    real = {"left": [3, 4, 5, 6, 7, 8, 9, 10], "inside": [1, 2, 6, 9]}[side]
    mixers.check_pads(layer(backend), tokens(backend), real, values=(0.0, 1e4))


@every_variant
def test_packed_equals_separate_sequences(variant, backend):
    mixer, hidden = layer(backend, **VARIANTS[variant]), tokens(backend, batch=1)
    mixers.check_packed(mixer, hidden, dy=tokens(backend, batch=1, seed=2))


@every_backend
def test_negative_sequence_numbers_are_pads(backend):
    """Before, between and behind the sequences, and within one; the state from before and that left behind stay."""
    mixer, hidden = layer(backend), tokens(backend)
    numbers = torch.tensor([-1, 0, -1, 0, -1, 1, 1, 1, -1, -2, -1], device=hidden.device).expand(2, 11)
    state, same = mixer.allocate_inference_cache(2), mixer.allocate_inference_cache(2)
    with torch.no_grad():
        for into in (state, same):
            mixer(tokens(backend, seqlen=3, seed=3), state=into)
        y = mixer(hidden, seq_idx=numbers, state=state)
        first = mixer(hidden[:, [1, 3]], state=same)
        for part in same:
            part.zero_()
        second = mixer(hidden[:, 5:8], state=same)
    torch.testing.assert_close(y[:, [1, 3, 5, 6, 7]], torch.cat([first, second], dim=1))
    torch.testing.assert_close(state, same)


@every_backend
def test_packed_sequences_continue_their_states(backend):
    mixers.check_packed_states(layer(backend), tokens(backend, batch=3))


def test_the_norm_has_one_mean_for_each_group():
    mixer, hidden = layer(ngroups=2), tokens()
    assert mixer.norm.group_size == mixer.d_ssm // 2
    whole = layer(ngroups=2)
    whole.norm.group_size = None
    assert not torch.allclose(mixer(hidden), whole(hidden))


@every_backend
def test_learned_initial_states(backend):
    options = {"kind": Mamba2Simple, "learnable_init_states": True, "ngroups": 2}
    mixer, hidden = layer(backend, **options), tokens(backend, batch=1)
    separate = torch.cat([mixer(hidden[:, :4]), mixer(hidden[:, 4:])], dim=1)
    packed = mixer(hidden, cu_seqlens=torch.tensor([0, 4, 11], device=hidden.device))
    torch.testing.assert_close(packed, separate)
    state = mixer.allocate_inference_cache(1)
    with torch.no_grad():
        stepped = [mixer.step(hidden[:, t : t + 1], *state)[0] for t in range(4)]
    torch.testing.assert_close(torch.cat(stepped, dim=1), separate[:, :4])
    numbers = torch.arange(11, device=hidden.device).ge(4)[None].int()
    after_reset = mixer(hidden, numbers)
    torch.testing.assert_close(after_reset[:, :4], separate[:, :4])
    assert not torch.allclose(after_reset[:, 4:], separate[:, 4:])


def test_initialisation():
    torch.manual_seed(0)
    mixer = Mamba2(512, headdim=2, dt_min=0.002, dt_max=0.05, A_init_range=(2, 8), conv_init=0.3)
    assert mixer.nheads == 512
    # Uniform in log dt, in A and in the taps: within the range, and mean and deviation within five of their own deviations.
    log_dt = F.softplus(mixer.dt_bias).log()
    for drawn, low, high in (
        (log_dt, math.log(0.002), math.log(0.05)),
        (mixer.A_log.exp(), 2, 8),
        (mixer.conv1d.weight, -0.3, 0.3),
    ):
        assert drawn.min() >= low - 1e-5 * abs(low) and drawn.max() <= high + 1e-5 * abs(high)
        spread = (high - low) / 12**0.5
        assert (drawn.mean() - (high + low) / 2).abs() <= 5 * spread / drawn.numel() ** 0.5
        assert (drawn.std() / spread - 1).abs() <= 5 / drawn.numel() ** 0.5
    assert (F.softplus(Mamba2(64, headdim=2, dt_min=1e-6, dt_max=1e-6).dt_bias) >= 1e-4 * (1 - 1e-4)).all()
    assert torch.equal(mixer.D, torch.ones(512))
    assert torch.equal(mixer.norm.weight, torch.ones(1024))
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
        assert parameter._no_weight_decay


def test_names_shapes_and_dtypes_of_the_parameters():
    mixer = Mamba2(32, d_state=8, headdim=16, ngroups=2, bias=True, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in mixer.state_dict().items()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 64 + 4 * 8 + 4, 32),
        "in_proj.bias": (2 * 64 + 4 * 8 + 4,),
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
        "out_proj.bias": (32,),
    }
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == {"D"}
    assert Mamba2(32, headdim=16, D_has_hdim=True).D.shape == (64,)
    assert Mamba2(32, device="meta").in_proj.weight.is_meta


# Of mamba2-130m to mamba2-2.7b: blocks, width and parameters; all but the embedding and the norms belong to the mixers.
PUBLISHED = {
    "130m": (24, 768, 128_989_632),
    "370m": (48, 1024, 368_346_624),
    "780m": (48, 1536, 780_161_280),
    "1.3b": (48, 2048, 1_343_757_312),
    "2.7b": (64, 2560, 2_702_599_680),
}


@pytest.mark.parametrize(("n_layer", "d_model", "total"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_parameter_counts(n_layer, d_model, total):
    mixer = sum(p.numel() for p in Mamba2(d_model, device="meta").parameters())
    assert n_layer * (mixer + d_model) + d_model + 50288 * d_model == total


@pytest.mark.parametrize(("dtype", "backend"), thorough(["bfloat16", "float16"], ["bfloat16"]))
def test_low_precision_and_autocast(dtype, backend):
    dtype = getattr(torch, dtype)
    mixer, hidden = layer(backend, torch.float32), tokens(backend, dtype=torch.float32)
    expected = mixer(hidden)
    for output in mixers.low_precision(mixer, layer(backend, dtype), hidden, dtype, [dtype, torch.float32]):
        # Five roundings to dtype between input and output, and those of the weights, each of the size of one eps.
        assert (output - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@compiled_backend
def test_compile_fullgraph(backend):
    mixer, hidden = layer(backend, torch.float32), tokens(backend, dtype=torch.float32)
    numbers = torch.arange(11, device=hidden.device).ge(8).int().expand(2, 11)
    mixers.check_compile_fullgraph(mixer, hidden, seq_idx=numbers)


@pytest.mark.slow
def test_compile_with_inductor():
    mixers.check_compile_with_inductor(layer("auto", torch.float32), tokens(dtype=torch.float32))


@compiled_backend
def test_export(backend):
    inputs = (tokens(backend, seqlen=seqlen, dtype=torch.float32) for seqlen in (11, 20))
    mixers.check_export(layer(backend, torch.float32), *inputs)


BAD = {
    "d_state": ({"d_state": 0}, "d_state must be at least 1, got 0"),
    "ngroups": ({"ngroups": 3}, "ngroups must divide the number of heads 4, got 3"),
    "headdim": ({"headdim": 5}, "d_ssm must be a multiple of headdim 5 from 1 to the inner width 16, got 16"),
    "d_ssm": ({"d_ssm": 32}, "d_ssm must be a multiple of headdim 4 from 1 to the inner width 16, got 32"),
    "A_init_range": (
        {"A_init_range": (0, 1)},
        r"A_init_range must be \(low, high\) with 0 < low <= high, got \(0, 1\)",
    ),
    "dt_min": ({"dt_min": 0.0}, "step sizes need 0 < dt_min <= dt_max, got 0.0 and 0.1"),
    "dt_limit": ({"dt_limit": (1, 0)}, r"dt_limit must be \(low, high\) with low <= high, got \(1, 0\)"),
    "process_group": ({"process_group": "world"}, "process_group must be None, got 'world': the layer is not split"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**(SMALL | options))


def test_bad_calls():
    mixer, hidden = layer(), tokens()
    mixers.check_bad_states(mixer, hidden, walk="mask, resets, seq_idx or cu_seqlens")
    with pytest.raises(
        ValueError, match=r"with seqlen 11, got \(2, 11, 8\); leave seqlen out for \(batch, seqlen, 8\)"
    ):
        mixer(hidden, seqlen=11)
    with pytest.raises(ValueError, match=r"seq_idx must have shape \(2, 11\)"):
        mixer(hidden, seq_idx=torch.zeros(2, 10, dtype=torch.int32))
    with pytest.raises(ValueError, match="initial_state must have shape"):
        mixer(hidden, state=mixer.allocate_inference_cache(3))
    with pytest.raises(ValueError, match="activation must be 'silu' or 'swish', got 'gelu'"):
        Mamba2Simple(64, activation="gelu")
