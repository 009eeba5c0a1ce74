"""ssmkit record: trajectories into a file."""

import argparse

from ssmkit.data import save_episodes, write_minari
from ssmkit.train.sources import SOURCES, open_source, summary

EPILOG = """\
examples:
  ssmkit record pendulum --out data/pendulum.npz
  ssmkit record pendulum-velocity-hidden --episodes 1000 --out data/hidden.npz
  ssmkit record CartPole-v1 --episodes 200 --out data/cartpole.npz
  ssmkit record HalfCheetah-v5 --policy my_policies:make_policy --out data/cheetah.npz
  ssmkit record minari:mujoco/hopper/expert-v0 --out data/hopper.npz      (converts)
  ssmkit record data/pendulum.npz --out minari:pendulum/mixed-v0          (converts)

A policy file for --policy (here my_policies.py, found on PYTHONPATH):
  def make_policy(env):                        # env.action_space, env.observation_dim
      def act(observations, rng):              # (episodes, dim) float32 -> one action per episode
          return rng.uniform(-1, 1, (len(observations), env.action_space.dim))
      return act"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = EPILOG
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", default="pendulum", help=f"{SOURCES} (default: pendulum)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="FILE.npz, or minari:ID for a Minari data set")
    parser.add_argument("--episodes", type=int, default=400, help="how many to record (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the data (default: %(default)s)")
    parser.add_argument(
        "--policy",
        help="who acts: 'random' or 'module:function' (default: the scripted behaviour of a built-in task, else random)",
    )
    parser.add_argument("--env", help="environment name, for a D4RL file")


def run(arguments: argparse.Namespace) -> int:
    """Record or convert, write, and say what was written."""
    if arguments.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {arguments.episodes}")
    data = open_source(
        arguments.source,
        episodes=arguments.episodes,
        seed=arguments.seed,
        policy=arguments.policy,
        env=arguments.env,
    )
    if arguments.out.startswith("minari:"):
        write_minari(data, arguments.out.removeprefix("minari:"))
    else:
        save_episodes(data, arguments.out)
    print(summary(data))
    print(f"written to {arguments.out}")
    return 0
