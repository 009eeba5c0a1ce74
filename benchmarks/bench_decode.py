"""One token through a whole language model: bound by its weights, which stream from memory at every token."""

import torch
from torch import Tensor

from ssmkit.models.language import LanguageModel, language_model_config

from . import Bench, Prepared, language, register


def ours(model: LanguageModel, input_ids: Tensor) -> Prepared:
    """`step`, its state updated in place; the first call, which is checked, starts from nothing."""
    state = model.allocate_inference_cache(len(input_ids))
    return Prepared(lambda: model.step(input_ids, state))


def transformers_step(model: torch.nn.Module, input_ids: Tensor) -> Prepared:
    """With its cache, as `generate` calls it."""
    cache = None

    def call() -> Tensor:
        nonlocal cache
        out = model(input_ids, cache_params=cache, use_cache=True)
        cache = out.cache_params
        return out.logits.squeeze(1)

    return Prepared(call)


def bytes_moved(model: str, batch: int) -> float:
    """The states of the scan, read and written, in fp32."""
    config = language_model_config(model)
    d_state = config.mixer_options().get("d_state", 16 if config.layer == "mamba1" else 128)
    return 4 * 2 * batch * config.n_layer * 2 * config.d_model * d_state


def products(model: str) -> int:
    return language.matrices(model) + language.head(model)


register(
    Bench(
        name="decode",
        op=language.on_weights(ours, language.ours),
        inputs=language.model_inputs,
        modes=("fwd",),
        shapes={
            f"{title}, one token{f' for {batch} sequences' if batch > 1 else ''}": {"model": model, "batch": batch}
            for model, title in language.MODELS.items()
            for batch in (1, 8)
        },
        bytes_read=lambda model, dtype: dtype.itemsize * products(model),
        bytes_moved=bytes_moved,
        products=lambda model, batch: batch * products(model),
        slack=language.SLACK,
        reference=language.reference,
        rivals={"transformers": language.on_weights(transformers_step, language.transformers_model)},
    )
)
