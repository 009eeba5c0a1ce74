"""Episodes and the plain file that holds them.

An episode of T steps has T+1 observations (the last one is what the last action led to) and T of everything else.
A data set is the concatenation of its episodes; one `.npz` file holds the arrays, the lengths and JSON metadata:

    observations  (steps + episodes, observation_dim)  float32
    actions       (steps, action_dim) float32, or (steps,) int64 for discrete actions
    rewards       (steps,)  float64
    terminations, truncations   (steps,)  bool
    lengths       (episodes,)   int64, steps of each episode
    metadata      JSON text: format, version, and the fields of `Metadata`
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmkit.data.atomic import atomic_write

FORMAT = "ssmkit episodes"
VERSION = 1
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


class EpisodeError(ValueError):
    """Episodes, or a file of episodes, that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionSpace:
    """What an action may be: `low..high` per dimension (None where unbounded), or one of `count` choices."""

    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        if self.count < 0 or (self.count > 0) == (len(self.low) > 0):
            raise EpisodeError("action space: give either count >= 1 (discrete) or low and high (continuous)")
        if len(self.low) != len(self.high):
            raise EpisodeError(f"action space: low has {len(self.low)} entries, high has {len(self.high)}")

    @property
    def discrete(self) -> bool:
        """Whether an action is one of `count` choices."""
        return self.count > 0

    @property
    def dim(self) -> int:
        """Width of the vector a model sees: one-hot for discrete actions."""
        return self.count if self.discrete else len(self.low)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """What the arrays do not say themselves."""

    env: str
    action_space: ActionSpace
    max_episode_steps: int
    env_options: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    seed: int | None = None

    def to_json(self) -> str:
        """Everything as JSON text, with the format's name and version."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """The opposite of `to_json`; refuses other formats and versions."""
        try:
            values: dict[str, Any] = json.loads(text)
            found_format, found_version = values.pop("format"), values.pop("version")
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise EpisodeError(f"metadata is not that of an ssmkit episode file ({error!r})") from error
        if found_format != FORMAT or found_version != VERSION:
            raise EpisodeError(
                f"metadata says {found_format!r} version {found_version!r}, this ssmkit reads {FORMAT!r} version"
                f" {VERSION}; record the data again or convert it with the ssmkit that wrote it"
            )
        known = {entry.name for entry in fields(cls)}
        try:
            space = values.pop("action_space")
            values["action_space"] = ActionSpace(
                low=tuple(space["low"]), high=tuple(space["high"]), count=space["count"]
            )
            return cls(**{name: value for name, value in values.items() if name in known})
        except (KeyError, TypeError) as error:
            raise EpisodeError(f"metadata lacks a field or has a wrong one ({error!r})") from error


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode: T+1 observations, T actions, rewards, terminations and truncations."""

    observations: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]

    def __post_init__(self) -> None:
        steps = len(self.rewards)
        if steps == 0:
            raise EpisodeError("an episode needs at least one step")
        if len(self.observations) != steps + 1:
            rows = len(self.observations)
            raise EpisodeError(f"observations must have {steps + 1} rows (one more than steps), got {rows}")
        for name in ("actions", "terminations", "truncations"):
            rows = len(getattr(self, name))
            if rows != steps:
                raise EpisodeError(f"{name} must have {steps} rows, as rewards has, got {rows}")

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def total_return(self) -> float:
        """Sum of the rewards."""
        return float(self.rewards.sum())


@dataclass(frozen=True)
class EpisodeSet:
    """Many episodes, concatenated. Observation rows of episode e start at `starts[e] + e`, its steps at `starts[e]`."""

    observations: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    metadata: Metadata
    starts: NDArray[np.int64] = field(init=False)
    returns: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        check_arrays(self)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)[:-1]])
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "returns", np.add.reduceat(self.rewards, starts))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def steps(self) -> int:
        """Steps of all episodes together."""
        return len(self.rewards)

    @property
    def observation_dim(self) -> int:
        """Numbers per observation."""
        return self.observations.shape[1]

    def __getitem__(self, index: int) -> Episode:
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        index %= len(self)
        first, steps = int(self.starts[index]), int(self.lengths[index])
        span = slice(first, first + steps)
        return Episode(
            self.observations[first + index : first + index + steps + 1],
            *(getattr(self, name)[span] for name in ARRAYS[1:]),
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    @classmethod
    def from_episodes(cls, episodes: Sequence[Episode], metadata: Metadata) -> "EpisodeSet":
        """Concatenate; all episodes must have the same observation and action widths."""
        if not episodes:
            raise EpisodeError("no episodes")
        action_type = np.int64 if metadata.action_space.discrete else np.float32
        types = (np.float32, action_type, np.float64, np.bool_, np.bool_)
        for name in ("observations", "actions"):
            shapes = {getattr(episode, name).shape[1:] for episode in episodes}
            if len(shapes) > 1:
                raise EpisodeError(f"{name}: episodes differ in shape per row: {sorted(shapes)}")
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(episode, name) for episode in episodes]).astype(dtype, copy=False)
            for name, dtype in zip(ARRAYS, types, strict=True)
        }
        return cls(lengths=np.array([len(episode) for episode in episodes], np.int64), metadata=metadata, **arrays)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "EpisodeSet":
        """The episodes at `indices`, in that order."""
        return self.from_episodes([self[int(index)] for index in indices], self.metadata)

    def best(self, fraction: float) -> "EpisodeSet":
        """The `fraction` of episodes with the highest returns (at least one), best first."""
        if not 0 < fraction <= 1:
            raise EpisodeError(f"fraction must lie in (0, 1], got {fraction}")
        count = max(1, round(fraction * len(self)))
        return self.select(np.argsort(-self.returns, kind="stable")[:count])


def check_arrays(data: EpisodeSet) -> None:
    """Refuse arrays that do not fit together, and numbers that are not finite."""
    lengths = data.lengths
    if lengths.ndim != 1 or len(lengths) == 0 or lengths.dtype.kind not in "iu" or lengths.min() < 1:
        raise EpisodeError("lengths must be a list of positive integers, one per episode")
    steps, rows = int(lengths.sum()), int(lengths.sum()) + len(lengths)
    space = data.metadata.action_space
    expected: dict[str, tuple[int, ...]] = {
        "observations": (rows, data.observations.shape[-1] if data.observations.ndim == 2 else -1),
        "actions": (steps,) if space.discrete else (steps, space.dim),
        **dict.fromkeys(ARRAYS[2:], (steps,)),
    }
    for name, shape in expected.items():
        array: NDArray[Any] = getattr(data, name)
        if array.shape != shape:
            wanted = str(shape).replace("-1", "observation_dim")
            raise EpisodeError(f"{name} must have shape {wanted}, got {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise EpisodeError(f"{name} has a value that is not finite, first in row {row}; clean the data first")
    for name, kinds in (("observations", "f"), ("actions", "iu" if space.discrete else "f"), ("rewards", "f")):
        dtype = getattr(data, name).dtype
        if dtype.kind not in kinds:
            raise EpisodeError(f"{name} must be {'integers' if kinds == 'iu' else 'floats'}, got {dtype}")
    for name in ("terminations", "truncations"):
        if getattr(data, name).dtype != np.bool_:
            raise EpisodeError(f"{name} must be bool, got {getattr(data, name).dtype}")
    if space.discrete and (data.actions.min() < 0 or data.actions.max() >= space.count):
        raise EpisodeError(f"actions must lie in 0..{space.count - 1}, got {data.actions.min()}..{data.actions.max()}")


def save_episodes(data: EpisodeSet, path: str | Path) -> Path:
    """Write one `.npz` file, in full or not at all, and return its path."""
    path = Path(path)
    if path.suffix != ".npz":
        raise EpisodeError(f"an episode file's name ends in .npz, got {path}")
    arrays = {name: getattr(data, name) for name in ARRAYS}
    with atomic_write(path) as file:
        np.savez(file, **arrays, lengths=data.lengths, metadata=np.array(data.metadata.to_json()))
    return path


def load_episodes(path: str | Path) -> EpisodeSet:
    """Read a file written by `save_episodes`; every fault is an `EpisodeError` that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no episode file at {path}; make one with `ssmkit record ENV --out {path}`")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = {*ARRAYS, "lengths", "metadata"} - set(archive.files)
            if missing:
                raise EpisodeError(f"lacks {', '.join(sorted(missing))}; it is not an ssmkit episode file")
            metadata = Metadata.from_json(str(archive["metadata"]))
            arrays: dict[str, Any] = {name: archive[name] for name in (*ARRAYS, "lengths")}
            return EpisodeSet(metadata=metadata, **arrays)
    except EpisodeError as error:
        raise EpisodeError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, AttributeError) as error:
        raise EpisodeError(f"{path} is truncated or corrupt ({error}); record it again") from error
