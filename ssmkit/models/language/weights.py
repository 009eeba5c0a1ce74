"""Weights of language models, read and written: the layout of state-spaces, and that of transformers.

Both are a config file and named tensors; the names differ in one letter (`backbone.embedding`, `backbone.embeddings`).
Codestral's files carry a prefix `model.`. Names are mapped strictly: what is missing, unknown or of another shape is an
error that names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ssmkit.models.language.config import LanguageModelConfig
from ssmkit.models.language.model import LanguageModel
from ssmkit.models.weights import fit, read, replacing, safetensors, some

Layout = Literal["state-spaces", "transformers"]
CONFIGS = ("config.json", "params.json")
# In order of preference; an index lists the files that share the tensors.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def load(
    path: str | Path,
    *,
    config: LanguageModelConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> LanguageModel:
    """A language model with the weights of a folder or a file.

    Args:
        path: A folder (config.json or params.json beside the weights: safetensors or pytorch_model.bin, whole or in
            parts), or a file of weights with its config in the same folder.
        config: In place of the config file.
        device: Where the model goes.
        dtype: Of the parameters, float32 by default; A_log and D (of Mamba-1 and D of Mamba-2) stay in fp32.
        backend: Handed to the ops; not with a config, which has its own.
    Raises:
        FileNotFoundError: there are no weights, or no config.
        ValueError: the config asks for what the model does not have; a tensor is missing, unknown or of another shape.
    """
    path = Path(path)
    config = config or read_config(path, backend=backend)
    files = weight_files(path)
    # Nothing is computed or stored for start values that would be overwritten.
    model = LanguageModel(config, device="meta", dtype=dtype or torch.float32)
    put(model, official_names(read(files)), source=str(path), device=device or "cpu")
    return model


def save(model: LanguageModel, path: str | Path, *, layout: Layout = "state-spaces") -> None:
    """Write config.json and model.safetensors into a folder, or the tensors alone into a file named *.safetensors.

    Args:
        model: The language model.
        path: The folder, made if need be, or the file.
        layout: Names and config of state-spaces or of transformers (MambaForCausalLM, Mamba2ForCausalLM).
    Raises:
        ValueError: transformers' model lacks what this one has.
    """
    if layout not in ("state-spaces", "transformers"):
        raise ValueError(f"layout must be 'state-spaces' or 'transformers', got {layout!r}")
    path = Path(path)
    config = model.config.to_transformers() if layout == "transformers" else model.config.to_official()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors[HEAD]  # the embedding, which safetensors would not store twice
    if layout == "transformers":
        tensors["backbone.embeddings.weight"] = tensors.pop(EMBEDDING)
    weights = path
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        weights = path / "model.safetensors"
        with replacing(path / "config.json") as file:
            file.write_text(json.dumps(config, indent=2) + "\n")
    with replacing(weights) as file:
        safetensors().save_file(tensors, file, metadata={"format": "pt"})


def read_config(path: Path, *, backend: str = "auto") -> LanguageModelConfig:
    """The config in the folder `path`, or in that of the file `path`."""
    folder = path if path.is_dir() else path.parent
    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                values = json.loads((folder / name).read_text("utf-8"))
                return LanguageModelConfig.from_official(values, backend=backend)
            except ValueError as error:
                raise ValueError(f"{folder / name}: {error}") from error
    raise FileNotFoundError(f"no {' or '.join(CONFIGS)} in {folder}; hand the config to load(..., config=...)")


def weight_files(path: Path) -> list[Path]:
    """The files that hold the tensors."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        return parts_of(path) if path.name.endswith(".index.json") else [path]
    for name in WEIGHTS:
        if (path / name).is_file():
            return parts_of(path / name) if name.endswith(".index.json") else [path / name]
    raise FileNotFoundError(f"no weights in {path}; looked for {', '.join(WEIGHTS)}")


def parts_of(index: Path) -> list[Path]:
    """The files that an index names, all of them there."""
    names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} lists {some(absent)}, not there")
    return [index.parent / name for name in names]


def official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout under the names of state-spaces."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        official = name.removeprefix("model.") if name.startswith(("model.backbone.", "model.lm_head.")) else name
        official = EMBEDDING if official == "backbone.embeddings.weight" else official
        if official in result:
            raise ValueError(f"two tensors are {official}, one of them called {name}")
        result[official] = tensor
    return result


def put(model: LanguageModel, tensors: dict[str, Tensor], *, source: str, device: torch.device | str) -> None:
    """Make tensors under official names the parameters of a model, each in the dtype of the parameter it replaces.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; tied weights differ.
    """
    if model.config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors:
        head, embedding = tensors[HEAD], tensors[EMBEDDING]
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise ValueError(f"{source}: {HEAD} differs from {EMBEDDING}, but the config says that they are tied")
    if model.config.tie_embeddings and EMBEDDING in tensors:
        tensors = tensors | {HEAD: tensors[EMBEDDING]}
    fit(model, tensors, source=source, device=device)
    model.tie_weights()
