"""Sizes and choices of a language model, and the config files of state-spaces and transformers that say the same."""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from ssmkit.nn import Mamba, Mamba2, Mamba3

Layer = Literal["mamba1", "mamba2", "mamba3"]
MIXERS: dict[str, type[Mamba] | type[Mamba2] | type[Mamba3]] = {"mamba1": Mamba, "mamba2": Mamba2, "mamba3": Mamba3}
# Fields of the config that a layer takes, under its own names; they are also those of the official `ssm_cfg`.
STEP_SIZES = ("dt_min", "dt_max", "dt_init_floor")
MIXER_FIELDS: dict[str, tuple[str, ...]] = {
    "mamba1": ("d_state", "d_conv", "expand", "dt_rank", "dt_init", "dt_scale", *STEP_SIZES, "bias", "conv_bias"),
    "mamba2": (
        *("d_state", "d_conv", "expand", "headdim", "ngroups", "conv_init", "d_ssm", "A_init_range", "D_has_hdim"),
        *("rmsnorm", "norm_before_gate", *STEP_SIZES, "dt_limit", "bias", "conv_bias", "chunk_size"),
    ),
    "mamba3": ("d_state", "expand", "headdim", "ngroups", "rope_fraction", *STEP_SIZES, "A_floor", "is_outproj_norm"),
}
DEFAULT_D_STATE = {"mamba1": 16, "mamba2": 128, "mamba3": 128}
# Field of the config -> name in the official `attn_cfg`.
ATTENTION_FIELDS = {
    "num_heads": "num_heads",
    "num_heads_kv": "num_heads_kv",
    "head_dim": "head_dim",
    "attn_mlp_dim": "mlp_dim",
    "attn_d_conv": "d_conv",
    "qkv_proj_bias": "qkv_proj_bias",
    "out_proj_bias": "out_proj_bias",
    "softmax_scale": "softmax_scale",
    "rotary_emb_dim": "rotary_emb_dim",
    "rotary_emb_base": "rotary_emb_base",
    "rotary_emb_interleaved": "rotary_emb_interleaved",
}
# Of an official config file: how its kernels run, not what they compute.
WITHOUT_EFFECT = {"fused_add_norm", "use_fast_path", "use_mem_eff_path"}
TRANSFORMERS_LAYERS = {"mamba": "mamba1", "mamba2": "mamba2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelConfig:
    """Sizes and choices of a language model.

    Args:
        d_model, n_layer, vocab_size: Width, number of blocks, tokens.
        layer: The mixer: "mamba1", "mamba2" or "mamba3".
        d_intermediate: Hidden width of a gated MLP after every mixer, rounded up to a multiple of 128; 0 for none.
        d_state ... chunk_size: Options of the mixer, as in `Mamba`, `Mamba2` and `Mamba3`; one that the layer does not
            have is refused. d_state is by default that of the layer.
        attn_layer_idx: Blocks whose mixer is attention.
        num_heads ... rotary_emb_interleaved: Options of `MHA`; attn_mlp_dim and attn_d_conv are its mlp_dim and d_conv.
        rms_norm, norm_eps: RMSNorm or LayerNorm, and the eps of every norm, those inside Mamba-2 layers included.
        residual_in_fp32: Keep the residual stream in fp32.
        tie_embeddings: The head is the embedding.
        pad_vocab_size_multiple: The embedding has vocab_size rows, rounded up to a multiple of it.
        count_mlp_in_init: Initial output projections are divided by sqrt(2 n_layer), not sqrt(n_layer), where blocks have
            an MLP. That was meant officially, but does not happen there: the pass is run again without the factor.
        backend: Handed to the ops.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    layer: Layer = "mamba1"
    d_intermediate: int = 0

    d_state: int | None = None
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    headdim: int = 64
    ngroups: int = 1
    conv_init: float | None = None
    d_ssm: int | None = None
    A_init_range: tuple[float, float] = (1.0, 16.0)
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    rope_fraction: float = 0.5
    A_floor: float = 1e-4
    is_outproj_norm: bool = False
    chunk_size: int = 256

    attn_layer_idx: tuple[int, ...] = ()
    num_heads: int | None = None
    num_heads_kv: int | None = None
    head_dim: int | None = None
    attn_mlp_dim: int = 0
    attn_d_conv: int = 0
    qkv_proj_bias: bool = True
    out_proj_bias: bool = True
    softmax_scale: float | None = None
    rotary_emb_dim: int = 0
    rotary_emb_base: float = 10000.0
    rotary_emb_interleaved: bool = False

    rms_norm: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    count_mlp_in_init: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_intermediate < 0:
            raise ValueError(f"d_intermediate must be at least 0, got {self.d_intermediate}")
        if self.layer not in get_args(Layer):
            raise ValueError(f"layer must be one of {', '.join(get_args(Layer))}, got {self.layer!r}")
        for name in ("dt_limit", "A_init_range", "attn_layer_idx"):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)):
                raise ValueError(f"{name} must be a tuple or a list of numbers, got {given!r}")
            object.__setattr__(self, name, tuple(given))  # lists, in files
        own = MIXER_FIELDS[self.layer]
        foreign = [
            field.name
            for field in fields(self)
            if any(field.name in names for names in MIXER_FIELDS.values())
            and field.name not in own
            and getattr(self, field.name) != field.default
        ]
        if foreign:
            raise ValueError(f"{self.layer} layers have no {', '.join(foreign)}; leave it out, or change layer")
        self._check_attention()

    def _check_attention(self) -> None:
        wrong = [index for index in self.attn_layer_idx if not 0 <= index < self.n_layer]
        if wrong or len(set(self.attn_layer_idx)) < len(self.attn_layer_idx):
            raise ValueError(
                f"attn_layer_idx must be different numbers in 0..{self.n_layer - 1}, got {self.attn_layer_idx}"
            )
        if self.attn_layer_idx and self.num_heads is None:
            raise ValueError("num_heads must be given for models with attention layers")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def state_size(self) -> int:
        """States per channel."""
        return DEFAULT_D_STATE[self.layer] if self.d_state is None else self.d_state

    def mixer_options(self) -> dict[str, Any]:
        """Arguments of the mixer beside d_model."""
        chosen = {name: getattr(self, name) for name in MIXER_FIELDS[self.layer]}
        return chosen | {"d_state": self.state_size}

    def attention_options(self) -> dict[str, Any]:
        """Arguments of `MHA` beside embed_dim."""
        return {official: getattr(self, name) for name, official in ATTENTION_FIELDS.items()}

    @classmethod
    def from_official(cls, values: dict[str, Any], **overrides: Any) -> "LanguageModelConfig":
        """From a config.json of state-spaces, Codestral's params.json, or a config.json of transformers.

        Raises:
            ValueError: an entry is unknown, or asks for what the model does not have.
        """
        if values.get("model_type") in TRANSFORMERS_LAYERS and "hidden_size" in values:
            return cls(**{**from_transformers(values), **overrides})
        if "hidden_size" in values:
            known = ", ".join(TRANSFORMERS_LAYERS)
            raise ValueError(f"model_type must be one of {known}, got {values.get('model_type')!r}")
        return cls(**{**from_state_spaces(values), **overrides})

    def to_official(self) -> dict[str, Any]:
        """As config.json of state-spaces; our own entries (norm_eps, count_mlp_in_init) stand there if they are set."""
        attn_cfg = {ATTENTION_FIELDS[name]: value for name, value in self._chosen(ATTENTION_FIELDS).items()}
        return {
            "d_model": self.d_model,
            "d_intermediate": self.d_intermediate,
            "n_layer": self.n_layer,
            "vocab_size": self.vocab_size,
            "ssm_cfg": {"layer": self.layer.capitalize(), **self._chosen(MIXER_FIELDS[self.layer])},
            "attn_layer_idx": list(self.attn_layer_idx),
            "attn_cfg": {"causal": True, **attn_cfg} if self.attn_layer_idx else {},
            "rms_norm": self.rms_norm,
            "residual_in_fp32": self.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": self.pad_vocab_size_multiple,
            "tie_embeddings": self.tie_embeddings,
            **self._chosen(("norm_eps", "count_mlp_in_init")),
        }

    def _chosen(self, names: Any) -> dict[str, Any]:
        """Of these fields those that are not at their defaults, as JSON has them."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        values = {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_transformers(self) -> dict[str, Any]:
        """As config.json of transformers' MambaForCausalLM or Mamba2ForCausalLM.

        Raises:
            ValueError: that model lacks what this one has, by name.
        """
        fixed = {"d_intermediate": 0, "attn_layer_idx": (), "rms_norm": True}
        if self.layer == "mamba2":
            fixed |= {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
        lacking = [f"{name}={getattr(self, name)}" for name, value in fixed.items() if getattr(self, name) != value]
        names = {layer: name for name, layer in TRANSFORMERS_LAYERS.items()}
        if self.layer not in names:
            lacking = [f"layer={self.layer!r}"]
        if lacking:
            raise ValueError(f"transformers' layout cannot hold {', '.join(lacking)}; save in layout 'state-spaces'")
        values = {
            "model_type": names[self.layer],
            "vocab_size": self.padded_vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layer,
            "state_size": self.state_size,
            "expand": self.expand,
            "conv_kernel": self.d_conv,
            "use_bias": self.bias,
            "use_conv_bias": self.conv_bias,
            "hidden_act": "silu",
            "layer_norm_epsilon": self.norm_eps,
            "residual_in_fp32": self.residual_in_fp32,
            "tie_word_embeddings": self.tie_embeddings,
            "time_step_min": self.dt_min,
            "time_step_max": self.dt_max,
            "time_step_floor": self.dt_init_floor,
        }
        if self.layer == "mamba1":
            return {
                "architectures": ["MambaForCausalLM"],
                **values,
                "intermediate_size": self.expand * self.d_model,
                "time_step_rank": math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank,
                "time_step_init_scheme": self.dt_init,
                "time_step_scale": self.dt_scale,
            }
        limits = {"time_step_limit": list(self.dt_limit)} if self.dt_limit != (0.0, math.inf) else {}
        return {
            "architectures": ["Mamba2ForCausalLM"],
            **values,
            "num_heads": self.expand * self.d_model // self.headdim,
            "head_dim": self.headdim,
            "n_groups": self.ngroups,
            "chunk_size": self.chunk_size,
            **limits,
        }


def from_state_spaces(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of the config from an official config.json, or from Codestral's params.json."""
    values = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    ssm_cfg, attn_cfg = dict(values.pop("ssm_cfg", None) or {}), dict(values.pop("attn_cfg", None) or {})
    if "dim" in values:
        values |= {"d_model": values.pop("dim"), "n_layer": values.pop("n_layers")}
        values.pop("model_type", None)
        ssm_cfg = {"layer": "Mamba2", "ngroups": values.pop("n_groups", 1), **ssm_cfg}
    result: dict[str, Any] = {"layer": str(ssm_cfg.pop("layer", "Mamba1")).lower()}
    if result["layer"] not in MIXER_FIELDS:
        raise ValueError(f"ssm_cfg: layer must be Mamba1, Mamba2 or Mamba3, got {result['layer']!r}")
    if attn_cfg and not attn_cfg.pop("causal", False):
        raise ValueError("attn_cfg: causal must be true, since a language model's attention looks back only")
    options = {official: name for name, official in ATTENTION_FIELDS.items()}
    whole = (
        *("d_model", "n_layer", "vocab_size", "d_intermediate", "attn_layer_idx", "rms_norm", "residual_in_fp32"),
        *("tie_embeddings", "pad_vocab_size_multiple", "norm_eps", "count_mlp_in_init"),
    )
    for place, entries, known in (
        ("config", values, {name: name for name in whole}),
        ("ssm_cfg", ssm_cfg, {name: name for name in MIXER_FIELDS[result["layer"]]}),
        ("attn_cfg", attn_cfg, options),
    ):
        for entry, value in entries.items():
            if entry in known:
                result[known[entry]] = value
            elif entry not in WITHOUT_EFFECT and not (entry == "chunk_size" and place == "ssm_cfg"):
                raise ValueError(f"{place}: unknown entry {entry!r}, known: {', '.join(known)}")
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in result]
    if missing:
        raise ValueError(f"config: {', '.join(missing)} missing")
    return result


def from_transformers(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of the config from a config.json of transformers' mamba or mamba2."""
    layer = TRANSFORMERS_LAYERS[values["model_type"]]
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {values['hidden_act']!r}")
    names = {
        "d_model": "hidden_size",
        "n_layer": "num_hidden_layers",
        "vocab_size": "vocab_size",
        "d_state": "state_size",
        "expand": "expand",
        "d_conv": "conv_kernel",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "norm_eps": "layer_norm_epsilon",
        "residual_in_fp32": "residual_in_fp32",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_init_floor": "time_step_floor",
    }
    if layer == "mamba1":
        names |= {"dt_rank": "time_step_rank", "dt_init": "time_step_init_scheme", "dt_scale": "time_step_scale"}
    else:
        names |= {"headdim": "head_dim", "ngroups": "n_groups", "chunk_size": "chunk_size"}
    # What transformers takes where its own file is silent.
    silent = {"mamba1": {}, "mamba2": {"n_groups": 8, "tie_word_embeddings": False}}[layer]
    values = silent | values
    result = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    if layer == "mamba2":
        result["dt_limit"] = tuple(from_json(limit) for limit in values.get("time_step_limit", (0.0, math.inf)))
    result |= {"tie_embeddings": values.get("tie_word_embeddings", True), "pad_vocab_size_multiple": 1, "layer": layer}
    inner, headdim = int(result.get("expand", 2) * result["d_model"]), result.get("headdim", 64)
    if values.get("intermediate_size", inner) != inner:
        raise ValueError(f"intermediate_size must be expand * hidden_size = {inner}, got {values['intermediate_size']}")
    if layer == "mamba2" and values.get("num_heads", inner // headdim) * headdim != inner:
        raise ValueError(
            f"num_heads * head_dim must be expand * hidden_size = {inner}, got num_heads {values['num_heads']}"
        )
    return result


def from_json(value: float | dict[str, str]) -> float:
    """A number; transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, dict) else float(value)
