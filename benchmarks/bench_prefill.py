"""A prompt through a whole language model, logits of its last token: bound by the products with its weights."""

import torch
from torch import Tensor

from ssmkit.models.language import LanguageModel

from . import Bench, Prepared, language, register


def ours(model: LanguageModel, input_ids: Tensor) -> Prepared:
    """One forward that leaves the states in the cache, as `generate` begins."""
    state = model.allocate_inference_cache(len(input_ids), input_ids.shape[1])

    def call() -> Tensor:
        for part in (tensor for layer in state for tensor in layer):
            part.zero_()
        return model(input_ids, state=state, num_last_tokens=1).squeeze(1)

    return Prepared(call)


def transformers_prefill(model: torch.nn.Module, input_ids: Tensor) -> Prepared:
    return Prepared(lambda: model(input_ids, use_cache=True, logits_to_keep=1).logits.squeeze(1))


register(
    Bench(
        name="prefill",
        op=language.on_weights(ours, language.ours),
        inputs=language.model_inputs,
        modes=("fwd",),
        shapes={
            f"{title}, 512 tokens": {"model": model, "batch": 1, "seqlen": 512}
            for model, title in language.MODELS.items()
        },
        bytes_read=lambda model, dtype: dtype.itemsize * (language.matrices(model) + language.head(model)),
        products=lambda model, batch, seqlen: batch * (seqlen * language.matrices(model) + language.head(model)),
        slack=language.SLACK,
        reference=language.reference,
        rivals={"transformers": language.on_weights(transformers_prefill, language.transformers_model)},
    )
)
