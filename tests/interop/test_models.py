"""MambaLMHeadModel, its blocks and its generation under their official names, against the official numbers."""

from functools import partial

import pytest
import torch
from golden_cases import load
from torch import nn

from ssmkit.interop.mamba_ssm.models.config_mamba import MambaConfig
from ssmkit.interop.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, create_block
from ssmkit.interop.mamba_ssm.modules.block import Block
from ssmkit.interop.mamba_ssm.modules.mlp import GatedMLP
from ssmkit.interop.mamba_ssm.ops.triton.layer_norm import RMSNorm
from ssmkit.interop.mamba_ssm.utils.generation import InferenceParams, sample
from ssmkit.interop.mamba_ssm.utils.hf import load_state_dict_hf
from ssmkit.models.language import load as load_language_model
from ssmkit.models.language import save as save_language_model
from ssmkit.nn import MHA, Mamba, Mamba2

CASES = ["lm_mamba1", "lm_mamba2", "lm_mamba2_mlp_untied_layernorm"]
TINY = {"d_model": 16, "n_layer": 2, "vocab_size": 21, "ssm_cfg": {"d_state": 4}}


def golden_model(case):
    model = MambaLMHeadModel(MambaConfig(**case.meta["config"]))
    model.load_state_dict(case.params)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_official_logits_and_tokens(name):
    case = load(name)
    model, prompt, bound = (
        golden_model(case),
        case.inputs["input_ids"],
        case.meta["expected_fp32_tol"]["logits_rel_to_max"],
    )

    def close(actual, expected):
        assert (actual - expected).abs().max() <= bound * expected.abs().max()

    logits = model(prompt).logits
    close(logits, case.outputs["logits"])
    assert torch.equal(model(prompt, num_last_tokens=3).logits, logits[:, -3:])
    length = case.outputs["generated"].shape[1]
    output = model.generate(prompt, length, return_dict_in_generate=True, output_scores=True, cg=True)
    assert torch.equal(output.sequences, case.outputs["generated"])
    close(torch.stack(output.scores, dim=1), case.outputs["step_logits"])
    taught = model.generate(prompt, length, teacher_outputs=case.outputs["generated"].flip(0))
    assert torch.equal(taught[:, prompt.shape[1] :], case.outputs["generated"].flip(0)[:, prompt.shape[1] :])


def test_generation_stops_streams_and_samples():
    case = load("lm_mamba2")
    model, prompt, tokens = golden_model(case), case.inputs["input_ids"][:1], case.outputs["generated"][:1]

    class Streamer(list):
        put = list.append

        def end(self):
            self.append("end")

    streamer, after = Streamer(), prompt.shape[1]
    out = model.generate(prompt, 40, eos_token_id=int(tokens[0, after + 2]), streamer=streamer)
    first = int((tokens[0, after:] == tokens[0, after + 2]).nonzero()[0])
    assert out.shape[1] == after + first + 1 and torch.equal(torch.cat(streamer[:-1], dim=1), out)
    assert streamer[-1] == "end"
    assert torch.equal(model.generate(prompt, after + 1, vocab_size=1)[:, after:], torch.zeros(1, 1, dtype=torch.long))
    torch.manual_seed(0)
    drawn = model.generate(prompt, 30, top_k=5, top_p=0.9, temperature=1.3, repetition_penalty=1.2)
    assert drawn.shape == (1, 30) and int(drawn.max()) < 64
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert int(sample(logits)) == 1
    assert all(int(sample(logits, top_k=0, min_p=0.5)) == 1 for _ in range(5))


def test_states_by_layer_and_reset():
    """The dictionary of allocate_inference_cache serves as key_value_memory_dict; at offset 0 it starts again."""
    model, ids = MambaLMHeadModel(MambaConfig(**TINY)).eval(), torch.randint(21, (2, 6))
    params = InferenceParams(8, 2, key_value_memory_dict=model.allocate_inference_cache(2, 8))
    with torch.no_grad():
        expected = model(ids).logits
        for _ in range(2):
            out = [model(ids[:, :4], inference_params=params).logits]
            for token in (4, 5):
                params.seqlen_offset = token
                out.append(model(ids[:, token : token + 1], inference_params=params).logits)
            torch.testing.assert_close(torch.cat(out, dim=1), expected)
            params.reset(8, 2)
        assert torch.equal(model.backbone(ids), model.backbone(ids, None))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "bf16"])
def test_weights_from_local_folders(tmp_path, dtype):
    """pytorch_model.bin as the official class writes it, and ssmkit's own safetensors."""
    model = MambaLMHeadModel(MambaConfig(**TINY))
    model.save_pretrained(tmp_path / "official")
    again = MambaLMHeadModel.from_pretrained(tmp_path / "official", dtype=dtype)
    assert again.config == model.config and again.lm_head.weight is again.backbone.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(again.state_dict()[name].dtype)), name
    ours = load_language_model(tmp_path / "official")
    save_language_model(ours, tmp_path / "ours")
    assert load_state_dict_hf(tmp_path / "ours").keys() <= model.state_dict().keys()
    ids = torch.randint(21, (1, 5))
    if dtype is None:
        third = MambaLMHeadModel.from_pretrained(tmp_path / "ours")
        assert torch.equal(third(ids).logits, model(ids).logits) and torch.equal(ours(ids), model(ids).logits)
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")


@pytest.mark.parametrize("fused_add_norm", [True, False])
@pytest.mark.parametrize("kind", [RMSNorm, nn.LayerNorm], ids=["rms", "layer"])
def test_block(kind, fused_add_norm):
    """Add, norm, mixer, add, norm, MLP, written out; the residual stream is in fp32 where asked."""
    torch.manual_seed(0)
    block = Block(16, Mamba, partial(GatedMLP, hidden_features=20, activation=torch.tanh), kind, fused_add_norm, True)
    hidden, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    out, stream = block(hidden, residual)
    after = hidden + residual
    total = after + block.mixer(block.norm(after))
    torch.testing.assert_close(stream, total)
    y, gate = block.mlp.fc1(block.norm2(total)).chunk(2, dim=-1)
    torch.testing.assert_close(out, block.mlp.fc2(y * gate.tanh()))
    _, first = block.bfloat16()(hidden.bfloat16())
    assert first.dtype == torch.float32
    with pytest.raises(ValueError, match="LayerNorm or RMSNorm"):
        Block(16, Mamba, nn.Identity, nn.Identity, fused_add_norm=True)


def test_kinds_of_blocks():
    """create_block follows ssm_cfg and attn_layer_idx; a model of such blocks has the official parameter names."""
    make = partial(
        create_block, 16, ssm_cfg={"layer": "Mamba2", "headdim": 8}, attn_cfg={"num_heads": 2, "causal": True}
    )
    layers = [make(attn_layer_idx=[1], layer_idx=index, rms_norm=True) for index in range(2)]
    assert isinstance(layers[0].mixer, Mamba2) and isinstance(layers[1].mixer, MHA) and layers[0].mlp is None
    assert isinstance(create_block(16, d_intermediate=8).mixer, Mamba)
    assert layers[1].allocate_inference_cache(2, 7)[0].shape[0] == 2
    with pytest.raises(ValueError, match="must be Mamba1, Mamba2 or Mamba3, got 'Mamba9'"):
        create_block(16, ssm_cfg={"layer": "Mamba9"})
    config = MambaConfig(**{**TINY, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 4}, "attn_layer_idx": [1]})
    config.attn_cfg = {"num_heads": 2, "causal": True, "rotary_emb_dim": 4}
    model = MambaLMHeadModel(config)
    names = {f"layers.0.{name}" for name, _ in layers[0].named_parameters()}
    names |= {f"layers.1.{name}" for name, _ in layers[1].named_parameters()}
    assert {name for name, _ in model.backbone.named_parameters()} == names | {"embedding.weight", "norm_f.weight"}
    with pytest.raises(ValueError, match="initializer_cfg must be None"):
        MambaLMHeadModel(config, {"initializer_range": 1.0})
    with pytest.raises(ValueError, match="unknown entry 'nonsense'"):
        MambaLMHeadModel(MambaConfig(ssm_cfg={"nonsense": 1}))


def test_the_mixers_norm_keeps_its_own_epsilon():
    model = MixerModel(16, 1, 0, 32, {"layer": "Mamba2", "headdim": 8, "d_state": 4}, norm_epsilon=1e-3, rms_norm=True)
    assert model.layers[0].norm.eps == model.norm_f.eps == 1e-3
    assert model.layers[0].mixer.norm.eps == 1e-5


def test_attention_must_be_told_to_be_causal():
    """Left out, it would mean False to the official layer, which is another model."""
    from ssmkit.interop.mamba_ssm.modules.mha import MHA as Official

    with pytest.raises(ValueError, match="give causal=True"):
        Official(16, 2)
    with pytest.raises(ValueError, match="causal must be True, got False"):
        Official(16, 2, causal=False)
    assert isinstance(Official(16, 2, causal=True), MHA)
