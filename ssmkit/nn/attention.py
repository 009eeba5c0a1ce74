"""Causal multi-head attention as in hybrid language models: one projection, a short convolution, rotary positions.

Arguments and parameter names are those of `mamba_ssm.modules.mha.MHA`, so official state dicts load. The attention itself
is `torch.nn.functional.scaled_dot_product_attention`. Rotary positions: Su et al. 2021, "RoFormer", arXiv:2104.09864.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkit.nn._inference import carried_state, check_one_token
from ssmkit.nn.linear import project
from ssmkit.ops import causal_conv1d, causal_conv1d_step
from ssmkit.ops._check import check_cu_seqlens, check_flag, check_ndim


class AttentionState(NamedTuple):
    """Keys and values so far, one row per sequence. Slot 0 takes what pads would write; token p lies in slot p + 1."""

    keys: Tensor  # (batch, 1 + max_seqlen, num_heads_kv, head_dim), rotated
    values: Tensor  # as keys
    lengths: Tensor  # (batch,) int64, tokens seen
    starts: Tensor  # (batch,) int64, the first token after the last reset
    conv_state: Tensor  # (batch, d_conv - 1, qkv_dim), empty without a convolution


class Places(NamedTuple):
    """Where the tokens of a call belong; each (batch, seqlen)."""

    row: Tensor  # sequence, that is row of the state
    position: Tensor  # real tokens of the sequence before this one
    start: Tensor  # position of the first token that this one may see
    segment: Tensor  # index in this call of the token that began what this one may see
    real: Tensor  # False at pads


class MHA(nn.Module):
    """Causal attention with grouped keys and values.

        q, k, v, up, gate = in_proj(x);   q, k, v = conv(q, k, v)        the convolution has no activation
        y = softmax(rotate(q) rotate(k)^T * softmax_scale) v             over tokens of the same sequence, up to its own
        out_proj([y, up * silu(gate)])                                   up, gate empty unless mlp_dim > 0

    Args:
        embed_dim: Width of input and output.
        num_heads, num_heads_kv: Heads of queries, and of keys and values (as many if None).
        head_dim: Channels per head; embed_dim / num_heads if None.
        mlp_dim: Width of up and gate together, rounded up to a multiple of 256.
        qkv_proj_bias, out_proj_bias: Whether the projections have a bias. The convolution always has one.
        softmax_scale: Of the products; 1 / sqrt(head_dim) if None.
        causal: Must be True.
        layer_idx: Key of this layer's state in `inference_params.key_value_memory_dict`.
        d_conv: Taps of the convolution; 0 for none.
        rotary_emb_dim: Channels of each head that turn with the position.
        rotary_emb_base: The slowest pair turns by about 1 / rotary_emb_base per token.
        rotary_emb_interleaved: Pairs are neighbours (2i, 2i + 1), not (i, i + rotary_emb_dim / 2).
        backend: Handed to the convolution.
    Shapes:
        x and output (batch, seqlen, embed_dim); state as in `AttentionState`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = True,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        for name, size in {"embed_dim": embed_dim, "num_heads": num_heads, "num_heads_kv": num_heads_kv}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if num_heads % num_heads_kv:
            raise ValueError(f"num_heads_kv must divide num_heads {num_heads}, got {num_heads_kv}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}; or give head_dim")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if rotary_emb_dim % 2 or not 0 <= rotary_emb_dim <= self.head_dim:
            raise ValueError(f"rotary_emb_dim must be even and at most head_dim {self.head_dim}, got {rotary_emb_dim}")
        if d_conv < 0 or mlp_dim < 0:
            raise ValueError(f"d_conv and mlp_dim must be at least 0, got {d_conv} and {mlp_dim}")
        if not causal:
            raise ValueError("causal must be True, got False: the layer attends to earlier tokens only")
        self.embed_dim, self.num_heads, self.num_heads_kv, self.d_conv = embed_dim, num_heads, num_heads_kv, d_conv
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        self.softmax_scale = softmax_scale
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        self.layer_idx = layer_idx
        self.backend = backend
        self.qkv_dim = self.head_dim * (num_heads + 2 * num_heads_kv)
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **place)
        if d_conv:
            self.conv1d = nn.Conv1d(
                self.qkv_dim, self.qkv_dim, d_conv, groups=self.qkv_dim, padding=d_conv - 1, **place
            )
        self.out_proj = nn.Linear(self.head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **place)

    def forward(
        self,
        x: Tensor,
        inference_params: Any = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: AttentionState | tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            x: Input                                                     (batch, seqlen, embed_dim)
            inference_params: An object like mamba_ssm's InferenceParams (key_value_memory_dict, seqlen_offset,
                max_seqlen): at offset 0 the tokens fill this layer's state, later each call takes one token.
            mask: True at real tokens; a pad is as if it were not there  (batch, seqlen) bool
            resets: Tokens that drop everything before them              (batch, seqlen) bool
            cu_seqlens: Offsets of sequences packed into one row         (nseq + 1,)  int32 or int64
            state: As in `AttentionState`, continued and then updated in place; with cu_seqlens one for each sequence.
        """
        check_ndim("x", x, "batch, seqlen, embed_dim")
        batch, seqlen = x.shape[:2]
        check_flag("mask", mask, batch, seqlen)
        check_flag("resets", resets, batch, seqlen)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, seqlen)
        nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        walk: dict[str, Any] = {"mask": mask, "resets": resets, "cu_seqlens": cu_seqlens}
        state, single = carried_state(self, state, inference_params, nseq, **walk)
        if single:
            assert state is not None
            return self.step(x, *state)[0]
        carried = None if state is None else AttentionState(*state)
        if carried is not None and len(carried.keys) != nseq:
            raise ValueError(
                f"state must hold {nseq} sequences, got {len(carried.keys)}; "
                f"make it with allocate_inference_cache({nseq}, max_seqlen)"
            )
        qkv, up_gate = project(self.in_proj, x).split((self.qkv_dim, self.mlp_dim), dim=-1)
        if self.d_conv:
            qkv, conv_state = causal_conv1d(
                qkv,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_state=None if carried is None else carried.conv_state.clone(),
                return_final_state=True,
                **walk,
                backend=self.backend,
            )
            if carried is not None:
                carried.conv_state.copy_(conv_state.detach())
        if not qkv.numel():
            return self.out_proj(qkv.new_zeros(batch, seqlen, self.out_proj.in_features))
        plain = carried is None and mask is None and resets is None and cu_seqlens is None
        places = None if plain else places_of(x, mask, resets, cu_seqlens, carried)
        return self._merge(self._attend(qkv, places, carried), up_gate)

    def step(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """One token: x (batch, 1, embed_dim). Returns the output and the state, updated in place."""
        check_one_token("x", x, self.embed_dim)
        carried = AttentionState(*state)
        if len(carried.keys) != len(x):
            raise ValueError(f"state must hold {len(x)} sequences, one for each row of x, got {len(carried.keys)}")
        qkv, up_gate = project(self.in_proj, x).split((self.qkv_dim, self.mlp_dim), dim=-1)
        if self.d_conv:
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            qkv = causal_conv1d_step(qkv.squeeze(1), carried.conv_state, weight, bias, backend=self.backend)[:, None]
        position = carried.lengths[:, None].clone()
        row = torch.arange(x.shape[0], device=x.device)[:, None]
        start = carried.starts[:, None].clone()
        places = Places(row, position, start, torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool))
        return self._merge(self._attend(qkv, places, carried), up_gate), *state

    def _attend(self, qkv: Tensor, places: Places | None, state: AttentionState | None) -> Tensor:
        """The heads' outputs side by side                             (batch, seqlen, num_heads * head_dim)"""
        kv_dim = self.num_heads_kv * self.head_dim
        parts = qkv.split((self.num_heads * self.head_dim, kv_dim, kv_dim), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.rotary_emb_dim:
            position = (
                torch.arange(qkv.shape[1], device=qkv.device)[None]
                if places is None
                else places.position - places.start
            )
            q, k = (self._rotate(part, position) for part in (q, k))
        if places is None:
            y = self._softmax(q, k, v, None)
        elif state is None:
            y = self._softmax(q, k, v, visible_tokens(places))
        else:
            y = self._softmax(q, *self._remember(k, v, places, state))
        y = y.flatten(-2)
        return y if places is None else y.masked_fill(~places.real[..., None], 0)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Attention of (batch, seqlen, heads, head_dim); visible (batch, seqlen, keys), causal if None."""
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.to(q.dtype).transpose(1, 2),
            v.to(q.dtype).transpose(1, 2),
            attn_mask=None if visible is None else visible[:, None],
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads_kv != self.num_heads,
        ).transpose(1, 2)

    def _remember(self, k: Tensor, v: Tensor, places: Places, state: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values into the state; all of them as (rows, keys, heads, head_dim), and which are visible."""
        slots = state.keys.shape[1]
        slot = torch.where(places.real, places.position + 1, 0)
        # Elsewhere looking would wait for the device, or end the graph; there the write itself refuses.
        if not torch.compiler.is_compiling() and k.device.type == "cpu" and int(slot.max()) >= slots:
            raise ValueError(
                f"the state holds {slots - 1} tokens, got {int(slot.max())}; allocate it with a larger max_seqlen"
            )
        written = []
        for cache, new in ((state.keys, k), (state.values, v)):
            # A cache that is overwritten later must not be the one that backward reads.
            whole = cache.clone() if torch.is_grad_enabled() and new.requires_grad else cache
            whole[places.row, slot] = new.to(cache.dtype)
            if whole is not cache:
                cache.copy_(whole.detach())
            written.append(whole)
        row, start = places.row.flatten(), places.start.flatten()
        state.lengths.scatter_add_(0, row, places.real.flatten().to(torch.int64))
        state.starts.scatter_reduce_(0, row, start, "amax")
        at = torch.arange(slots, device=k.device)
        visible = (at > places.start[..., None]) & (at <= places.position[..., None] + 1)
        keys, values = written
        if keys.shape[0] == k.shape[0]:
            return keys, values, visible
        own = places.row[..., None] == torch.arange(keys.shape[0], device=k.device)
        visible = (own[..., None] & visible[..., None, :]).flatten(-2)
        return keys.flatten(0, 1)[None], values.flatten(0, 1)[None], visible

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn the pairs of x (batch, seqlen, heads, head_dim) by position * base^(-2i / rotary_emb_dim), in fp32."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        pair = torch.arange(0, self.rotary_emb_dim, 2, device=x.device, dtype=wide) / self.rotary_emb_dim
        angle = position.to(wide)[..., None, None] * self.rotary_emb_base**-pair
        cos, sin = angle.cos(), angle.sin()
        turning, rest = x.split((self.rotary_emb_dim, self.head_dim - self.rotary_emb_dim), dim=-1)
        turning = turning.to(wide)
        if self.rotary_emb_interleaved:
            a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = turning.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)

    def _merge(self, y: Tensor, up_gate: Tensor) -> Tensor:
        """The attention's channels before those of the MLP, and the output projection."""
        if not self.mlp_dim:
            return project(self.out_proj, y)
        up, gate = up_gate.chunk(2, dim=-1)
        return project(self.out_proj, torch.cat((y, up * F.silu(gate)), dim=-1))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> AttentionState:
        """The state before any token, with room for max_seqlen of them."""
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given: the state of an attention layer holds every token")
        weight = self.in_proj.weight
        dtype = dtype or weight.dtype
        keys, values = (
            weight.new_zeros(batch_size, 1 + max_seqlen, self.num_heads_kv, self.head_dim, dtype=dtype)
            for _ in range(2)
        )
        lengths, starts = (torch.zeros(batch_size, dtype=torch.int64, device=weight.device) for _ in range(2))
        conv_state = weight.new_zeros(batch_size, max(self.d_conv - 1, 0), self.qkv_dim, dtype=dtype)
        return AttentionState(keys, values, lengths, starts, conv_state)

    def extra_repr(self) -> str:
        """Sizes, for print()."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}, "
            f"head_dim={self.head_dim}, d_conv={self.d_conv}, rotary_emb_dim={self.rotary_emb_dim}"
        )


def places_of(
    x: Tensor,
    mask: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    state: AttentionState | None,
) -> Places:
    """Where the tokens of x (batch, seqlen, ...) belong, given pads, resets, packing and what was there before."""
    batch, seqlen = x.shape[:2]
    token = torch.arange(seqlen, device=x.device).expand(batch, -1)
    if cu_seqlens is None:
        row = torch.arange(batch, device=x.device)[:, None].expand(-1, seqlen)
        first = torch.zeros_like(token)
    else:
        offsets = cu_seqlens.to(torch.int64)
        row = torch.searchsorted(offsets[1:], token.contiguous(), right=True)
        first = offsets[row]
    real = torch.ones_like(token, dtype=torch.bool) if mask is None else mask
    before = real.cumsum(1) - real.to(torch.int64)
    position = before - before.gather(1, first)
    begun = torch.zeros_like(position)
    if state is not None:
        position = position + state.lengths[row]
        begun = state.starts[row]
    begins = token == first
    if resets is not None:
        begun = torch.where(resets, position, begun)
        begins = begins | resets
    segment = torch.where(begins, token, 0).cummax(1).values
    return Places(row, position, begun.gather(1, segment), segment, real)


def visible_tokens(places: Places) -> Tensor:
    """Which tokens of the same call each one sees                     (batch, seqlen, seqlen)

    Pads see themselves, so that every row of the softmax has something to sum.
    """
    token = torch.arange(places.segment.shape[1], device=places.segment.device)
    same = places.segment[:, :, None] == places.segment[:, None, :]
    earlier = (token[:, None] >= token) & places.real[:, None, :]
    return same & earlier | (token[:, None] == token)
