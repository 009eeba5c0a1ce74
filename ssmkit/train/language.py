"""Training of byte-level language models on Lightning: cross-entropy of the next byte, in bits."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ssmkit.data.atomic import atomic_write_text
from ssmkit.data.text import (
    SEPARATOR,
    ScoredWindow,
    Text,
    TextWindows,
    bits_per_byte,
    gzip_bits_per_byte,
    scored_windows,
    some_windows,
)
from ssmkit.data.vocabulary import ByteVocabulary
from ssmkit.models.language import LanguageModel, LanguageModelConfig
from ssmkit.models.language.model import State
from ssmkit.train.checkpoint import prepare_run, process_rank
from ssmkit.train.loop import StepTask, run_steps, trained_weights
from ssmkit.train.options import Hardware, LanguageOptions

RESULTS = "results.json"
PROMPT_BYTES = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Bits per byte that a training reached, and what gzip -9 needs for the same held-out text."""

    held_out: float
    training: float
    gzip_each: float
    gzip_together: float
    held_out_files: int
    held_out_bytes: int

    def __str__(self) -> str:
        return (
            f"held out: {self.held_out:.3f} bits per byte over {self.held_out_bytes:,} bytes of {self.held_out_files} files"
            f" (a part of the training text: {self.training:.3f})\n"
            f"gzip -9 of the same: {self.gzip_each:.3f} file by file, {self.gzip_together:.3f} as one; "
            f"the model needs {self.held_out / self.gzip_each:.2f} and {self.held_out / self.gzip_together:.2f} times that"
        )


class LanguageTask(StepTask):
    """The loss: mean of -ln p(next byte) over a batch of windows."""

    options: LanguageOptions
    betas = (0.9, 0.95)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state: State | None = None
        self.nats: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of bytes 1 .. context given those before  (batch, context + 1)"""
        state = self.carried_state(len(batch)) if self.options.carry_state else None
        logits_BLV = self.model(batch[:, :-1], state=state)
        loss = torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), batch[:, 1:].flatten())
        self.nats.append(loss.detach())
        if self.logs_now:
            self.log("bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def carried_state(self, batch: int) -> State:
        """What the windows before have left; zeros at first."""
        if self.trainer.world_size > 1:
            raise ValueError(f"carry_state keeps its states in one process, got {self.trainer.world_size}; take one")
        if self.state is None:
            self.state = self.model.allocate_inference_cache(batch, self.options.context)
        self.state = move_data_to_device(self.state, self.device)
        return self.state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the carried state there as well."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["carried_state"] = self.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self.state = checkpoint["carried_state"]

    def recent_bits(self) -> float:
        """Mean training loss since the last call, in bits per byte."""
        mean = float(torch.stack(self.nats).mean()) / math.log(2) if self.nats else math.nan
        self.nats.clear()
        return mean


def measure(model: LanguageModel, text: Text, held_out: Text, options: LanguageOptions) -> Results:
    """Read all of the held-out text, of the training text as much as the looks in between do, and run gzip."""
    gzip = gzip_bits_per_byte(held_out)
    return Results(
        held_out=bits(model, held_out, scored_windows(held_out, options.context), options),
        training=bits(model, text, some_windows(text, options.context, options.valid_bytes), options),
        gzip_each=gzip.each,
        gzip_together=gzip.together,
        held_out_files=len(held_out.pieces),
        held_out_bytes=held_out.nbytes,
    )


def bits(model: LanguageModel, text: Text, windows: Iterable[ScoredWindow], options: LanguageOptions) -> float:
    """Bits per byte of a model that is not being trained meanwhile."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    value = bits_per_byte(model, text, windows, batch_size=options.batch_size, device=device)
    model.train(training)
    return value


class HeldOutWatch(Callback):
    """Every `valid_every` steps, and in full at the end: bits per byte of the held-out text, and a sample."""

    def __init__(self, text: Text, held_out: Text, options: LanguageOptions, say: Callable[[str], None] | None) -> None:
        self.text, self.held_out, self.options, self.say = text, held_out, options, say
        self.some = list(some_windows(held_out, options.context, options.valid_bytes))
        self.results: Results | None = None
        self.trained_bytes, self.trained_seconds, self.since = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, task: Any, batch: Tensor, batch_idx: int) -> None:
        """Start the clock."""
        self.since = self.since or time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Look at the held-out text when its turn has come."""
        now = time.perf_counter()
        self.trained_seconds += now - self.since
        self.since = now
        self.trained_bytes += len(batch) * self.options.context * trainer.world_size
        if trainer.global_step % self.options.valid_every == 0 and trainer.global_step < self.options.steps:
            training = task.recent_bits()
            if trainer.is_global_zero:
                self.look(trainer, task, training)
            self.since = time.perf_counter()

    def look(self, trainer: pl.Trainer, task: Any, training: float) -> None:
        """A part of the held-out text, and a sample."""
        with trainer.precision_plugin.forward_context():
            held_out = bits(task.model, self.held_out, self.some, self.options)
        for logger in trainer.loggers:
            numbers = {"held_out_bits_per_byte": held_out, "bytes_per_second": self.bytes_per_second}
            logger.log_metrics(numbers, step=trainer.global_step - 1)
        if self.say is not None:
            bar = trainer.progress_bar_callback
            say = self.say if bar is None else bar.print
            say(
                f"step {trainer.global_step}: {held_out:.3f} bits per byte held out, {training:.3f} in training, "
                f"{self.bytes_per_second:,.0f} bytes/s"
            )
            self.sample(task.model, say)

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        """Read all of the held-out text."""
        if trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                self.results = measure(task.model, self.text, self.held_out, self.options)
            if self.say is not None:
                self.sample(task.model, self.say)

    @property
    def bytes_per_second(self) -> float:
        """Bytes trained on per second, looks at the held-out text not counted."""
        return self.trained_bytes / max(self.trained_seconds, 1e-9)

    def sample(self, model: LanguageModel, say: Callable[[str], None]) -> None:
        """Let the model go on from the start of a held-out file."""
        if self.options.sample_bytes > 0:
            prompt = held_out_prompt(self.held_out)
            model.eval()
            written = write_on(model, prompt, self.options.sample_bytes, seed=self.options.seed)
            model.train()
            say("\n".join(f"  | {line}" for line in printable(f"{prompt}▸{written}").split("\n")))


def held_out_prompt(text: Text) -> str:
    """The start of the largest held-out file."""
    largest = max(range(len(text.pieces)), key=lambda index: text.pieces[index].size)
    return bytes(text.contents(largest, 0, PROMPT_BYTES)).decode("utf-8", "ignore")


def write_on(model: LanguageModel, prompt: str, nbytes: int, *, seed: int) -> str:
    """What the model writes after a prompt, at a temperature of 0.8."""
    vocabulary = ByteVocabulary()
    device = next(model.parameters()).device
    ids = torch.tensor([vocabulary.encode(prompt)], device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = model.stream(ids, nbytes, temperature=0.8, eos_token_id=SEPARATOR, generator=generator)
    return bytes(int(token) for token in tokens).rstrip(b"\0").decode("utf-8", "replace")


def printable(text: str) -> str:
    """The text with a dot for what would drive a terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "·" for character in text)


def describe(model: LanguageModel, text: Text, held_out: Text, options: LanguageOptions, source: str) -> dict[str, Any]:
    """What a run is, as plain values: enough to rebuild the model, and to notice another text."""
    parts = {"training": text, "held_out": held_out}
    data = {
        f"{name}_{what}": value
        for name, part in parts.items()
        for what, value in (("files", len(part.pieces)), ("bytes", part.nbytes), ("fingerprint", part.fingerprint))
    }
    return {
        "kind": "language",
        "version": 1,
        "model": asdict(model.config),
        "data": {"source": source, **data},
        "options": asdict(options),
    }


def fit(
    model: LanguageModel,
    text: Text,
    held_out: Text,
    run: str | Path,
    options: LanguageOptions,
    *,
    source: str = "",
    hardware: Hardware | None = None,
    resume: bool = False,
    overwrite: bool = False,
    logger: Any = None,
    callbacks: list[Callback] | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Results | None:
    """Train `model` in the run folder `run`; the results, which are written there as well (None in other processes).

    Args:
        source: Where the text came from, kept in the run's description.
        resume: Continue from the newest checkpoint of `run`, if there is one.
        overwrite: Delete what a run before left in `run`. Without either, `run` must be new.
        logger: A Lightning logger; by default CSV files under run/logs.
        callbacks: Further Lightning callbacks.
        say: Told of the held-out text's bits per byte, and of samples, as the training goes on.
    """
    run, hardware = Path(run), hardware or Hardware()
    check_fits(model, options)
    description = describe(model, text, held_out, options, source)
    last = prepare_run(run, description, resume=resume, overwrite=overwrite)
    windows = TextWindows(text, options.context, consecutive=options.carry_state)
    task = LanguageTask(model, windows, options, description, hardware)
    watch = HeldOutWatch(text, held_out, options, say)
    if process_rank() == 0 and overwrite:
        (run / RESULTS).unlink(missing_ok=True)
    if not run_steps(task, run, last, logger=logger, callbacks=[watch, *(callbacks or [])], progress=progress):
        model.load_state_dict(trained_weights(run, "language")[0])
    model.eval()
    if process_rank() > 0:
        return None
    if watch.results is None and (run / RESULTS).is_file():
        return Results(**json.loads((run / RESULTS).read_text()))
    results = watch.results or measure(model, text, held_out, options)
    atomic_write_text(run / RESULTS, json.dumps(asdict(results), indent=2) + "\n")
    return results


def check_fits(model: LanguageModel, options: LanguageOptions) -> None:
    """Refuse a model that does not read bytes, or whose state cannot be carried on and on."""
    config = model.config
    if config.vocab_size != 256:
        raise ValueError(f"a model of bytes has vocab_size 256, got {config.vocab_size}; leave it out of --set")
    if options.carry_state and config.attn_layer_idx:
        raise ValueError(
            "carry_state needs a model without attention, whose memory would grow from window to window; "
            f"got attn_layer_idx {config.attn_layer_idx}"
        )


def load_model(run: str | Path, dtype: torch.dtype | None = None) -> tuple[LanguageModel, dict[str, Any]]:
    """The trained model of a run folder (or of a checkpoint file), and its description."""
    weights, description = trained_weights(run, "language")
    model = LanguageModel(LanguageModelConfig(**description["model"]), dtype=dtype)
    model.load_state_dict(weights)
    return model.eval(), description
