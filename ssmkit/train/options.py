"""How to train and on what hardware: plain values, importable without Lightning."""

import math
from dataclasses import dataclass
from typing import Literal

from ssmkit.data.windows import Padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Where and how to run; Lightning's own words."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: str = "32-true"
    workers: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    """What every training by steps has.

    Attributes:
        steps: Optimiser steps.                    batch_size: Windows per step and device.
        lr, weight_decay, clip: AdamW, and the norm that gradients are clipped to.
        warmup: Steps of linear warm-up, then `schedule`: "cosine" down to a tenth, or "constant".
        seed: Fixes weights, batches and dropout.
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
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        self.require_positive("steps", "batch_size", "checkpoint_every")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}")

    def require_positive(self, *names: str) -> None:
        """Refuse counts below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def log_every(self) -> int:
        """Steps between entries of the logs."""
        return min(10, self.steps)

    def lr_factor(self, step: int) -> float:
        """Learning rate at `step`, as a fraction of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(StepOptions):
    """How to train a trajectory model.

    Attributes:
        padding, faithful_padding: See `Windows`.
        state_weight, return_weight: Shares of the inverse learning objectives, for models that have them.
        refine_limit, refine_growth, stages: Label refinement by the policy of the stage before: stage k of `stages` uses
            beta = min(refine_limit, refine_growth * k / stages). A refine_limit of 0 turns it off.
    """

    padding: Padding = "right"
    faithful_padding: bool = False
    state_weight: float = 0.05
    return_weight: float = 0.05
    refine_limit: float = 0.5
    refine_growth: float = 0.85
    stages: int = 10

    def __post_init__(self) -> None:
        StepOptions.__post_init__(self)
        self.require_positive("stages")
        if not 0 <= self.refine_limit < 1:
            raise ValueError(f"refine_limit must lie in [0, 1), got {self.refine_limit}")

    @property
    def stage_steps(self) -> int:
        """Steps of one stage of label refinement."""
        return max(1, math.ceil(self.steps / self.stages))

    def beta(self, step: int) -> float:
        """Weight of the past policy in the labels at `step`."""
        return min(self.refine_limit, self.refine_growth * (step // self.stage_steps) / self.stages)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageOptions(StepOptions):
    """How to train a language model.

    Attributes:
        context: Bytes per window.
        valid_every, valid_bytes: Steps between looks at the held-out text, and how much of it is read each time; the end
            of the training reads all of it.
        sample_bytes: How much the model writes at each look.
        carry_state: Windows follow one another in the text, each with the state that the one before left; gradients stop
            between them (truncated backpropagation). Otherwise windows are drawn anywhere.
    """

    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    context: int = 512
    valid_every: int = 100
    valid_bytes: int = 32768
    sample_bytes: int = 200
    carry_state: bool = False

    def __post_init__(self) -> None:
        StepOptions.__post_init__(self)
        self.require_positive("context", "valid_every", "valid_bytes")
        if self.context < 2:
            raise ValueError(f"context must be at least 2, got {self.context}")
        if self.sample_bytes < 0:
            raise ValueError(f"sample_bytes must be at least 0, got {self.sample_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionOptions(StepOptions):
    """How to train a classifier of images or clips.

    Attributes:
        size: Height and width that samples have.
        frames: Of a clip; images ignore it.
        augment: "none", "light" or "full": see `ssmkit.train.augment`.
        mixup, cutmix: Parameters of the beta distributions of their shares; 0 turns either off.
        label_smoothing: Share of the target that goes to all classes alike.
        valid_every, valid_samples: Steps between looks at the held-out samples, and how many each look classifies; the end
            of the training classifies all.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 5.0
    size: int = 224
    frames: int = 8
    augment: str = "light"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    valid_every: int = 100
    valid_samples: int = 512

    def __post_init__(self) -> None:
        StepOptions.__post_init__(self)
        self.require_positive("size", "frames", "valid_every", "valid_samples")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
