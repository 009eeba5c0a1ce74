"""Training of trajectory models on Lightning."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ssmkit.data import EpisodeSet, Scaling, TrajectoryBatch, Windows
from ssmkit.models.trajectory import TrajectoryModel, model_from_dict, model_to_dict
from ssmkit.train.checkpoint import prepare_run
from ssmkit.train.loop import StepTask, run_steps, trained_weights
from ssmkit.train.losses import LossWeights, trajectory_loss
from ssmkit.train.options import Hardware, TrainOptions


class TrajectoryTask(StepTask):
    """Loss of one training, and the past policy that refines its labels."""

    options: TrainOptions

    def __init__(
        self,
        model: TrajectoryModel,
        windows: Windows,
        options: TrainOptions,
        description: dict[str, Any],
        hardware: Hardware,
    ) -> None:
        super().__init__(model, windows, options, description, hardware)
        self.weights: LossWeights | None = None
        self.past: TrajectoryModel | None = None
        if model.learns_next_step:
            self.weights = LossWeights(states=options.state_weight, returns=options.return_weight)
            if options.refine_limit > 0:
                self.past = copy.deepcopy(model).requires_grad_(False)
        # Pads on the right follow everything that is scored, so a causal model need not be told about them. The
        # published Mamba code lets its left pads into the state.
        pads_enter = options.faithful_padding and not model.released_masks_pads
        self.tells_mask = options.padding == "left" and not pads_enter

    def on_train_batch_start(self, batch: TrajectoryBatch, batch_idx: int) -> None:
        """Seed the step; at the start of a stage, freeze the policy as it is."""
        super().on_train_batch_start(batch, batch_idx)
        if self.past is not None and self.global_step % self.options.stage_steps == 0:
            self.past.load_state_dict(self.model.state_dict())

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:
        """Equation (2) of `losses` on one batch."""
        mask = batch.mask if self.tells_mask else None
        window = (batch.states, batch.actions, batch.returns, batch.timesteps, mask)
        beta, past_actions = self.options.beta(self.global_step), None
        if self.past is not None and beta > 0:
            self.past.eval()
            with torch.no_grad():
                past_actions = self.past(*window).actions
        terms = trajectory_loss(
            self.model(*window),
            batch,
            discrete=self.model.config.discrete_actions,
            weights=self.weights,
            past_actions=past_actions,
            beta=beta,
        )
        if self.logs_now:
            self.log("loss", terms["loss"].detach(), prog_bar=True)
            self.log_dict({f"{name}_loss": value.detach() for name, value in terms.items() if name != "loss"})
        return terms["loss"]


def describe(
    model: TrajectoryModel, data: EpisodeSet, scaling: Scaling, options: TrainOptions, source: str
) -> dict[str, Any]:
    """What a run is, as plain values: enough to rebuild the model and to evaluate it."""
    return {
        "kind": "trajectory",
        "version": 1,
        "model": model_to_dict(model),
        "data": {
            "source": source,
            "env": data.metadata.env,
            "env_options": dict(data.metadata.env_options),
            "episodes": len(data),
            "steps": data.steps,
            "return_quantiles": np.quantile(data.returns, (0.25, 0.5, 0.9, 1.0)).round(1).tolist(),
        },
        "scaling": scaling.to_dict(),
        "options": asdict(options),
    }


def fit(
    model: TrajectoryModel,
    data: EpisodeSet,
    run: str | Path,
    options: TrainOptions,
    *,
    source: str = "",
    hardware: Hardware | None = None,
    resume: bool = False,
    overwrite: bool = False,
    logger: Any = None,
    callbacks: list[Callback] | None = None,
    progress: bool = True,
) -> TrajectoryModel:
    """Train `model` on `data` in the run folder `run` and return it.

    Args:
        source: Where the data came from, kept in the run's description.
        resume: Continue from the newest checkpoint of `run`, if there is one.
        overwrite: Delete what a run before left in `run`. Without either, `run` must be new.
        logger: A Lightning logger; by default CSV files under run/logs.
        callbacks: Further Lightning callbacks.
    """
    run, hardware = Path(run), hardware or Hardware()
    check_fits(model, data)
    scaling = Scaling.of(data)
    description = describe(model, data, scaling, options, source)
    last = prepare_run(run, description, resume=resume, overwrite=overwrite)
    windows = Windows(
        data,
        scaling,
        context=model.config.context,
        padding=options.padding,
        faithful_padding=options.faithful_padding,
    )
    task = TrajectoryTask(model, windows, options, description, hardware)
    if not run_steps(task, run, last, logger=logger, callbacks=callbacks, progress=progress):
        return load_model(run)[0]
    return model.eval()


def check_fits(model: TrajectoryModel, data: EpisodeSet) -> None:
    """Refuse a model whose sizes are not those of the data."""
    space = data.metadata.action_space
    expected = (data.observation_dim, space.dim, space.discrete)
    found = (model.config.state_dim, model.config.action_dim, model.config.discrete_actions)
    if expected != found:
        raise ValueError(
            f"the data has (state_dim, action_dim, discrete_actions) = {expected}, the model was made for {found}"
        )


def load_model(run: str | Path) -> tuple[TrajectoryModel, Scaling, dict[str, Any]]:
    """The trained model of a run folder (or of a checkpoint file), its scaling and its description."""
    weights, description = trained_weights(run, "trajectory")
    model = model_from_dict(description["model"])
    model.load_state_dict(weights)
    return model.eval(), Scaling.from_dict(description["scaling"]), description
