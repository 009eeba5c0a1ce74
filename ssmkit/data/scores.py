"""Normalised scores: 0 is a random policy, 100 an expert or a human.

    score = 100 * (return - reference_min) / (reference_max - reference_min)

References: D4RL (Fu et al. 2020, arXiv:2004.07219), measured in the MuJoCo-2.x `-v2` simulators; for Atari the
gamer-normalised score of Mnih et al. 2015 with the constants that reproduce Chen et al. 2021, arXiv:2106.01345.
"""

import re
from typing import NamedTuple

# name -> (return of a random policy, return of an expert), the same for every quality of a data set
REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "pen": (96.262799, 3076.8331),
    "hammer": (-274.856578, 12794.1348),
    "door": (-56.512833, 2880.5693),
    "relocate": (-6.425911, 4233.8778),
}
GAMER_RETURNS: dict[str, tuple[float, float]] = {
    "breakout": (2.0, 30.0),
    "qbert": (164.0, 13455.0),
    "pong": (-21.0, 15.0),
    "seaquest": (68.0, 42055.0),
}
# Divisors of the return-to-go in Decision Transformer's own runs.
RETURN_SCALES: dict[str, float] = {
    "halfcheetah": 1000.0,
    "hopper": 1000.0,
    "walker2d": 1000.0,
    "ant": 1000.0,
    "reacher2d": 10.0,
    "kitchen": 1.0,
    "antmaze": 1.0,
}


class Score(NamedTuple):
    """A normalised score; `comparable` says whether published scores were measured in the same simulator."""

    value: float
    comparable: bool
    note: str

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.comparable else f" ({self.note})")


def reference_name(env: str) -> str | None:
    """The row of the reference tables that an environment or data set name belongs to, or None.

    Knows D4RL names ("hopper-medium-replay-v2"), Gymnasium ids ("Hopper-v5", "ALE/Breakout-v5") and Minari ids
    ("mujoco/hopper/expert-v0", "D4RL/pen/human-v2").
    """
    words = re.split(r"[^a-z0-9]+", env.lower())
    for name in (*REFERENCE_RETURNS, *GAMER_RETURNS, *RETURN_SCALES):
        # "AdroitHandPen-v1" and "BreakoutNoFrameskip-v4" carry the name inside a word.
        stems = {word.removeprefix("adroithand").removesuffix("noframeskip") for word in words}
        if set(name.split("-")) <= stems:
            return name
    return None


def normalised_score(env: str, total_return: float) -> Score | None:
    """The score of `total_return` in `env`, or None where no reference is known.

    Only D4RL's `-v0`, `-v1`, `-v2` names and plain Atari names give comparable numbers: Gymnasium's `-v4` and `-v5`
    environments, and Minari's data sets recorded in them, have other physics and rewards.
    """
    name = reference_name(env)
    if name in GAMER_RETURNS:
        low, high = GAMER_RETURNS[name]
        value = 100 * (total_return - low) / (high - low)
        if "/" in env:
            return Score(value, False, "not comparable: ALE/-v5 repeats actions at random")
        return Score(value, True, "gamer-normalised")
    if name not in REFERENCE_RETURNS:
        return None
    low, high = REFERENCE_RETURNS[name]
    value = 100 * (total_return - low) / (high - low)
    if "/" not in env and re.search(r"-v[012]$", env):
        return Score(value, True, "D4RL")
    return Score(value, False, "not comparable with D4RL: its references belong to the -v2 simulators")
