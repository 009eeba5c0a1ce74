"""What language models obey: steps, pads, resets, packing, hybrids, start values, compilation."""

from itertools import pairwise

import pytest
import torch

from ssmkit.models.language import VARIANTS, LanguageModel, LanguageModelConfig, language_model, language_model_config
from ssmkit.nn import MHA, Mamba

SIZES = {"d_model": 16, "n_layer": 3, "vocab_size": 40}
HEADS = {"headdim": 8, "d_state": 8}
ATTENTION = {"attn_layer_idx": (1,), "num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "rotary_emb_dim": 4}
CONFIGS = {
    "mamba1": {"layer": "mamba1", "d_state": 4},
    "mamba1, hybrid": {"layer": "mamba1", "d_state": 4, **ATTENTION, "attn_d_conv": 4},
    "mamba2": {"layer": "mamba2", **HEADS, "ngroups": 2},
    "mamba2, hybrid, MLP": {
        **{"layer": "mamba2", "d_intermediate": 20, "tie_embeddings": False, "rms_norm": False},
        **{**HEADS, **ATTENTION, "attn_mlp_dim": 100, "attn_layer_idx": (0, 2)},
    },
    "mamba3": {"layer": "mamba3", **HEADS},
}
PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def make(options, dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    return LanguageModel(LanguageModelConfig(**{**SIZES, **options, **more})).to(dtype).eval()


def prompts(batch=2, seqlen=11, seed=1):
    return torch.randint(SIZES["vocab_size"], (batch, seqlen), generator=torch.Generator().manual_seed(seed))


@every_config
def test_steps_and_pieces_equal_one_pass(options):
    model, ids = make(options), prompts()
    with torch.no_grad():
        expected = model(ids)
        state = model.allocate_inference_cache(2, 11)
        logits = [model(ids[:, :4], state=state), model(ids[:, 4:8], state=state)]
        logits += [model.step(ids[:, t], state)[:, None] for t in range(8, 11)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected)
    torch.testing.assert_close(model(ids, num_last_tokens=3), expected[:, -3:])


@every_config
def test_packed_equals_separate(options):
    model, ids = make(options), prompts(batch=1)
    offsets = [0, 4, 5, 11]
    pieces = [ids[:, begin:end] for begin, end in pairwise(offsets)]
    cu_seqlens = torch.tensor(offsets)
    with torch.no_grad():
        expected = torch.cat([model(piece) for piece in pieces], dim=1)
        torch.testing.assert_close(model(ids, cu_seqlens=cu_seqlens), expected)
        resets = torch.zeros_like(ids, dtype=torch.bool)
        resets[0, offsets[:-1]] = True
        torch.testing.assert_close(model(ids, resets=resets), expected)
        state = model.allocate_inference_cache(3, 7)
        model(ids, cu_seqlens=cu_seqlens, state=state)
        following = prompts(batch=3, seqlen=1, seed=2)
        logits = model.step(following, state)
        for row, piece in enumerate(pieces):
            alone = model(torch.cat([piece, following[row : row + 1]], dim=1), num_last_tokens=1)[:, 0]
            torch.testing.assert_close(logits[row : row + 1], alone)


@every_config
def test_pads_are_removable(options):
    model, ids = make(options), prompts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = mask[1, 5] = mask[1, -2:] = False
    with torch.no_grad():
        logits = model(ids, mask=mask)
        for row in range(2):
            alone = model(ids[row : row + 1, mask[row]])
            torch.testing.assert_close(logits[row : row + 1, mask[row]], alone)


@every_config
def test_start_values(options):
    options = {**options, "n_layer": 4, "d_model": 64, "vocab_size": 500}
    for more, adds in ({}, 4), ({"count_mlp_in_init": True}, 8 if options.get("d_intermediate") else 4):
        model = make(options, torch.float32, **more)
        assert abs(model.backbone.embedding.weight.std() - 0.02) < 0.001
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                bound = parameter.shape[1] ** -0.5 / adds**0.5
                assert 0.95 * bound < parameter.abs().max() <= bound * 1.00001
            elif name.endswith("bias") and not any(part in name for part in ("dt_", "conv1d", "B_bias", "C_bias")):
                assert (parameter == 0).all()
        assert (model.lm_head.weight is model.backbone.embedding.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    model = language_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_hybrid_of_the_published_shape():
    """No count is published; six of the 64 Mamba-2 mixers give way to attention of 30 heads of 128."""
    model = language_model("mamba2attn-2.7b", device="meta")
    attention = [index for index, block in enumerate(model.backbone.layers) if isinstance(block.mixer, MHA)]
    assert attention == [9, 18, 27, 36, 45, 56]
    width, qkv = 2560, 3 * 30 * 128
    mixer = width * (2 * 5120 + 2 * 128 + 80) + 5 * (5120 + 256) + 3 * 80 + 5120 + 5120 * width
    mha = width * qkv + 5 * qkv + 30 * 128 * width
    expected = PUBLISHED["mamba2-2.7b"] + 6 * (mha - mixer)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("byte-")])
def test_byte_variants_run_at_other_sizes(name):
    model = language_model(name, d_model=32, n_layer=4)
    assert model.config.padded_vocab_size == 256
    assert model(torch.randint(256, (1, 5))).shape == (1, 5, 256)


COMPILED = {
    name: CONFIGS[name] | {"n_layer": 2, "attn_layer_idx": (1,)} for name in ("mamba1, hybrid", "mamba2, hybrid, MLP")
}
compiled_config = pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)


@compiled_config
def test_compile_fullgraph(options):
    model, ids = make(options, torch.float32), prompts()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids).square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_compile_with_inductor():
    """A Mamba, an attention and a Mamba-2 layer as one graph, compiled to machine code: logits and gradients."""
    options = {"layer": "mamba2", **HEADS, "attn_layer_idx": (1,), "num_heads": 2, "rotary_emb_dim": 4}
    model, ids = make(options, torch.float32), prompts()
    model.backbone.layers[0].mixer = Mamba(SIZES["d_model"], d_state=4)
    compiled = torch.compile(model, fullgraph=True)
    actual, expected = (
        [y, *torch.autograd.grad(y.square().mean(), [*model.parameters()])] for y in (compiled(ids), model(ids))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_compile_with_states():
    model, ids = make(COMPILED["mamba2, hybrid, MLP"], torch.float32), prompts()
    compiled, step = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (model, model.step))
    state, same = (model.allocate_inference_cache(2, 12) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, state=state), model(ids, state=same))
        torch.testing.assert_close(step(ids[:, 0], state), model.step(ids[:, 0], same))


@compiled_config
def test_compile_then_export(options):
    model, ids = make(options, torch.float32), prompts()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {1: length}})
    longer = prompts(seqlen=20)
    torch.testing.assert_close(program.module()(longer), model(longer))


def test_bf16_model_keeps_rates_in_fp32():
    model = LanguageModel(LanguageModelConfig(**SIZES, **CONFIGS["mamba1"]), dtype=torch.bfloat16)
    kept = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D"}
    assert model(prompts()).dtype == torch.bfloat16
    assert model.generate(prompts(), 2).shape == (2, 13)


@every_config
def test_autocast(options):
    """Products in bf16, states and residual stream in fp32."""
    model, ids = make(options, torch.float32), prompts()
    expected = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
        state = model.allocate_inference_cache(2, 12)
        pieces = torch.cat([model(ids[:, :6], state=state), model(ids[:, 6:], state=state)], dim=1)
        assert model.step(ids[:, 0], state).dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    # Three blocks in a row round their inputs, weights and outputs.
    for actual in (logits, pieces):
        assert (actual - expected).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


ERRORS = {
    "layer": ({"layer": "mamba4"}, "layer must be one of mamba1, mamba2, mamba3, got 'mamba4'"),
    "size": ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
    "option of another layer": ({"headdim": 8, "ngroups": 2}, "mamba1 layers have no headdim, ngroups"),
    "attention index": ({**ATTENTION, "attn_layer_idx": (3,)}, r"attn_layer_idx must be different numbers in 0..2"),
    "one attention index": ({"attn_layer_idx": 1}, "attn_layer_idx must be a tuple or a list of numbers, got 1"),
    "attention heads": ({"attn_layer_idx": (1,)}, "num_heads must be given"),
    "MLP": ({"d_intermediate": -1}, "d_intermediate must be at least 0, got -1"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**{**SIZES, **options})


def test_calls_that_do_not_fit():
    model = make(CONFIGS["mamba1"])
    with pytest.raises(
        ValueError, match=r"input_ids must be int64 or int32 of shape \(batch, seqlen\), got torch.float64"
    ):
        model(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="state must hold 3 layers, got 0"):
        model(prompts(), state=[])
    with pytest.raises(ValueError, match="num_last_tokens must be at least 0, got -1; 0 is all"):
        model(prompts(), num_last_tokens=-1)
    with pytest.raises(ValueError, match=r"token_ids must have shape \(batch,\) or \(batch, 1\), got \(2, 3\)"):
        model.step(torch.zeros(2, 3, dtype=torch.int64), model.allocate_inference_cache(6))
    with pytest.raises(ValueError, match="unknown variant 'mamba-1b', known: mamba-130m"):
        language_model("mamba-1b")
    with pytest.raises(ValueError, match="language models have no option width; they have"):
        language_model_config("mamba-130m", width=3)
