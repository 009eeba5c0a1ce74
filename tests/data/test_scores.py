"""Normalised scores against the published constants."""

import pytest

from ssmkit.data import normalised_score
from ssmkit.data.scores import REFERENCE_RETURNS, reference_name


def test_the_references_map_to_0_and_100():
    assert normalised_score("hopper-medium-v2", 3234.3).value == pytest.approx(100.0)
    assert normalised_score("hopper-medium-v2", -20.272305).value == pytest.approx(0.0)


def test_atari_is_gamer_normalised():
    # Chen et al. 2021 report 76.9 raw and 267.5 normalised on Breakout.
    assert normalised_score("breakout", 76.9).value == pytest.approx(267.5)
    assert normalised_score("BreakoutNoFrameskip-v4", 76.9).comparable


@pytest.mark.parametrize(
    ("env", "comparable"),
    [
        ("hopper-medium-v2", True),
        ("walker2d-expert-v0", True),
        ("Hopper-v5", False),
        ("HalfCheetah-v4", False),
        ("mujoco/hopper/expert-v0", False),
        ("ALE/Breakout-v5", False),
    ],
)
def test_other_simulators_are_marked(env, comparable):
    score = normalised_score(env, 1000.0)
    assert score.comparable is comparable
    assert ("not comparable" in str(score)) is not comparable


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("maze2d-umaze-v1", "maze2d-umaze"),
        ("antmaze-medium-play-v2", "antmaze"),
        ("Ant-v5", "ant"),
        ("AdroitHandPen-v1", "pen"),
        ("D4RL/door/human-v2", "door"),
        ("kitchen-mixed-v0", "kitchen"),
        ("Pendulum-v1", None),
        ("open-pendulum", None),
    ],
)
def test_names_find_their_row(env, name):
    assert reference_name(env) == name


def test_every_row_spans_a_range():
    assert all(high > low for low, high in REFERENCE_RETURNS.values())
    assert normalised_score("Pendulum-v1", -100.0) is None
