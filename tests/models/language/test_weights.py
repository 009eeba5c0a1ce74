"""Weights: both layouts there and back, transformers' own classes, files in parts, and what is refused."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmkit.models.language import LanguageModel, LanguageModelConfig, language_model_config, load, save
from ssmkit.testing import assert_close

SIZES = {"d_model": 16, "n_layer": 2, "vocab_size": 37}
CONFIGS = {
    "mamba1": {"d_state": 5, "d_conv": 3, "dt_rank": 3, "bias": True},
    "mamba1, untied": {"tie_embeddings": False, "pad_vocab_size_multiple": 1, "conv_bias": False, "norm_eps": 1e-6},
    "mamba2": {"layer": "mamba2", "headdim": 8, "d_state": 8, "ngroups": 2, "dt_limit": (0.01, 0.5)},
    "mamba2, untied": {"layer": "mamba2", "headdim": 16, "d_state": 8, "tie_embeddings": False, "norm_eps": 1e-4},
}
OWN = {
    "hybrid": {
        **{"layer": "mamba2", "headdim": 8, "d_ssm": 24, "D_has_hdim": True, "d_intermediate": 20, "rms_norm": False},
        **{"attn_layer_idx": (1,), "num_heads": 4, "head_dim": 6, "rotary_emb_dim": 4, "attn_d_conv": 4},
    },
    "mamba3": {"layer": "mamba3", "headdim": 8, "d_state": 8, "count_mlp_in_init": True},
}


def make(options, seed=0):
    torch.manual_seed(seed)
    return LanguageModel(LanguageModelConfig(**{**SIZES, **options})).eval()


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def ids():
    return torch.randint(SIZES["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [*CONFIGS.values(), *OWN.values()], ids=[*CONFIGS, *OWN])
def test_there_and_back(options, tmp_path):
    model = make(options)
    save(model, tmp_path / "a" / "b")
    loaded = load(tmp_path / "a" / "b")
    assert loaded.config == model.config
    assert equal(loaded, model)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == model.config.tie_embeddings
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    # what optimisers and further initialisation go by
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    assert {name: vars(parameter) for name, parameter in loaded.named_parameters()} == marks
    assert any(marks.values())
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids()), model(ids()))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_transformers_reads_ours_and_we_read_theirs(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make(options)
    save(model, tmp_path / "ours", layout="transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert type(theirs).__name__ == {"mamba1": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[model.config.layer]
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")
    padded = replace(model.config, vocab_size=model.config.padded_vocab_size, pad_vocab_size_multiple=1)
    same = {"dt_rank": loaded.config.dt_rank, "d_state": model.config.state_size}
    assert loaded.config == replace(padded, **same)
    assert equal(loaded, model)
    with torch.no_grad():
        assert_close("logits", theirs(ids()).logits, model.double()(ids()))


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM"])
def test_their_own_random_model(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
    heads = {"num_heads": 4, "head_dim": 8, "n_groups": 2} if name.startswith("Mamba2") else {}
    torch.manual_seed(0)
    theirs = kind(kind.config_class(**sizes, **heads)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1, "in parts, with an index"
    ours = load(tmp_path).double()
    tokens = ids() % 30
    with torch.no_grad():
        assert_close("logits", theirs(tokens).logits, ours(tokens))


def official_folder(folder, options=CONFIGS["mamba1"], **config):
    """As state-spaces publishes them: the head stands beside the embedding it is tied to."""
    model = make(options)
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(model.config.to_official() | config))
    return model


def test_official_files(tmp_path):
    model = official_folder(tmp_path)
    assert equal(load(tmp_path), model)
    assert equal(load(tmp_path / "pytorch_model.bin"), model)
    low = load(tmp_path, dtype=torch.bfloat16, backend="reference")
    assert low.config.backend == "reference"
    assert {name.rsplit(".", 1)[1] for name, p in low.named_parameters() if p.dtype == torch.float32} == {"A_log", "D"}
    assert torch.equal(low.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_loaded_model_is_trained_and_saved_in_its_place(tmp_path):
    save(make(CONFIGS["mamba1"]), tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not equal(load(tmp_path), model)
    save(model, tmp_path)
    assert equal(load(tmp_path), model)


def test_a_loaded_model_owns_its_weights(tmp_path):
    model = official_folder(tmp_path)
    loaded = load(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(bytes(size))
    assert equal(loaded, model)
    torch.save(loaded.state_dict(), file)
    assert equal(load(tmp_path), model)


def test_official_config():
    """A config.json as published with mamba2attn-2.7b."""
    values = {
        "d_model": 2560,
        "d_intermediate": 0,
        "n_layer": 64,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [9, 18, 27, 36, 45, 56],
        "attn_cfg": {
            "causal": True,
            "d_conv": 4,
            "head_dim": 128,
            "num_heads": 30,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 64,
        },
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    config = LanguageModelConfig.from_official(values)
    assert config == language_model_config("mamba2attn-2.7b")
    assert config.to_official() == values


def test_codestral_files(tmp_path):
    model = make({"layer": "mamba2", "headdim": 64, "d_model": 128, "ngroups": 2, "tie_embeddings": False})
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    values = {"dim": 128, "n_layers": 2, "vocab_size": 37, "n_groups": 2, "tie_embeddings": False, "rms_norm": True}
    values |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "model_type": "mamba"}
    (tmp_path / "params.json").write_text(json.dumps(values))
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert equal(loaded, model)


def test_a_file_alone(tmp_path):
    model = make(CONFIGS["mamba2"])
    save(model, tmp_path / "some.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"no config.json or params.json in .*; hand the config to load"):
        load(tmp_path / "some.safetensors")
    assert equal(load(tmp_path / "some.safetensors", config=model.config), model)
    assert load_file(tmp_path / "some.safetensors").keys() == model.state_dict().keys() - {"lm_head.weight"}


def spoilt(change):
    def spoil(folder):
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")

    return spoil


def edited(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


CONV = "backbone.layers.1.mixer.conv1d.weight"
SPOILT = {
    "missing": (spoilt(lambda t: t.pop(CONV)), rf"the weights do not fit the model: missing {CONV}"),
    "unknown": (
        spoilt(lambda t: t.update({"backbone.layers.0.mixer.gate": torch.ones(1)})),
        "unknown backbone.layers.0.mixer.gate",
    ),
    "shape": (
        spoilt(lambda t: t.update({CONV: torch.ones(32, 1, 4)})),
        rf"{CONV} must have shape \(32, 1, 3\), got \(32, 1, 4\)",
    ),
    "not tied": (spoilt(lambda t: t.update({"lm_head.weight": torch.ones(40, 16)})), "lm_head.weight differs from"),
    "twice": (
        spoilt(lambda t: t.update({"backbone.embeddings.weight": t["backbone.embedding.weight"]})),
        "two tensors are backbone.embedding.weight, one of them called backbone.embeddings.weight",
    ),
    "unknown entry": (edited(rope=True), "config.json: config: unknown entry 'rope', known: d_model"),
    "unknown option": (edited(ssm_cfg={"heads": 2}), "config.json: ssm_cfg: unknown entry 'heads'"),
    "unknown layer": (edited(ssm_cfg={"layer": "S4"}), "ssm_cfg: layer must be Mamba1, Mamba2 or Mamba3, got 's4'"),
    "acausal": (edited(attn_layer_idx=[1], attn_cfg={"num_heads": 2}), "attn_cfg: causal must be true"),
    "another model": (
        edited(model_type="jamba", hidden_size=16),
        "model_type must be one of mamba, mamba2, got 'jamba'",
    ),
    "another activation": (
        edited(model_type="mamba", hidden_size=16, hidden_act="gelu"),
        "hidden_act must be 'silu', got 'gelu'",
    ),
    "another width": (
        edited(model_type="mamba", hidden_size=16, intermediate_size=48),
        r"intermediate_size must be expand \* hidden_size = 32, got 48",
    ),
    "other heads": (
        edited(model_type="mamba2", hidden_size=16, num_heads=3, head_dim=8),
        r"num_heads \* head_dim must be expand \* hidden_size = 32, got num_heads 3",
    ),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: Expecting"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_strictness(spoil, message, tmp_path):
    official_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_many_names_are_cut_short(tmp_path):
    official_folder(tmp_path, n_layer=4)
    with pytest.raises(ValueError, match=r"missing backbone.layers.2.mixer.A_log, .* and 16 more"):
        load(tmp_path)


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json or params.json in"):
        load(tmp_path)
    official_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*; looked for model.safetensors, "):
        load(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match=r"index.json lists model-1.safetensors, model-2.safetensors, not there"
    ):
        load(tmp_path)
    for part in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / part)
    with pytest.raises(ValueError, match=r"model-2.safetensors: a also in another file"):
        load(tmp_path)


def test_what_transformers_cannot_hold(tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot hold d_intermediate=20, attn_layer_idx=\(1,\), rms_norm=False, d_ssm=24"
    ):
        save(make(OWN["hybrid"]), tmp_path, layout="transformers")
    with pytest.raises(ValueError, match="cannot hold layer='mamba3'; save in layout 'state-spaces'"):
        save(make(OWN["mamba3"]), tmp_path, layout="transformers")
    with pytest.raises(ValueError, match="layout must be 'state-spaces' or 'transformers', got 'gguf'"):
        save(make(CONFIGS["mamba1"]), tmp_path, layout="gguf")
    assert not [*tmp_path.iterdir()]


def test_without_safetensors(tmp_path, monkeypatch):
    model = official_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert equal(load(tmp_path), model)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'ssmkit\[language\]'"):
        save(model, tmp_path / "new")
