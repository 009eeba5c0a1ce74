"""The parts of a Lightning loop that all trainings share: steps, batches by step, checkpoint files, a bar, quiet.

Whatever a step draws (its batch, its dropout) comes from (seed, step, rank) alone, and a checkpoint holds the rest, so a
training that was killed resumes to the numbers it would have reached.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssmkit.data.windows import StepBatches, WindowStream
from ssmkit.train.checkpoint import LAST, LOGS, RunError, load_checkpoint, read_config, save_checkpoint
from ssmkit.train.options import Hardware, StepOptions


class StepLoader(DataLoader[Any]):
    """Serves batches `stream.first_step` .. `steps`, and says how many the whole training has."""

    def __init__(self, stream: WindowStream, steps: int, workers: int) -> None:
        super().__init__(stream, batch_size=None, num_workers=workers, persistent_workers=False)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for _ in range(self.dataset.first_step, self.steps):  # type: ignore[attr-defined]
            yield next(batches)


class StepTask(pl.LightningModule):
    """Batches, seeds and optimiser of one training; a family of models adds its loss as `training_step`.

    `description` travels inside the checkpoints.
    """

    betas = (0.9, 0.999)

    def __init__(
        self,
        model: nn.Module,
        windows: StepBatches,
        options: StepOptions,
        description: dict[str, Any],
        hardware: Hardware,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.windows, self.description, self.hardware = windows, description, hardware
        self.options: Any = options

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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        key = (self.options.seed, self.global_step, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    @property
    def logs_now(self) -> bool:
        """Whether this step enters the logs. Lightning's bookkeeping of a metric costs more than a small model's step."""
        return bool((self.global_step + 1) % self.options.log_every == 0)

    def configure_optimizers(self) -> Any:
        """AdamW; no decay on vectors, embeddings and what a layer or the model exempts."""
        named = getattr(self.model, "no_weight_decay", set[str])()
        exempted = {id(parameter) for name, parameter in self.model.named_parameters() if name in named}
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim < 2 or id(parameter) in embeddings | exempted
                exempt = exempt or hasattr(parameter, "_no_weight_decay")
                groups[not exempt].append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": self.options.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=self.options.lr,
            betas=self.betas,
            # Under mixed precision Lightning refuses to clip the gradients of a fused optimiser.
            fused="mixed" not in self.hardware.precision,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.options.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the description into the checkpoint."""
        checkpoint["ssmkit"] = self.description


def run_steps(
    task: StepTask,
    run: Path,
    last: str | None,
    *,
    logger: Any = None,
    callbacks: list[Callback] | None = None,
    progress: bool = True,
) -> bool:
    """Train from the checkpoint `last`, or from the start, to the last step; False if `last` was there already.

    Args:
        logger: A Lightning logger; by default CSV files under run/logs.
        callbacks: Further Lightning callbacks.
    """
    options, hardware = task.options, task.hardware
    if last is not None and load_checkpoint(last)["global_step"] >= options.steps:
        return False
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
        trainer.fit(task, ckpt_path=last)
        trainer.save_checkpoint(run / LAST)
    return True


def trained_weights(run: str | Path, *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description of a run folder (or of a checkpoint file) of one of these kinds of model."""
    path = Path(run)
    if path.is_dir():
        read_config(path)
        path = path / LAST
    checkpoint = load_checkpoint(path)
    description = checkpoint.get("ssmkit")
    if not isinstance(description, dict) or description.get("kind") not in kinds:
        raise RunError(f"{path} is not the checkpoint of a {' or '.join(kinds)} model")
    prefix = "model."
    weights = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return weights, description


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole or not there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, in full or not at all."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read, or say what is wrong."""
        return load_checkpoint(path, map_location)


class StepBar(TQDMProgressBar):
    """Lightning's bar, counting optimiser steps."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)

    def on_train_epoch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Name the bar after what it counts."""
        super().on_train_epoch_start(trainer, *rest)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The loss, without the version number of the logs."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


# What this loop does on purpose, or cannot help, and Lightning warns about.
POINTLESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*IterableDataset. has .__len__. defined.*",
    ".*dataloader is not resumable.*",
    ".*save_last=True.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists.*",
    ".*GPU available but not used.*",
    ".*LeafSpec.*",
)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's advertisements and the warnings that this loop makes pointless; errors pass."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in POINTLESS_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)
