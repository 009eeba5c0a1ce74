"""Pendulum: a swing-up task simulated for many episodes at once, and a scripted behaviour of mixed quality.

The dynamics are those of Gymnasium's Pendulum-v1, seeds included: observations are equal to the last bit, rewards to
the rounding of u^2 in float32.

    thetadot' = clip(thetadot + (3 g / (2 l) sin theta + 3 / (m l^2) u) dt, -8, 8)
    theta'    = theta + thetadot' dt
    reward    = -(wrap(theta)^2 + 0.1 thetadot^2 + 0.001 u^2),     u = clip(action, -2, 2)

Task "pendulum" shows (cos theta, sin theta, thetadot); "pendulum-velocity-hidden" shows only the first two, so that a
controller must remember.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmkit.data.environments import Observations, Policy, Transition, record_episodes
from ssmkit.data.episodes import ActionSpace, EpisodeSet

GRAVITY, MASS, LENGTH, TIME_STEP = 10.0, 1.0, 1.0, 0.05
MAX_SPEED, MAX_TORQUE, STEPS = 8.0, 2.0, 200
TASKS = {"pendulum": 3, "pendulum-velocity-hidden": 2}


class PendulumEnvironment:
    """Gymnasium's Pendulum-v1, vectorised; `name` is a row of TASKS."""

    def __init__(self, name: str = "pendulum") -> None:
        if name not in TASKS:
            raise ValueError(f"unknown pendulum task {name!r}, known: {', '.join(TASKS)}")
        self.name = name
        self.options: Mapping[str, Any] = {}
        self.observation_dim = TASKS[name]
        self.action_space = ActionSpace(low=(-MAX_TORQUE,), high=(MAX_TORQUE,))
        self.max_episode_steps = STEPS
        self.theta = self.velocity = self.torque = np.zeros(0)
        self.age = 0

    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start where Gymnasium starts for the same seeds."""
        high = np.array([np.pi, 1.0])
        starts = np.array([np.random.default_rng(int(seed)).uniform(-high, high) for seed in seeds]).reshape(-1, 2)
        self.theta, self.velocity = starts[:, 0], starts[:, 1]
        self.torque = np.zeros(len(starts), np.float32)
        self.age = 0
        return self.observe()

    def observe(self) -> Observations:
        """What the task shows of the state."""
        full = (np.cos(self.theta), np.sin(self.theta), self.velocity)
        return np.stack(full[: self.observation_dim], axis=1).astype(np.float32)

    def step(self, actions: NDArray[Any]) -> Transition:
        """One time step of the module's equations; episodes end together after STEPS."""
        n = len(self.theta)
        if self.age >= STEPS:
            return Transition(self.observe(), np.zeros(n), np.zeros(n, bool), np.zeros(n, bool))
        # Gymnasium keeps the action in float32, and so do the products with it.
        u = self.torque = np.clip(np.asarray(actions, np.float32).reshape(n), -MAX_TORQUE, MAX_TORQUE)
        cost = wrap(self.theta) ** 2 + 0.1 * self.velocity**2 + 0.001 * u**2
        pull = 3 * GRAVITY / (2 * LENGTH) * np.sin(self.theta) + 3.0 / (MASS * LENGTH**2) * u
        self.velocity = np.clip(self.velocity + pull * TIME_STEP, -MAX_SPEED, MAX_SPEED)
        self.theta = self.theta + self.velocity * TIME_STEP
        self.age += 1
        return Transition(self.observe(), -cost, np.zeros(n, bool), np.full(n, self.age == STEPS))

    def render(self) -> list[NDArray[np.uint8]]:
        """One picture per episode, drawn without a display."""
        return [draw(theta, torque) for theta, torque in zip(self.theta, self.torque, strict=True)]


def wrap(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


# Mean return -155 over 200 starts; larger gains reach -152 with a torque that jumps where the velocity changes sign.
PUMP_GAIN, CATCH_ANGLE_GAIN, CATCH_SPEED_GAIN, CATCH_WITHIN = 0.3, 10.0, 3.0, 0.5


def expert_torque(theta: NDArray[np.float64], velocity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pump energy until the upright energy is reached, then catch with a proportional-derivative law."""
    angle = wrap(theta)
    missing_energy = 3 * GRAVITY / (2 * LENGTH) * (1 - np.cos(angle)) - 0.5 * velocity**2
    pump = PUMP_GAIN * missing_energy * velocity
    catch = -(CATCH_ANGLE_GAIN * angle + CATCH_SPEED_GAIN * velocity)
    return np.clip(np.where(np.abs(angle) < CATCH_WITHIN, catch, pump), -MAX_TORQUE, MAX_TORQUE)


def mixed_behaviour(env: PendulumEnvironment, rng: np.random.Generator, episodes: int) -> Policy:
    """The expert, spoilt by a noise level s that each episode draws from [0, 1]: (1 - s) expert + s uniform.

    It steers by the true state, also where the task hides the velocity from the observations.
    """
    noise = rng.uniform(size=episodes)

    def act(observations: Observations, generator: np.random.Generator) -> NDArray[Any]:
        uniform = generator.uniform(-MAX_TORQUE, MAX_TORQUE, len(observations))
        torque = (1 - noise) * expert_torque(env.theta, env.velocity) + noise * uniform
        return torque.astype(np.float32)[:, None]

    return act


def record_pendulum(task: str = "pendulum", *, episodes: int = 400, seed: int = 0) -> EpisodeSet:
    """Episodes of the mixed behaviour; the same task, count and seed give the same file."""
    env = PendulumEnvironment(task)
    rng = np.random.default_rng([seed, episodes])
    seeds = rng.integers(2**31, size=episodes).tolist()
    policy = mixed_behaviour(env, rng, episodes)
    description = "energy swing-up and catch, with uniform noise of a strength drawn per episode"
    return record_episodes(env, policy, seeds, description=description, parallel=episodes)


def draw(theta: float, torque: float, size: int = 160) -> NDArray[np.uint8]:
    """The pendulum seen from the side (upright is up) and its torque as a bar, drawn without a display."""
    rows, cols = np.mgrid[:size, :size]
    x, y = (cols - size / 2) / (size / 2.4), (size / 2 - rows) / (size / 2.4)
    picture = np.full((size, size, 3), 255, np.uint8)
    # Distance of every pixel from the rod, a segment from the pivot to the tip.
    tip_x, tip_y = -np.sin(theta), np.cos(theta)
    along = np.clip(x * tip_x + y * tip_y, 0, 1)
    distance = np.hypot(x - along * tip_x, y - along * tip_y)
    picture[distance < 0.09] = (204, 77, 77)
    picture[np.hypot(x, y) < 0.05] = 0
    reach = torque / MAX_TORQUE
    bar = (np.abs(y + 1.1) < 0.04) & (x * np.sign(reach) >= 0) & (np.abs(x) < abs(reach))
    picture[bar] = (60, 100, 200)
    return picture
