"""What scans along several paths learn, each path on its own, and what they make of the tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn.mamba import initial_dt_bias, s4d_real


class PathScans(nn.Module):
    """Holds x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs and Ds, named as in VMamba's code.

    Shapes:
        By paths: x_proj_weight (K, R + 2 N, dim), dt_projs_weight (K, dim, R), dt_projs_bias (K, dim), A_logs (K * dim, N),
        Ds (K * dim,); K paths, rank R of the step sizes, N states per channel.
    """

    fp32 = True  # scan in fp32 also where the tokens have fewer bits

    def add_path_weights(
        self,
        npaths: int,
        dim: int,
        d_state: int,
        dt_rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register them. All but those of the step sizes have their start values: Mamba's."""
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.x_proj_weight = nn.Parameter(torch.empty(npaths, dt_rank + 2 * d_state, dim, **place))
        self.dt_projs_weight = nn.Parameter(torch.empty(npaths, dim, dt_rank, **place))
        self.dt_projs_bias = nn.Parameter(torch.empty(npaths, dim, **place))
        self.A_logs = nn.Parameter(s4d_real(npaths * dim, d_state, device))
        self.Ds = nn.Parameter(torch.ones(npaths * dim, device=device))
        for parameter in (self.A_logs, self.Ds):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        nn.init.uniform_(self.x_proj_weight, -(dim**-0.5), dim**-0.5)

    def scan_inputs(self, x: Tensor, sets: slice | list[int] = slice(None)) -> dict[str, Any]:
        """What `cross_selective_scan` takes besides paths: tokens, and what each path makes of them.

        Args:
            x: Tokens or an image                  (batch, ..., dim)
            sets: Of the parameters by paths, which.
        """
        x, wide = x.flatten(1, -2), torch.float64 if self.A_logs.dtype == torch.float64 else torch.float32
        x_proj_weight, dt_weight = self.x_proj_weight[sets], self.dt_projs_weight[sets]
        projected = F.linear(x, x_proj_weight.flatten(0, 1)).unflatten(2, x_proj_weight.shape[:2])
        npaths, rank, dstate = len(self.dt_projs_bias), dt_weight.shape[2], self.A_logs.shape[1]
        dt, B, C = projected.split((rank, dstate, dstate), dim=3)
        per_token = {"x": x, "dt": dt, "B": B, "C": C}
        if self.fp32:
            per_token = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in per_token.items()}
        return {
            **per_token,
            "A": -torch.exp(self.A_logs.to(wide)).unflatten(0, (npaths, -1))[sets],
            "D": self.Ds.unflatten(0, (npaths, -1))[sets],
            "dt_bias": self.dt_projs_bias[sets],
            "dt_weight": dt_weight,
            "dt_softplus": True,
        }


@torch.no_grad()
def init_dt_projs(
    weight: Tensor,
    bias: Tensor,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
) -> None:
    """`init_dt` of Mamba for weights (K, dim, R) and biases (K, dim) of several paths."""
    spread = weight.shape[2] ** -0.5 * dt_scale
    if dt_init == "constant":
        nn.init.constant_(weight, spread)
    else:
        nn.init.uniform_(weight, -spread, spread)
    bias.copy_(initial_dt_bias(bias.numel(), dt_min, dt_max, dt_init_floor, bias.device).view_as(bias))
