"""mamba_ssm's layers and what they are built with, under the official argument names; published code runs unchanged."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmkit
from ssmkit.interop import install
from ssmkit.interop.mamba_ssm.distributed import distributed_utils, tensor_parallel
from ssmkit.interop.mamba_ssm.models.config_mamba import MambaConfig
from ssmkit.interop.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from ssmkit.interop.mamba_ssm.modules.mamba2 import Mamba2
from ssmkit.interop.mamba_ssm.modules.mamba2_simple import Mamba2Simple
from ssmkit.interop.mamba_ssm.modules.mamba3 import Mamba3
from ssmkit.interop.mamba_ssm.modules.mha import MHA
from ssmkit.interop.mamba_ssm.utils import determinism, generation
from ssmkit.interop.mamba_ssm.utils.generation import InferenceParams
from ssmkit.interop.mamba_ssm.utils.torch import custom_bwd, custom_fwd

LAYERS = {"Mamba2": Mamba2, "Mamba2Simple": Mamba2Simple, "Mamba3": Mamba3}
SIZES = {"d_model": 16, "d_state": 8, "headdim": 8}
ABSENT = all(importlib.util.find_spec(name) is None for name in ("mamba_ssm", "causal_conv1d"))


def same_weights(kind, theirs, **sizes):
    torch.manual_seed(0)
    layer = theirs(**sizes, layer_idx=0)
    ours = kind(**sizes, layer_idx=0)
    ours.load_state_dict(layer.state_dict())
    return layer, ours


@pytest.mark.parametrize("name", LAYERS)
def test_layers_call_their_input_u(name):
    """By name and by position, with packed sequences, and token after token."""
    layer, ours = same_weights(
        getattr(ssmkit.nn, name), {"Mamba2": Mamba2, "Mamba3": Mamba3}.get(name, Mamba2Simple), **SIZES
    )
    assert isinstance(layer, getattr(ssmkit.nn, name))
    x, seq_idx = torch.randn(1, 9, 16), torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        whole = ours(x)
        assert torch.equal(layer(u=x), whole) and torch.equal(layer(x), whole)
        assert torch.equal(layer(u=x, seq_idx=seq_idx), ours(x, seq_idx=seq_idx))
        assert torch.equal(layer(u=x, seq_idx=seq_idx, cu_seqlens=offsets), ours(x, cu_seqlens=offsets))
        params, out = InferenceParams(9, 1), []
        for step in range(9):
            params.seqlen_offset = step
            out.append(layer(u=x[:, step : step + 1], inference_params=params))
        torch.testing.assert_close(torch.cat(out, dim=1), whole)
        if name == "Mamba2":
            flat = layer(u=x.flatten(0, 1), seqlen=9, seq_idx=None, cu_seqlens=None, inference_params=None)
            assert torch.equal(flat.view_as(whole), whole) and torch.equal(layer(x[0], 9), flat)


@pytest.mark.parametrize("kind", [Mamba2, Mamba3])
def test_tokens_after_the_last_offset(kind):
    """A row that goes on after the sequences that cu_seqlens tells of, as generation from packed prompts has it."""
    layer = kind(**SIZES, layer_idx=0)
    x, offsets = torch.randn(1, 11, 16), torch.tensor([0, 4, 7, 7])
    seq_idx = torch.tensor([[0] * 4 + [1] * 3 + [5] * 2 + [-1] * 2])
    params, alone = InferenceParams(11, 3), InferenceParams(11, 3)
    with torch.no_grad():
        out = layer(x, seq_idx=seq_idx, cu_seqlens=offsets, inference_params=params)
        expected = layer(x[:, :7], cu_seqlens=offsets, inference_params=alone)
        assert torch.equal(out[:, :7], expected) and not out[:, 9:].any()
        torch.testing.assert_close(out[:, 7:9], layer(x[:, 7:9]))
    for state, other in zip(params.key_value_memory_dict[0], alone.key_value_memory_dict[0], strict=True):
        assert torch.equal(state, other)
    # a sequence that would go on there, and offsets alone, are mistakes
    for numbers in (seq_idx.clamp(max=1), None):
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to seqlen 11"):
            layer(x, seq_idx=numbers, cu_seqlens=offsets)


@pytest.mark.parametrize("kind", [Mamba2, Mamba3])
def test_tokens_after_the_last_offset_with_flags_and_a_state(kind):
    layer = kind(**SIZES, layer_idx=0)
    x, offsets, seq_idx = torch.randn(1, 9, 16), torch.tensor([0, 6]), torch.tensor([[0] * 6 + [1] * 3])
    flags = {"resets": torch.arange(9)[None] == 7, "mask": torch.arange(9)[None] != 3}
    state, alone = layer.allocate_inference_cache(1), layer.allocate_inference_cache(1)
    with torch.no_grad():
        out = layer(x, seq_idx=seq_idx, cu_seqlens=offsets, state=state, **flags)
        expected = [layer(x[:, :6], state=alone, mask=flags["mask"][:, :6]), layer(x[:, 6:7]), layer(x[:, 7:])]
    torch.testing.assert_close(out, torch.cat(expected, dim=1))
    torch.testing.assert_close(tuple(state), tuple(alone))


@pytest.mark.parametrize("kind", [Mamba2, Mamba3])
def test_compiled_with_numbers_and_offsets(kind):
    """Whose values are not read: that tokens follow the last offset shows in the numbers only."""
    layer, x = kind(**SIZES), torch.randn(1, 9, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for last, end in ((1, 9), (2, 7), (-1, 7)):
        walk = {"seq_idx": torch.tensor([[0] * 4 + [1] * 3 + [last] * 2]), "cu_seqlens": torch.tensor([0, 4, end])}
        torch.testing.assert_close(compiled(x, **walk), layer(x, **walk))


def test_steps_of_mamba3_have_the_official_order():
    layer, ours = same_weights(ssmkit.nn.Mamba3, Mamba3, **SIZES)
    states = layer.allocate_inference_cache(2, 5, "cpu", torch.bfloat16, inplace_state=None)
    assert [state.dtype for state in states] == [torch.float32] * 3 + [torch.bfloat16]
    assert [state.shape[1:] for state in states] == [(4, 2), (4, 8, 8), (1, 4, 8), (4, 8)]
    states, others, x = layer.allocate_inference_cache(2, 5), ours.allocate_inference_cache(2), torch.randn(2, 3, 16)
    names = ("angle_state", "ssm_state", "k_state", "v_state")
    with torch.no_grad():
        for step in range(3):
            out, *after = layer.step(x[:, step], **dict(zip(names, states, strict=True)), ignored=1)
            expected, *_ = ours.step(x[:, step : step + 1], *others)
            assert torch.equal(out, expected[:, 0])
            assert all(a is b and torch.equal(a, c) for a, b, c in zip(after, states, others, strict=True))
        assert layer.step(x[:, :1], *states)[0].shape == (2, 1, 16)


@pytest.mark.parametrize(("kind", "layer"), [(Mamba2, "Mamba2"), (Mamba3, "Mamba3")])
def test_a_models_mixers_are_the_official_layers(kind, layer):
    """So that isinstance and calls by name find what they look for."""
    config = MambaConfig(
        16, 0, 2, 21, {"layer": layer, "headdim": 8, "d_state": 8}, [1], {"num_heads": 2, "causal": True}
    )
    model, x = MambaLMHeadModel(config), torch.randn(1, 4, 16)
    assert isinstance(model.backbone.layers[0].mixer, kind) and isinstance(model.backbone.layers[1].mixer, MHA)
    assert model.backbone.layers[0].mixer(u=x).shape == x.shape
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_layers_of_one_process():
    x, one, two = torch.randn(3, 6), SimpleNamespace(size=lambda: 1), SimpleNamespace(size=lambda: 2)
    for kind in (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear):
        layer = kind(6, 4, one, bias=False, sequence_parallel=False, multiple_of=2)
        assert torch.equal(layer(x=x), F.linear(x, layer.weight)) and isinstance(layer, nn.Linear)
        assert kind(6, 4, None).bias.shape == (4,)
        with pytest.raises(ValueError, match="process_group must hold one process, got 2"):
            kind(6, 4, two)
        with pytest.raises(ValueError, match="_features must be a multiple of multiple_of 5, got"):
            kind(6, 4, None, multiple_of=5)
    assert torch.equal(tensor_parallel.parallel_linear_func(x, layer.weight, None, one), layer(x))
    for kind in (tensor_parallel.VocabParallelEmbedding, tensor_parallel.ColumnParallelEmbedding):
        assert kind(5, 3, process_group=one, padding_idx=0)(torch.tensor([0, 1])).shape == (2, 3)
        with pytest.raises(ValueError, match="got 2"):
            kind(5, 3, process_group=two)
    for collective in (distributed_utils.all_reduce, distributed_utils.reduce_scatter, distributed_utils.all_gather):
        assert collective(x, one) is x
        with pytest.raises(ValueError, match="fully_shard"):
            collective(x, two)
    for over_all in (distributed_utils.sync_shared_params, distributed_utils.allreduce_sequence_parallel_grad):
        over_all(layer, one)
        with pytest.raises(ValueError, match="got 2"):
            over_all(layer, two)
    assert [distributed_utils.get_dim_for_local_rank(10, 3, rank, 2) for rank in range(3)] == [4, 4, 2]
    with pytest.raises(ValueError, match="local_rank must be from 0"):
        distributed_utils.get_dim_for_local_rank(10, 3, 3)


def test_deterministic_mode(monkeypatch):
    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    assert determinism.use_deterministic_mode() is torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")
    assert determinism.use_deterministic_mode() is True
    determinism.set_deterministic_mode(False)
    assert determinism.use_deterministic_mode() is False
    determinism.set_deterministic_mode(None)
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "0")
    assert determinism.use_deterministic_mode() is False


def test_decorators_of_autograd_functions():
    class Square(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @custom_bwd
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

    x = torch.tensor(3.0, requires_grad=True)
    Square.apply(x).backward()
    assert x.grad == 6


def test_filters_of_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])

    def kept(change, *args):
        changed = logits.clone()
        assert change(changed, *args) is None
        return torch.isfinite(changed[0]).tolist()

    assert kept(generation.modify_logits_for_top_k_filtering, 2) == [False, True, True, False]
    # probabilities 0.09, 0.66, 0.24, 0.01
    assert kept(generation.modify_logits_for_top_p_filtering, 0.8) == [False, True, True, False]
    assert kept(generation.modify_logits_for_top_p_filtering, 0.5) == [False, True, False, False]
    assert kept(generation.modify_logits_for_min_p_filtering, 0.5) == [True, True, True, False]
    for value in (0.0, 1.0):
        assert kept(generation.modify_logits_for_top_p_filtering, value) == [True] * 4
        assert kept(generation.modify_logits_for_min_p_filtering, value) == [True] * 4
    out = generation.modify_logit_for_repetition_penalty(logits.clone(), torch.tensor([[1, 3, 1]]), 2.0)
    assert out.tolist() == [[1.0, 1.5, 2.0, -2.0]]


PUBLISHED = """
import math
import torch
import torch.nn as nn
from einops import rearrange

try:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
except ImportError:
    causal_conv1d_fn, causal_conv1d_update = None, None
try:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
except ImportError:
    selective_state_update = None
try:
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
except ImportError:
    RMSNorm, layer_norm_fn, rms_norm_fn = None, None, None
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from mamba_ssm.distributed.distributed_utils import all_reduce, reduce_scatter


class Bidirectional(Mamba):
    def __init__(self, d_model, **kwargs):
        super().__init__(d_model, **kwargs)
        A = torch.arange(1, self.d_state + 1, dtype=torch.float32).repeat(self.d_inner, 1)
        self.A_b_log = nn.Parameter(torch.log(A))

    def forward(self, hidden_states, inference_params=None):
        batch, seqlen, dim = hidden_states.shape
        xz = rearrange(self.in_proj.weight @ rearrange(hidden_states, "b l d -> d (b l)"), "d (b l) -> b d l", l=seqlen)

        def one_way(xz, A_log):
            return mamba_inner_fn(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, -torch.exp(A_log.float()), None, None, self.D.float(),
                delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            )

        return one_way(xz, self.A_log) + one_way(xz.flip([-1]), self.A_b_log).flip([1])


class VisionBlock(nn.Module):
    def __init__(self, dim, mixer):
        super().__init__()
        self.mixer, self.norm = mixer, RMSNorm(dim, eps=1e-5)

    def forward(self, hidden_states, residual=None):
        fused = rms_norm_fn if isinstance(self.norm, RMSNorm) else layer_norm_fn
        hidden_states, residual = fused(
            hidden_states, self.norm.weight, self.norm.bias, residual=residual, prenorm=True, residual_in_fp32=True,
            eps=self.norm.eps,
        )
        return self.mixer(hidden_states), residual


assert None not in (causal_conv1d_fn, causal_conv1d_update, selective_state_update, RMSNorm)
torch.manual_seed(0)
blocks = [VisionBlock(16, Bidirectional(16, d_state=4)), VisionBlock(16, Mamba2(16, d_state=8, headdim=8))]
x = torch.randn(2, 9, 16)
hidden, residual = x, None
for block in blocks:
    hidden, residual = block(hidden, residual)
hidden.square().mean().backward()
assert all(p.grad is not None and torch.isfinite(p.grad).all() for block in blocks for p in block.parameters())
"""


@pytest.mark.skipif(not ABSENT, reason="needs a machine without mamba_ssm and causal_conv1d")
def test_published_code_runs_unchanged():
    """Imports and calls as published models write them, and the numbers of both directions written out."""
    names = {"__name__": "published"}
    with install():
        exec(compile(PUBLISHED, "published.py", "exec"), names)
    mixer = names["blocks"][0].mixer
    plain = ssmkit.nn.Mamba(16, d_state=4)
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if key != "A_b_log"})
    back = ssmkit.nn.Mamba(16, d_state=4)
    back.load_state_dict(plain.state_dict() | {"A_log": mixer.A_b_log})
    x = names["x"]
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), plain(x) + back(x.flip(1)).flip(1))


@pytest.mark.skipif(not ABSENT, reason="needs a machine without mamba_ssm and causal_conv1d")
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("mamba_ssm.ops.selective_scan_interface", "SelectiveScanFn"),
        ("mamba_ssm.utils.generation", "capture_graph"),
        ("mamba_ssm.ops.triton.softplus", "softplus"),
    ],
)
def test_what_is_not_offered_fails_at_the_import(path, name):
    with install(), pytest.raises(ImportError, match=path.replace(".", r"\.")):
        exec(f"from {path} import {name}", {})
