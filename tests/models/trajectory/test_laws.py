"""What every trajectory model must obey: alignment, deaf pads, streams that equal windows, start values."""

import pytest
import torch

from ssmkit.models.trajectory import MODELS, DecisionMamba, model_from_dict, model_to_dict, trajectory_model
from ssmkit.nn import Mamba

BATCH, STEPS, STATE, ACTION = 2, 7, 3, 2
SMALL = {"dim": 16, "depth": 2}
CONFIGS = {
    "decision-mamba": ("decision-mamba", {}),
    "decision-mamba, linear": ("decision-mamba", {"embedding": "linear"}),
    "ota-decision-mamba": ("ota-decision-mamba", {}),
    "decision-transformer": ("decision-transformer", {"nheads": 2}),
    "behaviour-cloning": ("behaviour-cloning", {"history": 3, "context": 3}),
}
STREAMING = {label: row for label, row in CONFIGS.items() if MODELS[row[0]].model.streams}


def make(name, seed=0, **options):
    torch.manual_seed(seed)
    return trajectory_model(name, None, **{"state_dim": STATE, "action_dim": ACTION, **SMALL, **options}).eval()


def window(batch=BATCH, steps=STEPS, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    states, actions, returns = (
        torch.randn(batch, steps, size, generator=generator, dtype=dtype) for size in (STATE, ACTION, 1)
    )
    return states, actions, returns, torch.arange(steps).expand(batch, -1)


def influence(output, inputs):
    """Largest |gradient| of `output` per step of each input, (steps,) each."""
    gradients = torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True)
    return [
        torch.zeros(x.shape[1]) if g is None else g.abs().amax(dim=(0, 2))
        for g, x in zip(gradients, inputs, strict=True)
    ]


@pytest.mark.parametrize(("name", "options"), CONFIGS.values(), ids=CONFIGS)
def test_no_prediction_sees_what_it_predicts(name, options):
    """a_t from nothing later than (R_t, s_t, a_{t-1}); s_{t+1} and R_{t+1} from nothing later than a_t."""
    model = make(name, **options).double()
    states, actions, returns, times = window()
    inputs = [x.requires_grad_() for x in (states, actions, returns)]
    prediction = model(*inputs, times)
    for t in range(STEPS):
        by_state, by_action, by_return = influence(prediction.actions[:, t].sum(), inputs)
        assert (by_action[t:] == 0).all()
        assert (by_state[t + 1 :] == 0).all()
        assert (by_return[t + 1 :] == 0).all()
        # and it does use what it may
        assert by_state[t] > 0
        if name != "behaviour-cloning":
            assert (by_state[:t] > 0).all()
            assert (by_action[:t] > 0).all()
            assert (by_return[: t + 1] > 0).all()
        for following in (prediction.states, prediction.returns):
            if following is not None:
                by_state, by_action, by_return = influence(following[:, t].sum(), inputs)
                assert (by_state[t + 1 :] == 0).all()
                assert (by_return[t + 1 :] == 0).all()
                assert (by_action[t + 1 :] == 0).all()
                assert by_action[t] > 0


def test_released_tiling_leaks_the_action_it_predicts():
    """The published code's tiling fails the law above; that is why it is an option and not the model."""
    model = make("decision-mamba", released_tiling=True).double()
    states, actions, returns, times = window(steps=20)
    actions.requires_grad_()
    prediction = model(states, actions, returns, times)
    leaks = {t for t in range(20) if influence(prediction.actions[:, t].sum(), [actions])[0][t:].max() > 0}
    # Token 3t + 1 receives the group 3t + 1 mod 20; through the coarse scan of later blocks a leak spreads onwards.
    assert {0, 1, 2, 3, 4, 5, 6, 10, 11, 12} <= leaks
    single = make("decision-mamba", released_tiling=True, depth=1).double()
    prediction = single(states, actions, returns, times)
    own = {t for t in range(20) if influence(prediction.actions[:, t].sum(), [actions])[0][t] > 0}
    assert own == {0, 1, 2, 3, 4, 5, 6, 10, 11, 12}
    with pytest.raises(ValueError, match="cannot stream"):
        model.allocate_stream(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "options"), CONFIGS.values(), ids=CONFIGS)
def test_pads_change_nothing(name, options, side):
    """Neither how many pads there are nor what they hold."""
    model = make(name, **options).double()
    states, actions, returns, times = window()
    expected = model(states, actions, returns, times)
    for pads, fill in ((1, 0.0), (4, 5.0), (4, -10.0)):
        edge = (pads, 0) if side == "left" else (0, pads)
        padded = [torch.nn.functional.pad(x, (0, 0, *edge), value=fill) for x in (states, actions, returns)]
        mask = torch.nn.functional.pad(torch.ones(BATCH, STEPS, dtype=torch.bool), edge)
        actual = model(*padded, torch.nn.functional.pad(times, edge, value=3), mask)
        for one, other in zip(actual, expected, strict=True):
            if other is not None:
                torch.testing.assert_close(one[mask].unflatten(0, (BATCH, STEPS)), other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), STREAMING.values(), ids=STREAMING)
def test_a_stream_equals_the_window(name, options):
    model = make(name, **options)
    states, actions, returns, times = window(dtype=torch.float32)
    expected = model(states, actions, returns, times).actions
    stream = model.allocate_stream(BATCH)
    for t in range(STEPS):
        actual = model.step(states[:, t], returns[:, t], actions[:, t - 1] if t else None, stream)
        torch.testing.assert_close(actual, expected[:, t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["decision-mamba", "ota-decision-mamba"])
def test_a_stream_needs_the_action_before(name):
    model = make(name)
    states, _, returns, _ = window(dtype=torch.float32)
    stream = model.allocate_stream(BATCH)
    model.step(states[:, 0], returns[:, 0], None, stream)
    with pytest.raises(ValueError, match="previous_action must be given"):
        model.step(states[:, 1], returns[:, 1], None, stream)


@pytest.mark.parametrize("name", ["decision-transformer", "behaviour-cloning"])
def test_models_without_a_state_say_so(name):
    with pytest.raises(ValueError, match="roll out windowed"):
        make(name).allocate_stream(1)


@pytest.mark.parametrize("name", ["decision-mamba", "ota-decision-mamba"])
def test_step_sizes_survive_construction(name):
    for mixer in (module for module in make(name).modules() if isinstance(module, Mamba)):
        dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 1e-4
        assert dt.max() <= 0.1 * (1 + 1e-5)


def test_the_released_step_sizes_can_be_had():
    for mixer in (m for m in make("ota-decision-mamba", released_dt_bias=True).modules() if isinstance(m, Mamba)):
        assert (mixer.dt_proj.bias == 0).all()


@pytest.mark.parametrize(("name", "options"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_a_model_is_rebuilt_from_its_description(name, options, discrete):
    model = make(name, **options, discrete_actions=discrete)
    rebuilt = model_from_dict(model_to_dict(model)).eval()
    rebuilt.load_state_dict(model.state_dict())
    inputs = window(dtype=torch.float32)
    assert torch.equal(rebuilt(*inputs).actions, model(*inputs).actions)


@pytest.mark.parametrize("name", ["ota-decision-mamba", "decision-transformer", "behaviour-cloning"])
def test_bounded_actions_stay_within_the_bounds_and_logits_do_not(name):
    states, actions, returns, times = window(dtype=torch.float32)
    bounded, free = make(name), make(name, discrete_actions=True)
    for model in (bounded, free):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)
    assert bounded(states, actions, returns, times).actions.abs().max() <= 1
    assert free(states, actions, returns, times).actions.abs().max() > 1


def test_late_steps_share_the_last_time_embedding():
    model = make("decision-mamba", max_timestep=5)
    states, actions, returns, times = window(dtype=torch.float32)
    expected = model(states, actions, returns, times.clamp(max=4)).actions
    assert torch.equal(model(states, actions, returns, times).actions, expected)


def test_published_sizes():
    """9,314,304 parameters per layer of the released Decision Mamba: two mixers, the grouping, two norms."""
    with torch.device("meta"):
        model = trajectory_model("decision-mamba", state_dim=11, action_dim=3, depth=1)
    assert isinstance(model, DecisionMamba)
    assert sum(p.numel() for p in model.backbone.layers.parameters()) == 9_314_304
    assert (model.config.dim, model.config.context) == (768, 20)


BAD = {
    "an unknown model": ("mamba", None, {}, "unknown trajectory model 'mamba', known: decision-mamba, "),
    "an unknown variant": ("decision-mamba", "huge", {}, "unknown variant 'huge' of decision-mamba, known: released, "),
    "an unknown option": (
        "decision-mamba",
        None,
        {"width_of": 3},
        "decision-mamba has no option width_of; it has action_dim",
    ),
    "a size of zero": ("decision-mamba", None, {"dim": 0}, "dim must be at least 1, got 0"),
    "an unknown embedding": (
        "decision-mamba",
        None,
        {"embedding": "cnn"},
        "embedding must be 'mlp' or 'linear', got 'cnn'",
    ),
    "heads that do not divide": (
        "decision-transformer",
        None,
        {"nheads": 3},
        r"dim \(128\) must be a multiple of nheads",
    ),
    "a history beyond the window": ("behaviour-cloning", None, {"history": 4}, "must hold the history"),
}


@pytest.mark.parametrize(("name", "variant", "options", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused(name, variant, options, message):
    with pytest.raises(ValueError, match=message):
        trajectory_model(name, variant, state_dim=3, action_dim=1, **options)
