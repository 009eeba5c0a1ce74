"""Generation: greedy equals repeated full passes, pads, ends, streams; what sampling keeps and how often it draws."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssmkit.models.language import LanguageModel, LanguageModelConfig, Sampling

VOCAB = 24
HYBRID = {"attn_layer_idx": (1,), "num_heads": 2, "head_dim": 6, "rotary_emb_dim": 4, "attn_d_conv": 3}
CONFIGS = {
    "mamba1": {"layer": "mamba1", "d_state": 4},
    "mamba2, hybrid": {"layer": "mamba2", "headdim": 8, "d_state": 8, **HYBRID},
    "mamba3": {"layer": "mamba3", "headdim": 8, "d_state": 8},
}
every_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def make(options, dtype=torch.float64):
    torch.manual_seed(0)
    config = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=VOCAB, tie_embeddings=False, **options)
    model = LanguageModel(config).to(dtype)
    # Far from uniform, so that choices differ from token to token.
    with torch.no_grad():
        model.backbone.embedding.weight.normal_()
        for block in model.backbone.layers:
            block.mixer.out_proj.weight.mul_(8)
    return model.eval()


def prompts(batch=3, seqlen=7, seed=1):
    return torch.randint(VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, new):
    """Without states: the whole sequence anew for every token."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@every_config
def test_greedy_equals_repeated_full_passes(options):
    model, ids = make(options), prompts()
    expected = greedy(model, ids, 9)
    assert len(set(expected[:, 7:].flatten().tolist())) > 4
    tokens, logits = model.generate(ids, 9, return_logits=True)
    assert torch.equal(tokens, expected)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(expected)[:, 6:-1])
    assert torch.equal(torch.stack([*model.stream(ids, 9)], dim=1), expected[:, 7:])


@every_config
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_prompts_equal_single_ones(options, side):
    model, ids = make(options), prompts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    if side in ("left", "both"):
        mask[0, :3] = False
    if side in ("right", "both"):
        mask[1, 5:] = mask[2, 6:] = False
    together = model.generate(ids, 6, mask=mask, repetition_penalty=1.3)[:, 7:]
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row]], 6, repetition_penalty=1.3)[:, -6:]
        assert torch.equal(together[row : row + 1], alone)


def test_rows_end():
    model, ids = make(CONFIGS["mamba1"]), prompts()
    free = model.generate(ids, 12)[:, 7:]
    eos = int(free[0, 3])
    ended = model.generate(ids, 12, eos_token_id=eos, pad_token_id=VOCAB - 1)[:, 7:]
    lengths = [next((t + 1 for t, token in enumerate(row) if token == eos), 12) for row in free.tolist()]
    assert min(lengths) <= 4 and ended.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(ended[row, :length], free[row, :length])
        assert (ended[row, length:] == VOCAB - 1).all()
    # several ends; by default ended rows go on with the first
    every = model.generate(ids, 12, eos_token_id=[eos, *free[:, 0].tolist()])[:, 7:]
    assert torch.equal(every, free[:, :1])


ENDS = {
    "numpy's": lambda eos: np.int64(eos),
    "an array": lambda eos: np.array([eos, eos]),
    "a list of numpy's": lambda eos: [np.int32(eos)],
    "a tensor of no axis": lambda eos: torch.tensor(eos),
    "a tensor of one": lambda eos: torch.tensor([eos]),
    "a list of tensors": lambda eos: [torch.tensor(eos)],
    "a tuple": lambda eos: (eos,),
}


@pytest.mark.parametrize("held", ENDS.values(), ids=ENDS)
def test_ends_are_held_in_any_way(held):
    model, ids = make(CONFIGS["mamba1"]), prompts()
    eos = int(model.generate(ids, 4)[0, 7 + 3])
    expected = model.generate(ids, 12, eos_token_id=eos)
    assert torch.equal(model.generate(ids, 12, eos_token_id=held(eos)), expected)
    assert torch.equal(model.generate(ids, 12, eos_token_id=eos, pad_token_id=np.int64(eos)), expected)


@pytest.mark.parametrize("temperature", [1e-300, 1e-42, 1e-38, 1e-30, 1e-6])
def test_cold_draws_take_the_most_probable(temperature):
    """Among equals any of them; nothing overflows."""
    rows = torch.tensor([[3e38, -3e38, 0.0], [1e-3, 2e-3, -torch.inf], [7.0, 7.0, 6.999]])
    for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        sampling = Sampling(temperature=temperature, **options)
        tokens = torch.stack([sampling.draw(rows) for _ in range(20)])
        assert (tokens[:, 0] == 0).all() and (tokens[:, 1] == 1).all()
        assert set(tokens[:, 2].tolist()) == {0, 1}


def test_seeds_decide():
    model, ids = make(CONFIGS["mamba2, hybrid"]), prompts()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, 10, temperature=1.5, generator=generator)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_no_new_tokens_and_empty_batches():
    model, ids = make(CONFIGS["mamba1"]), prompts()
    tokens, logits = model.generate(ids, 0, return_logits=True)
    assert torch.equal(tokens, ids) and logits.shape == (3, 0, VOCAB)
    assert model.generate(ids[:0], 4).shape == (0, 7)


def test_a_stream_leaves_gradients_on():
    model, ids = make(CONFIGS["mamba1"]), prompts()
    for _ in model.stream(ids, 2):
        assert torch.is_grad_enabled()


DRAWS = 20000
LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
KEPT = {  # options -> tokens that may be drawn
    "all": ({}, [0, 1, 2, 3, 4, 5]),
    "top_k": ({"top_k": 3}, [0, 1, 2]),
    "top_k of more than there are": ({"top_k": 9}, [0, 1, 2, 3, 4, 5]),
    "top_p": ({"top_p": 0.8}, [0, 1, 2]),  # 0.563 + 0.207 < 0.8 <= 0.563 + 0.207 + 0.126
    "top_p of next to nothing": ({"top_p": 1e-6}, [0]),
    "min_p": ({"min_p": 0.2}, [0, 1, 2]),  # at least 0.113; the next has 0.076
    "temperature before top_p": ({"temperature": 0.25, "top_p": 0.9}, [0]),
    "all of them": ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, [0, 1]),
}


@pytest.mark.parametrize(("options", "kept"), KEPT.values(), ids=KEPT)
def test_draws_follow_the_kept_distribution(options, kept):
    sampling = Sampling(**{"temperature": 1.0, **options})
    tokens = sampling.draw(LOGITS.expand(DRAWS, -1), generator=torch.Generator().manual_seed(0))
    share = torch.bincount(tokens, minlength=6) / DRAWS
    expected = torch.zeros(6)
    expected[kept] = (LOGITS[0, kept] / sampling.temperature).softmax(0)
    assert (share[expected == 0] == 0).all()
    # five standard deviations of a share
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt()).all()


def test_top_p_takes_rows_one_by_one():
    rows = torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 1.0]])
    kept = Sampling(temperature=1.0, top_p=0.7).keep(rows) > -torch.inf
    assert kept.sum(1).tolist() == [1, 3]
    assert kept[0, 1]


def test_repetition_penalty():
    seen = torch.tensor([[True, False, False, False, True, False]])
    sampling = Sampling(repetition_penalty=4.0)
    assert sampling.draw(LOGITS, seen).item() == 1
    # A negative logit falls further: -1 becomes -4, below -3.
    only = torch.where(torch.tensor([False, False, False, False, True, True]), LOGITS, -torch.inf)
    assert sampling.draw(only).item() == 4
    assert sampling.draw(only, seen).item() == 5
    zero = torch.tensor([[0.0, 2.0, -1.0]])
    for penalty, possible in ((1e300, {0, 1}), (1e-300, {1})):
        for temperature in (0.0, 1e-3):
            drawn = Sampling(repetition_penalty=penalty, temperature=temperature).draw(zero, torch.ones(1, 3).bool())
            assert drawn.item() in possible
    model, ids = make(CONFIGS["mamba1"]), prompts()
    tokens = model.generate(ids, 10, repetition_penalty=1e6)
    for row in tokens.tolist():
        assert len(set(row[7:]) - set(row[:7])) == 10


ERRORS = {
    "temperature": ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
    "top_k": ({"top_k": -1}, "top_k must be at least 0, got -1"),
    "top_p": ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    "min_p": ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, got 0.0"),
    "temperature without end": ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
    "penalty without end": (
        {"repetition_penalty": math.inf},
        "repetition_penalty must be positive and finite, got inf",
    ),
    "top_k of a yes": ({"top_k": True}, "top_k must be an integer, got True"),
    "temperature of no number": ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
    "top_k in parts": ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
    "top_k as a float": ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
    "top_p of more than all": ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    "top_p of no number": ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
    "tokens": ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    "tokens in parts": ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer, got 1.5"),
    "pad": ({"eos_token_id": 3, "pad_token_id": -7}, r"pad_token_id must be a token in 0\.\.23, got -7"),
    "two pads": ({"eos_token_id": 3, "pad_token_id": [1, 2]}, r"pad_token_id must be one token, got \[1, 2\]"),
    "end": ({"eos_token_id": [3, VOCAB]}, r"eos_token_id must be a token in 0\.\.23, got 24"),
    "end in parts": ({"eos_token_id": torch.tensor([1.5])}, "eos_token_id must be an integer, got 1.5"),
    "end in rows": ({"eos_token_id": [[1, 2]]}, r"eos_token_id must be an integer, got \[1, 2\]"),
    "end by name": ({"eos_token_id": "</s>"}, "eos_token_id must be an integer, got '</s>'"),
    "no prompt": ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids must have shape .* got \(2, 0\)"),
    "only pads": ({"mask": torch.zeros(3, 7, dtype=torch.bool)}, "mask must leave every row at least one real token"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(CONFIGS["mamba1"]).generate(**{"input_ids": prompts(), "max_new_tokens": 1, **options})


def test_attention_kernels_agree_on_padded_prompts():
    """The mathematical form and the fused one; every row of the mask has something to sum."""
    model, ids = make(CONFIGS["mamba2, hybrid"], torch.float32), prompts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:] = False
    results = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel), torch.no_grad():
            logits = model(ids, mask=mask)
        assert torch.isfinite(logits).all()
        results.append(logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
