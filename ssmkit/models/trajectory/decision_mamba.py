"""Decision Mamba with multi-grained scans (Lv et al. 2024, "Decision Mamba", arXiv:2406.05427).

Each block scans the trajectory twice: coarsely over all 3K tokens, and finely over K groups of three tokens, so that
what belongs to one decision is mixed before it is remembered.

    n_l   = RMSNorm(x_l)                                                     l = 0 .. 3K-1
    c     = Mamba_coarse(n)                                                  over 3K tokens
    g_t   = W [n^R_t ; n^s_t ; n^a_{t-1}] + b,   n^a_{-1} = 0                over K steps
    f     = LayerNorm(Mamba_fine(g))
    x_l  <- x_l + c_l + f_{floor(l / 3)}

This is the causal form that the paper's figure draws: what predicts a_t has seen no action from a_t on. The released code
differs: it groups (R_t, s_t, a_t) and tiles f along time instead of repeating each f_t, so that a token can see its own
target. `released_tiling=True` computes that, for loading and comparing only.

Heads: a_t from the token of s_t, s_{t+1} and R_{t+1} from the token of a_t (the paper's inverse learning objectives).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.models.trajectory.common import (
    Embedding,
    MLPHead,
    Prediction,
    Stream,
    TokenModel,
    action_head,
    check_sizes,
    flatten_steps,
    residual_stream,
    split_steps,
    step_mixer,
    token_mask,
)
from ssmkit.nn import Mamba, RMSNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionMambaConfig:
    """Sizes and choices; the defaults are the published ones."""

    state_dim: int
    action_dim: int
    discrete_actions: bool = False
    dim: int = 768
    depth: int = 24
    dstate: int = 16
    width: int = 4
    expand: int = 2
    context: int = 20
    max_timestep: int = 1000
    embedding: Embedding = "mlp"
    released_tiling: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, ("state_dim", "action_dim", "dim", "depth", "dstate", "width", "expand", "context"))
        if self.embedding not in ("mlp", "linear"):
            raise ValueError(f"embedding must be 'mlp' or 'linear', got {self.embedding!r}")


class MultiGrainedBlock(nn.Module):
    """One residual block: coarse and fine scan of the same normalised input."""

    def __init__(self, config: DecisionMambaConfig) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"d_state": config.dstate, "d_conv": config.width, "expand": config.expand}
        self.released_tiling = config.released_tiling
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.mixer = Mamba(config.dim, **sizes)
        self.mixer_group = Mamba(config.dim, **sizes)
        # Holds W and b; the taps are the slots R, s, a of a group.
        self.conv1d = nn.Conv1d(config.dim, config.dim, kernel_size=3, stride=3)
        self.ln_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch, K, 3, dim); mask (batch, K), True at real steps."""
        n = self.norm(x)
        coarse = split_steps(self.mixer(flatten_steps(n), mask=token_mask(mask)))
        if self.released_tiling:
            hidden_last = F.pad(flatten_steps(n)[:, :-1], (0, 0, 0, 1))
            fine = self.mixer_group(self.group(split_steps(hidden_last)), mask=mask)
            return x + coarse + split_steps(self.ln_norm(fine).repeat(1, 3, 1))
        shifted = torch.stack((n[:, :, 0], n[:, :, 1], previous_actions(n[:, :, 2], mask)), dim=2)
        fine = self.ln_norm(self.mixer_group(self.group(shifted), mask=mask))
        return x + coarse + fine[:, :, None]

    def group(self, n: Tensor) -> Tensor:
        """W applied to each group of three, as one matrix product: (batch, K, 3, dim) to (batch, K, dim)."""
        weight = self.conv1d.weight.transpose(1, 2).flatten(1)
        return F.linear(n.flatten(2), weight, self.conv1d.bias)

    def allocate(self, batch: int, dtype: torch.dtype | None) -> dict[str, Any]:
        """Carried state: both scans, and f of the step before, which the action token of that step still needs."""
        weight = self.ln_norm.weight
        return {
            "coarse": self.mixer.allocate_inference_cache(batch, 0, dtype),
            "fine": self.mixer_group.allocate_inference_cache(batch, 0, dtype),
            "fine_before": weight.new_zeros(batch, 1, len(weight)),
        }

    def step(self, x: Tensor, state: dict[str, Any]) -> Tensor:
        """Tokens a_{t-1}, R_t, s_t (batch, 3, dim), or R_0, s_0: three coarse updates and one fine one."""
        n = self.norm(x)
        coarse = step_mixer(self.mixer, n, state["coarse"])
        before = n[:, :-2] if n.shape[1] == 3 else torch.zeros_like(n[:, :1])
        group = torch.stack((n[:, -2:-1], n[:, -1:], before), dim=2)
        fine = self.ln_norm(step_mixer(self.mixer_group, self.group(group), state["fine"]))
        spread = torch.cat((state["fine_before"], fine, fine), dim=1)[:, -x.shape[1] :]
        state["fine_before"] = fine
        return x + coarse + spread


def previous_actions(n_action: Tensor, mask: Tensor | None) -> Tensor:
    """n^a_{t-1}: one step later, zero at the first real step of a row."""
    shifted = F.pad(n_action[:, :-1], (0, 0, 1, 0))
    if mask is None:
        return shifted
    return torch.where(F.pad(mask[:, :-1], (1, 0))[..., None], shifted, 0.0)


class Backbone(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, config: DecisionMambaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MultiGrainedBlock(config) for _ in range(config.depth))
        self.norm_f = RMSNorm(config.dim, eps=1e-5)


class DecisionMamba(TokenModel):
    """The model; parameter names are those of the released code."""

    time_before_norm = False
    streams = True
    learns_next_step = True

    def __init__(self, config: DecisionMambaConfig) -> None:
        super().__init__(config.state_dim, config.action_dim, config.dim, config.max_timestep, config.embedding)
        self.config = config
        self.transformer_model = nn.ModuleDict({"backbone": Backbone(config)})
        self.predict_state = nn.Linear(config.dim, config.state_dim)
        self.predict_rtg = nn.Linear(config.dim, 1)
        self.predict_action: nn.Module
        if config.embedding == "mlp":
            self.predict_action = MLPHead(config.dim, config.action_dim)
        else:
            self.predict_action = action_head(config.dim, config.action_dim, bounded=not config.discrete_actions)

    def blocks(self) -> list[MultiGrainedBlock]:
        """The blocks, first to last."""
        return [block for block in self.backbone.layers if isinstance(block, MultiGrainedBlock)]

    @property
    def backbone(self) -> Backbone:
        """Blocks and final norm, which the released names keep two levels down."""
        backbone = self.transformer_model["backbone"]
        assert isinstance(backbone, Backbone)
        return backbone

    def forward(
        self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Prediction:
        """Predictions at every step of a window; see `TrajectoryModel.forward`."""
        x = residual_stream(self.embed(states, actions, returns, timesteps))
        for layer in self.blocks():
            x = layer(x, mask)
        x = self.backbone.norm_f(x)
        return Prediction(self.predict_action(x[:, :, 1]), self.predict_state(x[:, :, 2]), self.predict_rtg(x[:, :, 2]))

    def allocate_stream(self, batch: int, dtype: torch.dtype | None = None) -> Stream:
        """The empty state of a roll-out of `batch` episodes."""
        if self.config.released_tiling:
            raise ValueError("released_tiling mixes steps across the window and cannot stream; roll out windowed")
        return Stream([layer.allocate(batch, dtype) for layer in self.blocks()])

    @torch.no_grad()
    def step(self, state: Tensor, returns: Tensor, previous_action: Tensor | None, stream: Stream) -> Tensor:
        """One step of a roll-out; see `TrajectoryModel.step`."""
        x = residual_stream(self.embed_step(state, returns, previous_action, stream.steps))
        for layer, layer_state in zip(self.blocks(), stream.layers, strict=True):
            x = layer.step(x, layer_state)
        stream.steps += 1
        return self.predict_action(self.backbone.norm_f(x[:, -1]))

    @staticmethod
    def translate(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A released checkpoint as `load_state_dict` takes it: without the unused word embedding and language head."""
        unused = ("transformer_model.backbone.embeddings.", "transformer_model.lm_head.")
        return {name: value for name, value in state_dict.items() if not name.startswith(unused)}


# Sizes of the released configuration; hopper was run with plain embeddings. "demo" is for a CPU and a small task.
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "released-hopper": {"embedding": "linear"},
    "small": {"dim": 128, "depth": 3},
    "demo": {"dim": 32, "depth": 2, "embedding": "linear"},
}
