"""Training of image and clip classifiers on Lightning: cross-entropy of the class, held-out accuracy, plots."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ssmkit.data.atomic import atomic_write_text
from ssmkit.data.clips import ClipData
from ssmkit.data.images import ImageData
from ssmkit.models import create_model
from ssmkit.models.registry import entry_of, takes
from ssmkit.models.vision.backbone import VisionBackbone
from ssmkit.train.augment import Augment, mix
from ssmkit.train.checkpoint import prepare_run, process_rank
from ssmkit.train.loop import StepTask, run_steps, trained_weights
from ssmkit.train.options import Hardware, VisionOptions
from ssmkit.train.report import plot_confusion, plot_receptive_fields

RESULTS, CONFUSION, FIELDS = "results.json", "confusion.png", "receptive_fields.png"
FIELD_SAMPLES = 16  # whose receptive fields are averaged

Kind = Literal["vision", "video"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionResults:
    """What a training reached on the held-out samples.

    Attributes:
        accuracy: Share of the held-out samples whose class was told.
        loss: Mean cross-entropy, in nats.
        samples: How many there are.
        confusion: How often class i (row) was called class j (column).
    """

    accuracy: float
    loss: float
    samples: int
    confusion: list[list[int]]

    def __str__(self) -> str:
        return f"held out: {100 * self.accuracy:.2f} % of {self.samples} right, cross-entropy {self.loss:.4f}"


class SampleBatches:
    """Batches of a map-style data set: every sample once per epoch, in an order drawn from (seed, rank, epoch)."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def batch(self, batch_size: int, *, seed: int, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Batch number `step`: samples (batch, ...) and labels (batch,)."""
        count = len(self.samples)
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        indices = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(places // count):
            order = np.random.default_rng([seed, rank, int(epoch)]).permutation(count)
            inside = places // count == epoch
            indices[inside] = order[places[inside] % count]
        with torch.random.fork_rng(devices=[]):
            # Data sets that draw (frames of a clip) draw from this.
            torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
            drawn = [self.samples[int(index)] for index in indices]
        return torch.stack([x for x, _ in drawn]), torch.tensor([label for _, label in drawn])


class VisionTask(StepTask):
    """The loss: cross-entropy of the class, smoothed and mixed where the options say so."""

    options: VisionOptions

    def __init__(self, model: nn.Module, data: ImageData | ClipData, *rest: Any) -> None:
        super().__init__(model, SampleBatches(data.train), *rest)
        self.normalise = Normalise(data.mean, data.std)
        clip = isinstance(data, ClipData)
        self.augment = Augment(self.options.size, self.options.augment, flip=data.flip, clip=clip)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of samples and their labels."""
        x, labels = batch
        mixed = mix(self.normalise(self.augment(x)), labels, self.options.mixup, self.options.cutmix)
        logits = self.model(mixed.x).float()
        losses = [
            F.cross_entropy(logits, target, reduction="none", label_smoothing=self.options.label_smoothing)
            for target in (mixed.first, mixed.second)
        ]
        loss = torch.lerp(losses[1], losses[0], mixed.weight.to(losses[0])).mean()
        if self.logs_now:
            self.log("loss", loss.detach(), prog_bar=True)
            self.log("accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return loss


class Normalise(nn.Module):
    """(x - mean) / std per channel, dim 1."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std).clamp_min(1e-3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Samples (batch, channels, ...)."""
        axes = (-1, *(1,) * (x.ndim - 2))
        mean, std = (self.get_buffer(name).view(axes).to(x) for name in ("mean", "std"))
        return (x - mean) / std


@torch.no_grad()
def measure(
    model: nn.Module, data: ImageData | ClipData, *, batch_size: int, workers: int = 0, at_most: int | None = None
) -> VisionResults:
    """Classify the held-out samples, or `at_most` so many of them, always the same; the model's mode is as before."""
    training, device = model.training, next(model.parameters()).device
    normalise = Normalise(data.mean, data.std).to(device)
    total = len(data.held_out)  # type: ignore[arg-type]
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:at_most])
    samples = Subset(data.held_out, chosen.tolist())
    count = len(data.classes)
    confusion, loss = torch.zeros(count, count, dtype=torch.int64), 0.0
    model.eval()
    for x, labels in DataLoader(samples, batch_size=batch_size, num_workers=workers):
        logits = model(normalise(x.to(device))).float().cpu()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        confusion += torch.bincount(labels * count + logits.argmax(1), minlength=count**2).view(count, count)
    model.train(training)
    right = int(confusion.diagonal().sum())
    return VisionResults(
        accuracy=right / len(samples), loss=loss / len(samples), samples=len(samples), confusion=confusion.tolist()
    )


def receptive_fields(model: VisionBackbone, x: Tensor) -> list[Tensor]:
    """Effective receptive fields: how much the middle cell of every feature level depends on each pixel.

    |d (sum over channels of the middle cell) / d pixel|, summed over channels (and frames), averaged over samples and
    scaled to a maximum of 1 (Luo et al. 2016, arXiv:1701.04128).

    Args:
        x: Normalised images or clips               (batch, channels, [frames,] height, width)
    Returns:
        One (height, width) for each entry of `feature_info`.
    """
    training = model.training
    model.eval()
    x = x.detach().clone().requires_grad_()
    maps: list[Tensor] = []
    with torch.enable_grad():
        model.forward_features(x, maps)
        fields = []
        for level in maps:
            middle = level[..., level.shape[-2] // 2, level.shape[-1] // 2]
            (gradient,) = torch.autograd.grad(middle.sum(), x, retain_graph=True)
            field = gradient.abs().flatten(1, -3).sum(1).mean(0)
            fields.append((field / field.max().clamp_min(torch.finfo(field.dtype).tiny)).detach().cpu())
    model.train(training)
    return fields


class HeldOutAccuracy(Callback):
    """Every `valid_every` steps, on some of the held-out samples, and on all of them at the end."""

    def __init__(self, data: ImageData | ClipData, options: VisionOptions, say: Callable[[str], None] | None) -> None:
        self.data, self.options, self.say = data, options, say
        self.results: VisionResults | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, *rest: Any) -> None:
        """Look when its turn has come."""
        step = trainer.global_step
        if step % self.options.valid_every or step >= self.options.steps or not trainer.is_global_zero:
            return
        found = self.measure(trainer, task, self.options.valid_samples)
        for logger in trainer.loggers:
            numbers = {"held_out_accuracy": found.accuracy, "held_out_loss": found.loss}
            logger.log_metrics(numbers, step=step - 1)
        if self.say is not None:
            bar = trainer.progress_bar_callback
            (self.say if bar is None else bar.print)(f"step {step}: {found}")

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        """Measure on everything held out."""
        if trainer.is_global_zero:
            self.results = self.measure(trainer, task, None)

    def measure(self, trainer: pl.Trainer, task: Any, at_most: int | None) -> VisionResults:
        """In the precision of the training."""
        with trainer.precision_plugin.forward_context():
            return measure(task.model, self.data, batch_size=self.options.batch_size, at_most=at_most)


def describe(
    kind: Kind, name: str, settings: dict[str, Any], data: ImageData | ClipData, options: VisionOptions, source: str
) -> dict[str, Any]:
    """What a run is, as plain values: enough to rebuild the model, and to notice other data."""
    return {
        "kind": kind,
        "version": 1,
        "model": {"name": name, **settings},
        "data": {
            "source": source,
            "classes": list(data.classes),
            "mean": list(data.mean),
            "std": list(data.std),
            "training_samples": len(data.train),  # type: ignore[arg-type]
            "held_out_samples": len(data.held_out),  # type: ignore[arg-type]
        },
        "options": asdict(options),
    }


def classifier(
    name: str, classes: int, size: int, settings: dict[str, Any], frames: int | None = None
) -> VisionBackbone:
    """A backbone by name for samples of a size; `settings` are further arguments of its class."""
    if takes(name, "num_frames") != (frames is not None):
        raise ValueError(f"{name!r} is a model of {'clips' if frames is None else 'images'}, the samples are not")
    unknown = [key for key in settings if not takes(name, key)]
    if unknown:
        raise ValueError(
            f"{name!r} has no option {', '.join(unknown)}; {entry_of(name).make.__name__} has those of its docstring"
        )
    fitting = {"num_classes": classes, "img_size": size, "num_frames": frames}
    fitting = {key: value for key, value in fitting.items() if value is not None and takes(name, key)}
    model = create_model(name, **{**fitting, **settings})
    if not isinstance(model, VisionBackbone):
        raise ValueError(f"{name!r} is not a classifier of images or clips")
    return model


def fit(
    kind: Kind,
    name: str,
    data: ImageData | ClipData,
    run: str | Path,
    options: VisionOptions,
    *,
    settings: dict[str, Any] | None = None,
    source: str = "",
    hardware: Hardware | None = None,
    resume: bool = False,
    overwrite: bool = False,
    logger: Any = None,
    callbacks: list[Callback] | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> tuple[VisionBackbone, VisionResults | None]:
    """Train a backbone in the run folder `run`; the model, and results that are written there as well, with plots.

    Args:
        kind: "vision" for images, "video" for clips.
        name: One of `ssmkit.models.list_models()`.
        settings: Arguments of the model's class besides the classes and the size.
        source: Where the samples came from, kept in the run's description.
        resume: Continue from the newest checkpoint of `run`, if there is one.
        overwrite: Delete what a run before left in `run`. Without either, `run` must be new.
        logger: A Lightning logger; by default CSV files under run/logs.
        callbacks: Further Lightning callbacks.
        say: Told of the held-out accuracy as the training goes on.
    Returns:
        The results are None in other processes than the first.
    """
    run, hardware, settings = Path(run), hardware or Hardware(), settings or {}
    torch.manual_seed(options.seed)
    frames = options.frames if kind == "video" else None
    model = classifier(name, len(data.classes), options.size, settings, frames)
    description = describe(kind, name, settings, data, options, source)
    last = prepare_run(run, description, resume=resume, overwrite=overwrite)
    task = VisionTask(model, data, options, description, hardware)
    watch = HeldOutAccuracy(data, options, say)
    if process_rank() == 0 and overwrite:
        for left in (RESULTS, CONFUSION, FIELDS):
            (run / left).unlink(missing_ok=True)
    if not run_steps(task, run, last, logger=logger, callbacks=[watch, *(callbacks or [])], progress=progress):
        model.load_state_dict(trained_weights(run, kind)[0])
    model.eval()
    if process_rank() > 0:
        return model, None
    if watch.results is None and (run / RESULTS).is_file():
        return model, VisionResults(**json.loads((run / RESULTS).read_text()))
    results = watch.results or measure(model, data, batch_size=options.batch_size)
    atomic_write_text(run / RESULTS, json.dumps(asdict(results)) + "\n")
    plot_confusion(results.confusion, data.classes, run / CONFUSION)
    count = min(FIELD_SAMPLES, len(data.held_out))  # type: ignore[arg-type]
    x = torch.stack([data.held_out[index][0] for index in range(count)]).to(next(model.parameters()).device)
    reductions = [str(level["module"]) for level in model.feature_info]
    plot_receptive_fields(
        receptive_fields(model, Normalise(data.mean, data.std).to(x.device)(x)), reductions, run / FIELDS
    )
    return model, results


def load_trained(run: str | Path) -> tuple[VisionBackbone, Normalise, dict[str, Any]]:
    """The trained model of a run folder (or of a checkpoint file), what normalises its input, and its description."""
    weights, description = trained_weights(run, "vision", "video")
    settings = {key: value for key, value in description["model"].items() if key != "name"}
    data, options = description["data"], description["options"]
    frames = options["frames"] if description["kind"] == "video" else None
    model = classifier(description["model"]["name"], len(data["classes"]), options["size"], settings, frames)
    model.load_state_dict(weights)
    return model.eval(), Normalise(tuple(data["mean"]), tuple(data["std"])), description
