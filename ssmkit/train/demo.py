"""The demonstration: record, train, evaluate and plot, on a task that needs memory.

The pendulum's velocity is hidden, so the present observation does not say which way to push. Behaviour cloning sees that
observation alone, or, as a fairer rival, the last few; Decision Mamba remembers, and is told which return to reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssmkit.data import EpisodeSet, PendulumEnvironment, Scaling, record_pendulum, save_episodes
from ssmkit.models.trajectory import TrajectoryModel, trajectory_model
from ssmkit.train.report import caption, plot_learning_curves, plot_return_against_target, save_gif, table
from ssmkit.train.rollout import ModelAgent, returns_at_targets, roll_out
from ssmkit.train.sources import summary
from ssmkit.train.trajectory import Hardware, TrainOptions, fit

TASK = "pendulum-velocity-hidden"
TARGETS = (-120.0, -400.0, -800.0, -1200.0)
# folder: (label, variant, share of the episodes)
CLONING = {
    "cloning": ("behaviour cloning", "demo", 1.0),
    "best": ("top-10 % cloning", "demo", 0.1),
    "best-history": ("top-10 % cloning, sees 4 steps", "demo-history", 0.1),
}
LEARNING_RATES = {"behaviour-cloning": 1e-3, "decision-mamba": 3e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """How much of everything."""

    seeds: int = 3
    steps: int = 1000
    cloning_steps: int = 1000
    episodes: int = 400
    evaluation_episodes: int = 40


def run_demo(folder: Path, options: DemoOptions) -> str:
    """Do all of it in `folder`, print as it goes, and return the table."""
    data = record_pendulum(TASK, episodes=options.episodes)
    save_episodes(data, folder / "trajectories.npz")
    print(summary(data))

    env = PendulumEnvironment(TASK)
    scaling = Scaling.of(data)
    reached: dict[str, list[NDArray[np.float64]]] = {label: [] for label in (*CLONING, "mamba")}
    models: list[TrajectoryModel] = []
    runs: dict[str, Path] = {}
    for seed in range(options.seeds):
        for label, (_, variant, share) in CLONING.items():
            part = data.best(share)
            model = train(folder / f"{label}-{seed}", "behaviour-cloning", variant, part, seed, options.cloning_steps)
            agent = ModelAgent(model, Scaling.of(part))
            reached[label].append(
                returns_at_targets(agent, env, [0.0], episodes=options.evaluation_episodes, seed=seed)
            )
        run = folder / f"decision-mamba-{seed}"
        print(f"Decision Mamba, seed {seed}")
        models.append(train(run, "decision-mamba", "demo", data, seed, options.steps, progress=True))
        runs[f"seed {seed}"] = run
        agent = ModelAgent(models[-1], scaling)
        reached["mamba"].append(
            returns_at_targets(agent, env, TARGETS, episodes=options.evaluation_episodes, seed=seed)
        )

    by_seed = {label: np.stack(values).mean(axis=2) for label, values in reached.items()}
    text = results_table(data, by_seed, options)
    print(text)
    (folder / "table.txt").write_text(text + "\n")
    levels = {
        "behaviour mean": float(data.returns.mean()),
        "behaviour 90th percentile": float(np.percentile(data.returns, 90)),
        **{label: float(by_seed[name].mean()) for name, (label, *_) in CLONING.items()},
    }
    plot_learning_curves(runs, folder / "learning_curve.png")
    plot_return_against_target(
        TARGETS, by_seed["mamba"], levels, folder / "return_against_target.png", f"{TASK}, {options.seeds} seeds"
    )
    save_gif(moving_picture(models[0], scaling), folder / "rollout.gif", milliseconds=100)
    print(f"written to {folder}: table.txt, learning_curve.png, return_against_target.png, rollout.gif")
    return text


def train(
    run: Path, name: str, variant: str, data: EpisodeSet, seed: int, steps: int, *, progress: bool = False
) -> TrajectoryModel:
    """One training of the demo, from scratch."""
    torch.manual_seed(seed)
    model = trajectory_model(
        name, variant, state_dim=data.observation_dim, action_dim=1, max_timestep=data.metadata.max_episode_steps
    )
    options = TrainOptions(steps=steps, lr=LEARNING_RATES[name], seed=seed, checkpoint_every=max(1, steps // 2))
    hardware = Hardware(accelerator="cpu", devices=1)
    return fit(model, data, run, options, source=TASK, hardware=hardware, overwrite=True, progress=progress)


def results_table(data: EpisodeSet, by_seed: dict[str, NDArray[np.float64]], options: DemoOptions) -> str:
    """Mean over seeds, spread over seeds; by_seed holds (seeds, targets) of returns."""

    def row(label: str, target: float | str, values: NDArray[np.float64]) -> tuple[Any, ...]:
        return label, target, float(values.mean()), float(values.std())

    rows: list[Sequence[Any]] = [
        ("behaviour, mean", "", float(data.returns.mean()), ""),
        ("behaviour, 90th percentile", "", float(np.percentile(data.returns, 90)), ""),
        *(row(label, "", by_seed[name]) for name, (label, *_) in CLONING.items()),
        *(row("Decision Mamba", target, by_seed["mamba"][:, i]) for i, target in enumerate(TARGETS)),
    ]
    title = f"{TASK}: returns over {options.seeds} seeds x {options.evaluation_episodes} episodes"
    return f"\n{title}\n" + table(("policy", "target", "return", "std over seeds"), rows)


def moving_picture(model: TrajectoryModel, scaling: Scaling) -> list[NDArray[np.uint8]]:
    """One episode per target from the same start, side by side."""
    env = Filmed(TASK)
    roll_out(ModelAgent(model, scaling), env, [7] * len(TARGETS), TARGETS)
    return [
        np.concatenate(
            [caption(picture, f"target {target:.0f}") for picture, target in zip(row, TARGETS, strict=True)], 1
        )
        for row in env.pictures
    ]


class Filmed(PendulumEnvironment):
    """A pendulum that keeps a picture of every second step, which is enough to see it move."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.pictures: list[list[NDArray[np.uint8]]] = []

    def step(self, actions: NDArray[Any]) -> Any:
        """Step, and keep the pictures."""
        transition = super().step(actions)
        if self.age % 2 == 0:
            self.pictures.append(self.render())
        return transition
