"""Decomposed bidirectional Mamba (DBM): one set of weights scans half of the channels forwards, the other half backwards.

Chen et al. 2024, "Video Mamba Suite", arXiv:2403.09626, section 3. Arguments, parameter names and initialisation are those
of its `mamba_new.Mamba`, so official state dicts load.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmkit.nn.mamba import checked_dt_rank, init_dt
from ssmkit.nn.vim import add_direction, backwards_of, scan, walks
from ssmkit.paths import ScanPath


class DBM(nn.Module):
    """The DBM mixer: x_f, z_f, x_b, z_b = in_proj(u); out_proj of [scan(x_f) * silu(z_f), backward scan(x_b) * silu(z_b)].

    Both scans, and the convolutions before them, use the same weights. Nothing is flipped or laid end to end on the way in.

    Args:
        d_model, d_state, d_conv, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias: As in `Mamba`.
        expand: Inner width of each direction is expand * d_model. The published models use 1 where Vim's mixer uses 2.
        use_fast_path, layer_idx, init_layer_scale: Accepted for compatibility; there is one path, no state to keep, and
            the published layer makes no use of the last.
        backend: Handed to the ops: "auto", "reference" or a backend's name.
    Shapes:
        hidden_states and output (batch, seqlen, d_model); in_proj.weight (4 * d_inner, d_model), the forward direction
        first; out_proj.weight (d_model, 2 * d_inner).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_layer_scale: float | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dt_rank = checked_dt_rank(d_model, dt_rank, dt_min, dt_max, dt_init)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.layer_idx = layer_idx
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 4 * self.d_inner, bias=bias, **place)
        add_direction(self, "", self.d_inner, d_state, d_conv, self.dt_rank, conv_bias=conv_bias, **place)
        init_dt(self.dt_proj, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)  # type: ignore[arg-type]
        self.out_proj = nn.Linear(2 * self.d_inner, d_model, bias=bias, **place)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        path: ScanPath | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            hidden_states: Input                                         (batch, seqlen, d_model)
            path: Order in which the forward half visits the tokens, by default as they lie; the other half goes backwards.
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
        """
        x_f, z_f, x_b, z_b = self.in_proj(hidden_states).chunk(4, dim=-1)
        tokens: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens}
        (forwards,) = walks(path)
        y_f = scan(self, "", x_f, forwards | tokens, z=z_f)
        y_b = scan(self, "", x_b, backwards_of(forwards) | tokens, z=z_b)
        out: Tensor = self.out_proj(torch.cat((y_f, y_b), dim=-1))
        return out

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
