"""Whole vision backbones, and DeiT with fused attention beside them: attention is quadratic in the pixels, scans are not."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.models import create_model
from ssmkit.models.registry import takes
from ssmkit.models.vision.backbone import VisionBackbone
from ssmkit.nn import PatchEmbed

from . import Bench, Prepared, Rival, register

# Residual streams through up to 24 layers of products of up to 3072 terms, each rounded in fp32.
SLACK = 8.0
# DeiT of about the parameters of each.
MODELS = {
    "vim_tiny": ("Vim-Ti", 192, 3),
    "vmamba_tiny_s1l8": ("VMamba-T", 384, 6),
    "mamba2d_nano": ("Mamba2D-N", 192, 3),
}


def inputs(model: str, side: int, batch: int, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A name of `ssmkit.models`, images, and a fresh model's parameters under their names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = sized(model, side)
        x = torch.randn(batch, 3, side, side)
    weights = {name: t.to(device) for name, t in made.state_dict().items()}
    return {"model": model, "x": x.to(device, dtype), **weights}


def sized(model: str, side: int, **options: Any) -> VisionBackbone:
    """The model by name, for images of this side."""
    made = create_model(model, **({"img_size": side} if takes(model, "img_size") else {}), **options)
    assert isinstance(made, VisionBackbone)
    return made.eval()


def ours(given: dict[str, Any]) -> Prepared:
    """The model on the inputs' weights, in the dtype of the images but for what stays in fp32."""
    x = given["x"]
    model = sized(given["model"], x.shape[-1], device=x.device)
    model.load_state_dict({name: t for name, t in given.items() if name not in ("model", "x")})
    if x.dtype != torch.float32:
        model.to(x.dtype)
    return Prepared(lambda: model(x))


def reference(model: str, x: Tensor, **weights: Tensor) -> Tensor:
    """The model in float64; its ops run on the kernels, whose float64 the tests hold to the reference."""
    made = sized(model, x.shape[-1]).double()
    made.load_state_dict(weights)
    return made(x.double())


class DeiT(nn.Module):
    """Touvron et al. 2021, arXiv:2012.12877, without distillation: patches of 16, 12 blocks, fused attention."""

    def __init__(self, side: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.patch_embed = PatchEmbed(side, 16, 3, dim)
        count = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, count + 1, dim))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim), "qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim),
                    "norm2": nn.LayerNorm(dim), "fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim),
                }
            )
            for _ in range(12)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        tokens = self.patch_embed(x).flatten(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[index,operator]
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + block["proj"](mixed)  # type: ignore[index,operator]
            tokens = tokens + block["fc2"](F.gelu(block["fc1"](block["norm2"](tokens))))  # type: ignore[index,operator]
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


def deit(given: dict[str, Any]) -> Prepared:
    x = given["x"]
    _, dim, heads = MODELS[given["model"]]
    model = DeiT(x.shape[-1], dim, heads).to(x.device, x.dtype).eval()
    return Prepared(lambda: model(x))


@cache
@torch.no_grad()
def products_of_one(model: str, side: int) -> float:
    """Multiply-adds of one image in linear layers and convolutions; the ops' own projections are left out."""
    sums: list[float] = []

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        sums.append(float(out.numel() * weight[0].numel()))

    made = sized(model, side)
    for module in made.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    made(torch.zeros(1, 3, side, side))
    return sum(sums)


register(
    Bench(
        name="backbone",
        op=Rival(prepare=ours, modes=("fwd",)),
        inputs=inputs,
        modes=("fwd",),
        shapes={
            f"{title}, {side} pixels": {"model": model, "side": side, "batch": 1}
            for model, (title, _, _) in MODELS.items()
            for side in (224, 512, 1024, 1248)
        },
        bytes_read=lambda model, dtype: dtype.itemsize * sum(p.numel() for p in meta(model).parameters()),
        products=lambda model, side, batch: batch * products_of_one(model, side),
        slack=SLACK,
        reference=reference,
        rivals={
            "DeiT of that width": Rival(
                prepare=deit, modes=("fwd",), contrast=True, note="another model: 12 blocks of fused attention"
            )
        },
    )
)


def meta(model: str) -> nn.Module:
    """The model without memory, for its sizes."""
    with torch.device("meta"):
        return create_model(model)
