"""transformers' models on ssmkit's kernels: the numbers of their torch path, prefill, cached decoding and training."""

import warnings

import pytest
import torch

from ssmkit.interop import transformers as ours

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 4}
# Model class and the options of a tiny one.
TINY = {
    "mamba": ("Mamba", {"state_size": 4}),
    "mamba2": ("Mamba2", {"state_size": 6, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}),
    "falcon_mamba": ("FalconMamba", {"state_size": 4}),
    "jamba": (
        "Jamba",
        {
            **ATTENTION,
            **EXPERTS,
            "mamba_d_state": 4,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "mamba_dt_rank": 3,
        },
    ),
    "bamba": ("Bamba", {**ATTENTION, **HEADS, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        {
            **ATTENTION,
            "mamba_d_state": 6,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
        },
    ),
    "zamba": (
        "Zamba",
        {
            **ATTENTION,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "hybrid"] * 2,
            "mamba_d_state": 4,
            "n_mamba_heads": 2,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **ATTENTION,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 6,
            "chunk_size": 4,
            "head_dim": 8,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **ATTENTION,
            **HEADS,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 8,
            "num_local_experts": 0,
        },
    ),
    "falcon_h1": ("FalconH1", {**ATTENTION, **HEADS, "mamba_d_ssm": 32, "head_dim": 8}),
}


@pytest.fixture(autouse=True)
def their_own_kernels():
    yield
    ours.restore()


def tiny(name):
    """A model with weights of its own seed, and its tokens."""
    kind, options = TINY[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**COMMON | options)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model, torch.randint(3, 40, (2, 11))


def everything(model, tokens):
    """Logits, those of three tokens decoded from the cache, of rows padded on the left, and a gradient in training."""
    with torch.no_grad():
        out = {"logits": model(tokens).logits}
        cached = model(tokens[:, :8], use_cache=True)
        cache = cached.past_key_values if hasattr(cached, "past_key_values") else cached.cache_params
        key = "past_key_values" if hasattr(cached, "past_key_values") else "cache_params"
        for step in range(8, 11):
            out[f"step {step}"] = model(tokens[:, step : step + 1], use_cache=True, **{key: cache}).logits
        padding = torch.ones_like(tokens)
        padding[0, :3] = 0
        out["padded"] = model(tokens, attention_mask=padding).logits[:, 3:]
    model.train()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    parameters = [value for name, value in model.named_parameters() if "A_log" in name or "conv1d" in name]
    for number, gradient in enumerate(torch.autograd.grad(loss, parameters)):
        out[f"gradient {number}"] = gradient
    model.eval()
    return out


@pytest.mark.parametrize("name", TINY)
def test_their_own_numbers(name):
    model, tokens = tiny(name)
    expected = everything(model, tokens)
    with ours.use_kernels([name]) as served:
        assert served == (name,)
        actual = everything(model, tokens)
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, do_sample=False))
    for key, value in expected.items():
        # Both are fp32; their torch path sums step by step, through every layer.
        assert (actual[key] - value).abs().max() <= 2e-5 * value.abs().max(), key
    assert any(not torch.equal(actual[key], value) for key, value in expected.items())


def test_packed_sequences_of_mamba2_stay_apart():
    """seq_idx, which their torch path refuses, cuts convolution and scan of a mixer."""
    mixer, hidden = tiny("mamba2")[0].backbone.layers[0].mixer, torch.randn(2, 11, 16)
    seq_idx = torch.tensor([[0] * 4 + [1] * 7] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="packed sequences"):
        mixer(hidden, seq_idx=seq_idx)
    with torch.no_grad(), ours.use_kernels(["mamba2"]):
        apart = torch.cat([mixer(hidden[:, :4]), mixer(hidden[:, 4:])], dim=1)
        torch.testing.assert_close(mixer(hidden, seq_idx=seq_idx), apart)
        offsets = torch.tensor([0, 4, 11])
        for packing in (
            {"cu_seqlens": offsets},
            {"cu_seq_lens_q": offsets, "max_length_q": 7},
            {"position_ids": torch.tensor([[*range(4), *range(7)]])},
        ):
            with pytest.raises(ValueError, match="give seq_idx besides"):
                mixer(hidden, **packing)
            torch.testing.assert_close(mixer(hidden, seq_idx=seq_idx, **packing), apart)
    mixer = tiny("mamba")[0].backbone.layers[0].mixer
    with ours.use_kernels(["mamba"]), pytest.raises(ValueError, match="pad the sequences instead"):
        mixer(hidden, seq_idx=seq_idx)


def test_keywords_that_mean_something_are_refused():
    """What the kernels do not know is passed over only where it cannot change the numbers."""
    mixer, hidden = tiny("mamba2")[0].backbone.layers[0].mixer, torch.randn(2, 7, 16)
    padded = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 1, 1, 0, 1, 2, 3]])
    with torch.no_grad(), ours.use_kernels(["mamba2"]):
        plain = mixer(hidden)
        meaningless = {"output_attentions": True, "num_items_in_batch": torch.tensor(3), "cu_seqlens": None}
        for position_ids in (padded, torch.arange(3, 10)[None]):
            out = mixer(hidden, **meaningless, is_causal=True, position_ids=position_ids)
            assert torch.equal(out, plain)
        with pytest.raises(ValueError, match="causal_conv1d_fn got tree_parents, which it does not know"):
            mixer(hidden, tree_parents=torch.zeros(2, 7))
        with pytest.raises(ValueError, match="is_causal must be True"):
            mixer(hidden, is_causal=False)


def test_other_activations_run_their_own_convolution():
    torch.manual_seed(0)
    config = transformers.Mamba2Config(**COMMON | TINY["mamba2"][1], hidden_act="gelu")
    model, tokens = transformers.Mamba2ForCausalLM(config).eval(), torch.randint(3, 40, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits
        with ours.use_kernels(["mamba2"]):
            torch.testing.assert_close(model(tokens).logits, expected)
            with pytest.raises(
                ValueError, match="activation must be 'silu' or 'swish' for packed sequences, got 'gelu'"
            ):
                model.backbone(tokens, seq_idx=torch.zeros(2, 9, dtype=torch.int32))


def test_served_models_are_counted_once_and_given_back():
    modeling = ours._modeling("bamba")
    own = {name: getattr(modeling, name) for name in (*ours.FUNCTIONS, *ours.FUSED) if hasattr(modeling, name)}
    assert len(own) == 5
    with ours.use_kernels(["bamba"]), ours.use_kernels(["bamba", "mamba2"]) as served:
        assert served == ("bamba", "mamba2")
        assert all(getattr(modeling, name) is not function for name, function in own.items())
    assert all(getattr(modeling, name) is function for name, function in own.items())
    with pytest.raises(ValueError, match=r"models must be of mamba, .*; got 'gpt2'"):
        ours.use_kernels(["gpt2"])
    with pytest.raises(ValueError, match=r"models must be of mamba, .*; got 'gpt2'"):
        ours.restore(["gpt2"])


def test_an_unknown_way_of_calling_kernels_changes_no_model(monkeypatch):
    """The models before the one that fails get their own functions back; those served by an earlier call stay so."""
    own = ours._modeling("mamba2").causal_conv1d_fn
    monkeypatch.delattr(ours._modeling("bamba"), "causal_conv1d_fn")
    ours.use_kernels(["jamba"])
    with pytest.raises(ImportError, match=r"does not call causal_conv1d_fn in models\.bamba"):
        ours.use_kernels(["mamba2", "jamba", "bamba"])
    assert ours._modeling("mamba2").causal_conv1d_fn is own
    assert ours.use_kernels([]) == ("jamba",)
