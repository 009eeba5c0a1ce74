"""Published checkpoints: names that load, and numbers that agree with transformers' Decision Transformer."""

import pytest
import torch

from ssmkit.models.trajectory import DecisionMamba, DecisionTransformer, trajectory_model

MIXER = ("A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight")
MIXER = (*MIXER, "in_proj.weight", "out_proj.weight", "x_proj.weight")


def names_of(model):
    return set(model.state_dict())


def test_decision_mamba_has_the_released_names():
    model = trajectory_model("decision-mamba", state_dim=3, action_dim=2, dim=16, depth=1)
    layer = "transformer_model.backbone.layers.0"
    both = {"weight", "bias"}
    expected = {f"{layer}.{mixer}.{leaf}" for mixer in ("mixer", "mixer_group") for leaf in MIXER}
    expected |= {f"{layer}.norm.weight", "transformer_model.backbone.norm_f.weight", "embed_timestep.weight"}
    expected |= {f"{layer}.{part}.{leaf}" for part in ("conv1d", "ln_norm") for leaf in both}
    expected |= {f"{part}.{leaf}" for part in ("embed_ln", "predict_state", "predict_rtg") for leaf in both}
    perceptrons = ("embed_return", "embed_state", "embed_action", "predict_action")
    expected |= {f"{part}.{fc}.{leaf}" for part in perceptrons for fc in ("fc1", "fc2") for leaf in both}
    assert names_of(model) == expected
    # What a released checkpoint holds beyond that is not used by the model.
    released = {
        **model.state_dict(),
        "transformer_model.backbone.embeddings.weight": torch.zeros(5, 16),
        "transformer_model.lm_head.weight": torch.zeros(5, 16),
    }
    model.load_state_dict(DecisionMamba.translate(released))


def test_otas_decision_mamba_has_the_released_names():
    model = trajectory_model("ota-decision-mamba", state_dim=3, action_dim=2, dim=16, depth=1)
    both = {"weight", "bias"}
    parts = ("norm_mamba", "ln_2", "mlp_channels.0", "mlp_channels.2")
    expected = {f"transformer.h.0.{part}.{leaf}" for part in parts for leaf in both}
    expected |= {f"transformer.h.0.mamba.{leaf}" for leaf in MIXER} | {"embed_timestep.weight"}
    expected |= {
        f"{part}.{leaf}"
        for part in ("transformer.ln_f", "embed_return", "embed_state", "embed_action", "embed_ln", "predict_action.0")
        for leaf in both
    }
    assert names_of(model) == expected


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_decision_transformer_is_transformers(padded):
    transformers = pytest.importorskip("transformers")
    config = transformers.DecisionTransformerConfig(
        state_dim=3,
        act_dim=2,
        hidden_size=16,
        n_layer=2,
        n_head=2,
        n_inner=64,
        max_ep_len=30,
        activation_function="relu",
    )
    torch.manual_seed(0)
    official = transformers.DecisionTransformerModel(config).eval()
    with torch.no_grad():
        # Its position embedding is not part of the model as published.
        official.encoder.wpe.weight.zero_()
    ours = trajectory_model(
        "decision-transformer", state_dim=3, action_dim=2, dim=16, depth=2, nheads=2, max_timestep=30
    ).eval()
    ours.load_state_dict(DecisionTransformer.translate(official.state_dict()))
    states, actions, returns = torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.randn(2, 5, 1)
    times = torch.arange(5).expand(2, -1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    if padded:
        mask[:, :2] = False
    with torch.no_grad():
        expected = official(
            states=states,
            actions=actions,
            rewards=None,
            returns_to_go=returns,
            timesteps=times,
            attention_mask=mask.long(),
        )
        actual = ours(states, actions, returns, times, mask if padded else None)
    for name, theirs in (
        ("actions", expected.action_preds),
        ("states", expected.state_preds),
        ("returns", expected.return_preds),
    ):
        torch.testing.assert_close(getattr(actual, name)[mask], theirs[mask], rtol=1e-5, atol=1e-6)
