"""GrootVL's layer for text: Mamba, whose state also gathers what comes along a tree over the prompt.

Xiao et al. 2024, "MambaTree: Tree Topology is All You Need in State Space Model", arXiv:2406.02395; its code calls the
models GrootL. They are fine-tuned from Mamba's weights, so the parameters are those of `Mamba`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkit.nn.grootv import EPS, edges_of
from ssmkit.nn.mamba import Mamba
from ssmkit.ops import causal_conv1d, minimum_spanning_tree, selective_scan, tree_scan
from ssmkit.ops._check import check_ndim
from ssmkit.ops.minimum_spanning_tree import Tree

REACH = 3  # tokens back that an edge may join


class GrootL(Mamba):
    """Mamba's mixer with a second recurrence over a tree. Arguments and parameters are those of `Mamba`.

        h_t = exp(dt_t A) h_{t-1} + b_t,   b_t = dt_t B_t x_t                              Mamba's
        g_t = b_t + sum over children s of t:  exp(dt_{s+1} A) g_s                         leaves to the last token
        y_t = (C_t . (h_t + tree_weight g_t) + D x_t) * silu(z_t)

    The tree is the minimum spanning tree of edges between each token of the prompt and the three before it, and between
    each later token and the one before it, weighted by exp(-cos(b_s, b_t)); its root is the last token, and no gradient
    flows through its choice. An edge of child s bears the decay into the token after s, wherever its parent is: along a
    chain g is h. See `ssmkit.ops.tree_scan`. A child may come after its parent, so the layer is not causal within the
    prompt, and there is no `step`.

    Shapes:
        hidden_states and output (batch, seqlen, d_model)
    """

    tree_weight = 0.3

    def forward(self, hidden_states: Tensor, context_len: int | None = None) -> Tensor:  # type: ignore[override]
        """Mix the tokens.

        Args:
            hidden_states: Input                  (batch, seqlen, d_model)
            context_len: Tokens of the prompt, which come first; by default all.
        """
        check_ndim("hidden_states", hidden_states, "batch, seqlen, d_model")
        seqlen = hidden_states.shape[1]
        context_len = seqlen if context_len is None else context_len
        if not 0 <= context_len <= seqlen:
            raise ValueError(f"context_len must lie in 0..{seqlen}, the number of tokens, got {context_len}")
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = causal_conv1d(x, weight, bias, activation="silu", backend=self.backend)
        assert isinstance(x, Tensor)
        dt, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        y = selective_scan(
            x,
            dt,
            self.A(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            backend=self.backend,
        )
        assert isinstance(y, Tensor)
        y = y + (self.tree_weight * self.gathered(x, dt, B, C, context_len)).to(y.dtype)
        out: Tensor = self.out_proj(y * F.silu(z))
        return out

    def gathered(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, context_len: int) -> Tensor:
        """C_t . g_t in fp32, fp64 in a float64 layer, one state after another      (batch, seqlen, d_inner)"""
        A = self.A()
        x, dt, B, C = (part.to(A.dtype) for part in (x, dt, B, C))
        dt = F.softplus(dt + self.dt_proj.bias.to(A.dtype))
        input_ = dt * x
        tree = prompt_tree(input_, B, context_len, backend=self.backend)
        # The root's, which the roll brings from the first token, is not read.
        into_next = dt.roll(-1, dims=1)
        y = torch.zeros_like(x)
        for n in range(self.d_state):
            g = tree_scan(
                torch.exp(into_next * A[:, n]), input_ * B[..., n, None], tree, sweeps="up", backend=self.backend
            )
            y = y + g * C[..., n, None]
        return y

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: the tree needs all tokens."""
        raise NotImplementedError("GrootL takes whole sequences: call the layer, or step a Mamba with its weights")


@torch.no_grad()
def prompt_tree(x: Tensor, B: Tensor, context_len: int, *, backend: str = "auto") -> Tree:
    """The tree of text: over edges of `prompt_edges`, weighted by exp(-cos) of the tokens' x B^T.

    Args:
        x, B: The factors of what is compared    (batch, seqlen, dim), (batch, seqlen, dstate)
        context_len: Tokens of the prompt.
    """
    seqlen = x.shape[1]
    edges = edges_of(prompt_edges, seqlen, context_len, device=x.device)
    later, earlier = edges.long().unbind(1)
    # The products of outer products are those of their factors.
    dot = (x[:, later] * x[:, earlier]).sum(-1) * (B[:, later] * B[:, earlier]).sum(-1)
    length = (torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(B, dim=-1)).clamp(min=EPS)
    weights = torch.exp(-dot / (length[:, later] * length[:, earlier]))
    return minimum_spanning_tree(weights, edges, seqlen, root=max(seqlen - 1, 0), backend=backend)


def prompt_edges(seqlen: int, context_len: int, device: torch.device | str | None = None) -> Tensor:
    """Pairs (t, t - k), (nedges, 2) int32, with k = 1 and in the prompt up to 3; from the last token on, small k first."""
    after = torch.arange(max(seqlen - 1, 0), max(context_len - 1, 0), -1, device=device)
    within = torch.arange(max(context_len - 1, REACH - 1), REACH - 1, -1, device=device)
    first = [(t, t - k) for t in range(min(context_len, REACH) - 1, 0, -1) for k in range(1, t + 1)]
    back = within[:, None] - torch.arange(1, REACH + 1, device=device)
    parts = (
        torch.stack((after, after - 1), dim=1),
        torch.stack((within[:, None].expand_as(back), back), dim=2).flatten(0, 1),
        torch.tensor(first, dtype=torch.int64, device=device).view(-1, 2),
    )
    return torch.cat(parts).to(torch.int32)
