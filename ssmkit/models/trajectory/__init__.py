"""Trajectory models by name: each has a config, named variants, and one interface (`TrajectoryModel`)."""

from dataclasses import asdict, fields
from typing import Any, NamedTuple

from ssmkit.models.trajectory import behaviour_cloning, decision_mamba, decision_transformer, ota_decision_mamba
from ssmkit.models.trajectory.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from ssmkit.models.trajectory.common import Prediction, Stream, TrajectoryModel
from ssmkit.models.trajectory.decision_mamba import DecisionMamba, DecisionMambaConfig
from ssmkit.models.trajectory.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from ssmkit.models.trajectory.ota_decision_mamba import OtaDecisionMamba, OtaDecisionMambaConfig


class ModelRow(NamedTuple):
    """A model, its config and its variants: overrides of the config's defaults, by name."""

    model: type[TrajectoryModel]
    config: type[Any]
    variants: dict[str, dict[str, Any]]


MODELS = {
    "decision-mamba": ModelRow(DecisionMamba, DecisionMambaConfig, decision_mamba.VARIANTS),
    "ota-decision-mamba": ModelRow(OtaDecisionMamba, OtaDecisionMambaConfig, ota_decision_mamba.VARIANTS),
    "decision-transformer": ModelRow(DecisionTransformer, DecisionTransformerConfig, decision_transformer.VARIANTS),
    "behaviour-cloning": ModelRow(BehaviourCloning, BehaviourCloningConfig, behaviour_cloning.VARIANTS),
}


def row_of(name: str) -> ModelRow:
    """The row of MODELS, or an error that lists the names."""
    if name not in MODELS:
        raise ValueError(f"unknown trajectory model {name!r}, known: {', '.join(MODELS)}")
    return MODELS[name]


def trajectory_model(name: str, variant: str | None = None, **overrides: Any) -> TrajectoryModel:
    """A model of a named variant, e.g. trajectory_model("decision-mamba", "demo", state_dim=3, action_dim=1).

    Args:
        name: A row of MODELS.
        variant: A row of the model's variants; the first one (the published sizes) if None.
        overrides: Fields of the model's config; state_dim and action_dim are required.
    """
    row = row_of(name)
    variant = variant or next(iter(row.variants))
    if variant not in row.variants:
        raise ValueError(f"unknown variant {variant!r} of {name}, known: {', '.join(row.variants)}")
    known = {entry.name for entry in fields(row.config)}
    unknown = set(overrides) - known
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return row.model(row.config(**{**row.variants[variant], **overrides}))


def model_to_dict(model: TrajectoryModel) -> dict[str, Any]:
    """Name and config of a model, for JSON."""
    name = next(name for name, row in MODELS.items() if type(model) is row.model)
    return {"name": name, "config": asdict(model.config)}


def model_from_dict(values: dict[str, Any]) -> TrajectoryModel:
    """The opposite of `model_to_dict`, with fresh weights."""
    row = row_of(values["name"])
    return row.model(row.config(**values["config"]))


__all__ = [
    "MODELS",
    "BehaviourCloning",
    "BehaviourCloningConfig",
    "DecisionMamba",
    "DecisionMambaConfig",
    "DecisionTransformer",
    "DecisionTransformerConfig",
    "ModelRow",
    "OtaDecisionMamba",
    "OtaDecisionMambaConfig",
    "Prediction",
    "Stream",
    "TrajectoryModel",
    "model_from_dict",
    "model_to_dict",
    "row_of",
    "trajectory_model",
]
