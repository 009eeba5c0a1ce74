"""The 2-D SSM layer: a convolution over the image whose kernels are impulse responses of a state-space model."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmkit.ops import long_conv, ssm2d_kernel
from ssmkit.ops._check import check_ndim, check_shape

# In the order of the kernels; the published layer flips the image along nothing, rows, columns, and both.
CORNERS = {2: ("top_left", "bottom_right"), 4: ("top_left", "bottom_left", "top_right", "bottom_right")}


class SSM2D(nn.Module):
    """The 2-D SSM layer, `TwoDimensionalSSM` in the official code.

        y = normalization(sum over directions of K_direction * x  [+ omega x]),   K = `ssm2d_kernel` of the parameters

    A and B, after a sigmoid, belong to directions_amount * n_ssm models whose states all channels share; C to every channel
    and direction. Complex A has the radius sigmoid(A_radius) and the angle 2 pi sigmoid(A_angle). Baron et al. 2023,
    "A 2-Dimensional State Space Layer for Spatial Inductive Bias", arXiv:2306.06635.

    In a ViT it filters the normed tokens before they become queries, keys and values, the class token left out:

        block.attn = nn.Sequential(SSM2D(dim, L=patches, num_prefix_tokens=1), block.attn)

    or stands between the first layer of the MLP and its activation.

    Args:
        embed_dim: Channels.
        L: Tokens of the image that the kernels cover: they have ceil(sqrt(L)) rows and columns. Smaller images see
            the part of them that fits.
        ndim: States of each direction of the recurrence.
        n_ssm: Models per direction; it divides embed_dim.
        directions_amount: 4 for all corners, 2 for the top left and the bottom right one.
        complex_ssm: Whether the states are complex.
        normalize: Whether to normalise the output (LayerNorm).
        use_residual_inside_ssm: Whether to add omega x, the weight of the input in the output. The parameter omega is there
            in any case.
        num_prefix_tokens: Tokens at the start of a sequence, such as a class token, that pass unchanged.
        backend: Handed to `ssm2d_kernel`: "auto", "reference" or a backend's name.
    Shapes:
        x and output (batch, height, width, embed_dim), or (batch, seqlen, embed_dim) by rows of the image
    """

    def __init__(
        self,
        embed_dim: int,
        L: int = 32**2,
        ndim: int = 16,
        n_ssm: int = 1,
        directions_amount: Literal[2, 4] = 4,
        complex_ssm: bool = False,
        normalize: bool = False,
        use_residual_inside_ssm: bool = False,
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("L", L), ("ndim", ndim), ("n_ssm", n_ssm)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if embed_dim % n_ssm:
            raise ValueError(f"n_ssm must divide embed_dim {embed_dim}, got {n_ssm}")
        if directions_amount not in CORNERS:
            raise ValueError(f"directions_amount must be 2 or 4, got {directions_amount}")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be at least 0, got {num_prefix_tokens}")
        self.embed_dim, self.ndim, self.n_ssm, self.directions_amount = embed_dim, ndim, n_ssm, directions_amount
        self.is_complex, self.use_residual = complex_ssm, use_residual_inside_ssm
        self.one_side_length = math.isqrt(L - 1) + 1
        self.num_prefix_tokens = num_prefix_tokens
        self.backend = backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        def matrices() -> nn.ParameterDict:
            return nn.ParameterDict({f"A_{k}": torch.empty(kernels, ndim, **place) for k in range(1, 5)})

        kernels, parts = directions_amount * n_ssm, (2,) if complex_ssm else ()
        if complex_ssm:
            self.A_angle, self.A_radius = matrices(), matrices()
        else:
            self.A = matrices()
        self.B_1, self.B_2 = (nn.Parameter(torch.empty(kernels, ndim, *parts, **place)) for _ in range(2))
        channels = embed_dim * directions_amount
        self.C_1, self.C_2 = (nn.Parameter(torch.empty(channels, ndim, *parts, **place)) for _ in range(2))
        self.omega = nn.Parameter(torch.empty(embed_dim, **place))
        self.normalization = nn.LayerNorm(embed_dim, **place) if normalize else nn.Identity()
        # As in training of the published models, where A decays.
        for parameter in (self.B_1, self.B_2, self.C_1, self.C_2):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official start values."""
        if self.is_complex:
            for parameter in (*self.A_angle.values(), *self.A_radius.values()):
                nn.init.uniform_(parameter, 0.5, 3.0)
        else:
            for parameter in self.A.values():
                nn.init.normal_(parameter, std=0.2)
        for parameter in (self.B_1, self.B_2):
            nn.init.normal_(parameter, std=0.2)
        for parameter in (self.C_1, self.C_2, self.omega):
            nn.init.normal_(parameter)

    def kernel(self, height: int | None = None, width: int | None = None) -> Tensor:
        """The kernels (directions, embed_dim, rows, cols), in fp32 (fp64): whole, or what an image of this size sees."""
        sides = [min(self.one_side_length, self.one_side_length if n is None else n) for n in (height, width)]
        K = ssm2d_kernel(*self.matrices(), *sides, backend=self.backend)
        return K.unflatten(0, (self.directions_amount, self.embed_dim))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and C of `ssm2d_kernel`."""
        B, C = torch.stack([self.B_1, self.B_2]), torch.stack([self.C_1, self.C_2])
        if not self.is_complex:
            return torch.stack(list(self.A.values())).sigmoid(), B.sigmoid(), C
        # there are no complex numbers of 16 bits
        acc = torch.float64 if B.dtype == torch.float64 else torch.float32
        radius, angle = (torch.stack(list(t.values())).to(acc).sigmoid() for t in (self.A_radius, self.A_angle))
        B, C = B.to(acc).sigmoid(), C.to(acc)
        return torch.polar(radius, 2 * math.pi * angle), torch.view_as_complex(B), torch.view_as_complex(C)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Filter images (batch, height, width, embed_dim), or tokens of images of this size, by default square."""
        if x.ndim == 4:
            if size is not None:
                raise ValueError(f"size is for tokens: x has its own, {tuple(x.shape[1:3])}; leave it out")
            return self.filtered(x)
        check_ndim("x", x, "batch, seqlen, embed_dim")
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        seqlen = tokens.shape[1]
        side = math.isqrt(seqlen)
        height, width = (side, side) if size is None else size
        if height * width != seqlen:
            raise ValueError(
                f"x has {seqlen} tokens, which size {height} x {width} does not hold; give size=(rows, cols)"
            )
        y = self.filtered(tokens.unflatten(1, (height, width))).flatten(1, 2)
        return torch.cat([prefix, y], dim=1) if self.num_prefix_tokens else y

    def filtered(self, x: Tensor) -> Tensor:
        """The convolution of images."""
        check_shape("x", x, (*x.shape[:3], self.embed_dim), "batch, height, width, embed_dim")
        kernel = self.kernel(max(1, x.shape[1]), max(1, x.shape[2]))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        omega = self.omega.to(wide) if self.use_residual else None
        return self.normalization(long_conv(x, kernel, D=omega, start=CORNERS[self.directions_amount]))

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return (
            f"embed_dim={self.embed_dim}, ndim={self.ndim}, n_ssm={self.n_ssm}, "
            f"directions_amount={self.directions_amount}, complex_ssm={self.is_complex}, side={self.one_side_length}"
        )
