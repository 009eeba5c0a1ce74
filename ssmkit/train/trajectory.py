"""Training of trajectory models on Lightning.

Whatever a step draws (its batch, its dropout) comes from (seed, step, rank) alone, and a checkpoint holds the rest
(weights, optimiser, schedule, past policy), so a training that was killed resumes to the numbers it would have reached.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from ssmkit.data import EpisodeSet, Scaling, TrajectoryBatch, Windows, WindowStream
from ssmkit.data.windows import Padding
from ssmkit.models.trajectory import TrajectoryModel, model_from_dict, model_to_dict
from ssmkit.train.checkpoint import LAST, LOGS, RunError, load_checkpoint, prepare_run, read_config
from ssmkit.train.loop import AtomicCheckpointIO, StepBar, StepLoader, quiet_lightning
from ssmkit.train.losses import LossWeights, trajectory_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: Optimiser steps.                    batch_size: Windows per step and device.
        lr, weight_decay, clip: AdamW, and the norm that gradients are clipped to.
        warmup: Steps of linear warm-up, then `schedule`: "cosine" down to a tenth, or "constant".
        seed: Fixes weights, batches and dropout.
        padding, faithful_padding: See `Windows`.
        state_weight, return_weight: Shares of the inverse learning objectives, for models that have them.
        refine_limit, refine_growth, stages: Label refinement by the policy of the stage before: stage k of `stages` uses
            beta = min(refine_limit, refine_growth * k / stages). A refine_limit of 0 turns it off.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 0.25
    warmup: int = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = 0
    padding: Padding = "right"
    faithful_padding: bool = False
    state_weight: float = 0.05
    return_weight: float = 0.05
    refine_limit: float = 0.5
    refine_growth: float = 0.85
    stages: int = 10
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "stages", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}")
        if not 0 <= self.refine_limit < 1:
            raise ValueError(f"refine_limit must lie in [0, 1), got {self.refine_limit}")

    @property
    def log_every(self) -> int:
        """Steps between entries of the logs."""
        return min(10, self.steps)

    @property
    def stage_steps(self) -> int:
        """Steps of one stage of label refinement."""
        return max(1, math.ceil(self.steps / self.stages))

    def beta(self, step: int) -> float:
        """Weight of the past policy in the labels at `step`."""
        return min(self.refine_limit, self.refine_growth * (step // self.stage_steps) / self.stages)

    def lr_factor(self, step: int) -> float:
        """Learning rate at `step`, as a fraction of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Where and how to run; Lightning's own words."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: str = "32-true"
    workers: int = 0


class TrajectoryTask(pl.LightningModule):
    """Loss, optimiser and batches of one training. `description` travels inside the checkpoints."""

    def __init__(
        self,
        model: TrajectoryModel,
        windows: Windows,
        options: TrainOptions,
        description: dict[str, Any],
        hardware: Hardware,
    ) -> None:
        super().__init__()
        self.model = model
        self.windows, self.options, self.description, self.hardware = windows, options, description, hardware
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

    def train_dataloader(self) -> StepLoader:
        """Batches from the step that the training stands at."""
        stream = WindowStream(
            self.windows,
            self.options.batch_size,
            seed=self.options.seed,
            first_step=self.trainer.global_step,
            rank=self.trainer.global_rank,
        )
        return StepLoader(stream, self.options.steps, self.hardware.workers)

    def on_train_batch_start(self, batch: TrajectoryBatch, batch_idx: int) -> None:
        """Seed the step; at the start of a stage, freeze the policy as it is."""
        key = (self.options.seed, self.global_step, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
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
        # Lightning's bookkeeping of a metric costs more than a small model's step; it writes every few steps anyway.
        if (self.global_step + 1) % self.options.log_every == 0:
            self.log("loss", terms["loss"].detach(), prog_bar=True)
            self.log_dict({f"{name}_loss": value.detach() for name, value in terms.items() if name != "loss"})
        return terms["loss"]

    def configure_optimizers(self) -> Any:
        """AdamW; no decay on vectors, embeddings and what a layer exempts."""
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim < 2 or id(parameter) in embeddings or hasattr(parameter, "_no_weight_decay")
                groups[not exempt].append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": self.options.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=self.options.lr,
            # Under mixed precision Lightning refuses to clip the gradients of a fused optimiser.
            fused="mixed" not in self.hardware.precision,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.options.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the description into the checkpoint."""
        checkpoint["ssmkit"] = self.description


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
    keep = ModelCheckpoint(
        dirpath=run / LAST.parent,
        save_last=True,
        save_top_k=0,
        every_n_train_steps=options.checkpoint_every,
        enable_version_counter=False,
    )
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            precision=hardware.precision,  # type: ignore[arg-type]
            max_steps=options.steps,
            max_epochs=-1,
            gradient_clip_val=options.clip,
            logger=logger if logger is not None else pl.loggers.CSVLogger(run, name=LOGS, flush_logs_every_n_steps=10),
            log_every_n_steps=options.log_every,
            callbacks=[keep, *([StepBar()] if progress else []), *(callbacks or [])],
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
        )
        if last is None or load_checkpoint(last)["global_step"] < options.steps:
            trainer.fit(task, ckpt_path=last)
            trainer.save_checkpoint(run / LAST)
        else:
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
    path = Path(run)
    if path.is_dir():
        read_config(path)
        path = path / LAST
    checkpoint = load_checkpoint(path)
    description = checkpoint.get("ssmkit")
    if not isinstance(description, dict) or description.get("kind") != "trajectory":
        raise RunError(f"{path} is not the checkpoint of a trajectory model")
    model = model_from_dict(description["model"])
    prefix = "model."
    weights = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    return model.eval(), Scaling.from_dict(description["scaling"]), description
