"""Language models against the numbers of the official implementation and of transformers."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load as golden

from ssmkit.models.language import LanguageModel, LanguageModelConfig
from ssmkit.models.language.weights import official_names, put
from ssmkit.testing import assert_close, available, device_of

OPS = {"lm_mamba1": ("causal_conv1d", "selective_scan"), "lm_mamba2": ("causal_conv1d", "ssd")}
OPS["lm_mamba2_mlp_untied_layernorm"] = OPS["lm_mamba2"]
CASES = [
    (name, backend)
    for name, ops in OPS.items()
    for backend in [*set.intersection(*(set(available(op)) for op in ops)), "reference"]
]
TRANSFORMERS = ["hf_mamba1", "hf_mamba1_own", "hf_mamba2", "hf_mamba2_own_g2"]


def official(name, backend="auto"):
    case = golden(name)
    config = dict(case.meta["config"])
    if name.startswith("hf_"):
        config["model_type"] = name.split("_")[1].replace("mamba1", "mamba")
    model = LanguageModel(LanguageModelConfig.from_official(config, backend=backend))
    put(model, official_names(case.params), source=name, device=device_of(backend))
    return case, model.eval()


@pytest.mark.parametrize(("name", "backend"), sorted(CASES))
def test_logits_gradients_and_greedy_tokens(name, backend):
    """In float64 the stored float32 results are met to their rounding; in float32 to the bounds stored with the case.

    Interpreted kernels take half a minute for all of it; there one forward and one step must do.
    """
    interpreted = backend == "triton" and device_of(backend).type == "cpu"
    for dtype in (torch.float32,) if interpreted else (torch.float64, torch.float32):
        case, model = official(name, backend)
        model = model.to(dtype)
        ids, targets = (case.inputs[key].to(device_of(backend)) for key in ("input_ids", "targets"))
        new = 2 if interpreted else case.outputs["step_logits"].shape[1]
        generated, step_logits = model.generate(ids, new, return_logits=True)
        assert torch.equal(generated.cpu(), case.outputs["generated"][:, : ids.shape[1] + new])
        compare(
            case, dtype, "logits", {"step_logits": step_logits}, {"step_logits": case.outputs["step_logits"][:, :new]}
        )
        if interpreted:
            return
        logits = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        compare(case, dtype, "logits", {"logits": logits, "loss": loss}, case.outputs)
        gradients = {f"param.{name}": p.grad for name, p in model.named_parameters()}
        assert gradients.keys() == case.gradients.keys()
        compare(case, dtype, "grad", gradients, case.gradients)


def compare(case, dtype, kind, actual, expected):
    bound = case.meta["expected_fp32_tol"][f"{kind}_rel_to_max"]
    for key, value in actual.items():
        if dtype == torch.float64:
            assert_close(key, value.float(), expected[key])
        else:
            assert (value.cpu() - expected[key]).abs().max() <= bound * expected[key].abs().max(), key


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_and_greedy_tokens_of_transformers(name):
    case, model = official(name)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"].bool()
    bound = case.meta["expected_fp32_tol"]["logits_rel_to_max"]
    with torch.no_grad():
        expected = case.outputs["logits"]
        assert (model(ids) - expected).abs().max() <= bound * expected.abs().max()
        assert torch.equal(
            model.generate(ids, case.outputs["generated"].shape[1] - ids.shape[1]), case.outputs["generated"]
        )
        padded, expected = model(ids, mask=mask), case.outputs["logits_with_attention_mask"]
    error = (padded - expected).abs().amax(-1)
    # The second row has no pads.
    assert error[1].max() <= bound * expected.abs().max()
    real = mask[0]
    if not model.config.bias:
        assert error[0, real].max() <= bound * expected.abs().max()
        return
    # There a pad's input is zeroed, but in_proj adds its bias to it, which the convolution and the state then see. Here a
    # pad is as if it were not there.
    assert error[0, real][0] > 100 * bound * expected.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(padded[:1, real], model(ids[:1, real]), rtol=1e-5, atol=1e-5)
