"""The parts of a Lightning loop that all trainings share: batches by step, checkpoint files, a progress bar, quiet."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from ssmkit.data import TrajectoryBatch, WindowStream
from ssmkit.train.checkpoint import load_checkpoint, save_checkpoint


class StepLoader(DataLoader[TrajectoryBatch]):
    """Serves batches `stream.first_step` .. `steps`, and says how many the whole training has."""

    def __init__(self, stream: WindowStream, steps: int, workers: int) -> None:
        super().__init__(stream, batch_size=None, num_workers=workers, persistent_workers=False)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[TrajectoryBatch]:  # type: ignore[override]
        batches = super().__iter__()
        for _ in range(self.dataset.first_step, self.steps):  # type: ignore[attr-defined]
            yield next(batches)


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
