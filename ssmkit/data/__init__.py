"""Recorded trajectories: files, recorders, adapters, training windows. Images and clips with classes."""

from ssmkit.data.atomic import atomic_write, atomic_write_text
from ssmkit.data.clips import ClipData, clip_folder, moving_digits
from ssmkit.data.d4rl import load_d4rl, segment_buffer
from ssmkit.data.environments import (
    Environment,
    GymnasiumEnvironment,
    Policy,
    Transition,
    make_environment,
    random_policy,
    record_episodes,
)
from ssmkit.data.episodes import (
    ActionSpace,
    Episode,
    EpisodeError,
    EpisodeSet,
    Metadata,
    load_episodes,
    save_episodes,
)
from ssmkit.data.images import ImageData, digits, image_folder
from ssmkit.data.minari import read_minari, write_minari
from ssmkit.data.pendulum import PendulumEnvironment, record_pendulum
from ssmkit.data.scores import Score, normalised_score
from ssmkit.data.windows import Scaling, TrajectoryBatch, Windows, WindowStream, returns_to_go

__all__ = [
    "ActionSpace",
    "ClipData",
    "Environment",
    "Episode",
    "EpisodeError",
    "EpisodeSet",
    "GymnasiumEnvironment",
    "ImageData",
    "Metadata",
    "PendulumEnvironment",
    "Policy",
    "Scaling",
    "Score",
    "TrajectoryBatch",
    "Transition",
    "WindowStream",
    "Windows",
    "atomic_write",
    "atomic_write_text",
    "clip_folder",
    "digits",
    "image_folder",
    "load_d4rl",
    "load_episodes",
    "make_environment",
    "moving_digits",
    "normalised_score",
    "random_policy",
    "read_minari",
    "record_episodes",
    "record_pendulum",
    "returns_to_go",
    "save_episodes",
    "segment_buffer",
    "write_minari",
]
