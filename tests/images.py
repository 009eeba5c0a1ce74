"""What the tests of layers over images share: inputs, official numbers, gradients, low precision, compilation."""

import torch

from ssmkit.testing import assert_close, device_of


def image(height, width, channels, backend="auto", batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, height, width, channels, generator=generator, dtype=dtype).to(device_of(backend))


def perturbed(module, scale=0.2, seed=2):
    """Every parameter moved a little, so that none stands where it makes no difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def check_official(case, mixer, *size):
    """Outputs and gradients of a stored case, called with its input and `size`.

    In float64 the stored float32 results are met to their rounding; in float32 to the bounds stored with the case.
    """
    parameter = next(mixer.parameters())
    ((name, given),) = case.inputs.items()
    x = given.to(parameter).requires_grad_()
    y = mixer(x, *size)
    grads = torch.autograd.grad(y, [x, *mixer.parameters()], case.cotangents["y"].to(y))
    got = dict(zip([f"in.{name}", *(f"param.{key}" for key, _ in mixer.named_parameters())], grads, strict=True))
    assert got.keys() == case.gradients.keys()
    allowed = case.meta["expected_fp32_tol"]
    for values, stored, bound in (({"y": y}, case.outputs, "out_rel_to_max"), (got, case.gradients, "grad_rel_to_max")):
        for key, value in values.items():
            if parameter.dtype == torch.float64:
                assert_close(key, value.float(), stored[key])
            else:
                assert (value.cpu() - stored[key]).abs().max() <= allowed[bound] * stored[key].abs().max(), key


def check_gradients(module, x, *rest, idle=()):
    """Each parameter, and the first input, has a gradient that is neither absent nor all zero, but for those in `idle`."""
    x = x.clone().requires_grad_()
    named = {"x": x, **dict(module.named_parameters())}
    y = module(x, *rest)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype).to(y)
    grads = torch.autograd.grad(y, list(named.values()), weight, allow_unused=True)
    unreached = {name for name, grad in zip(named, grads, strict=True) if grad is None or not grad.any()} - {*idle}
    assert not unreached, f"no gradient reaches {', '.join(sorted(unreached))}"


def check_low_precision(wide, low, dtype, x, *rest):
    """A layer `low` made in `dtype`, given the weights of the float32 layer `wide`, and `wide` under autocast."""
    device = next(wide.parameters()).device
    x = x.to(device, torch.float32)
    low = low.to(device)
    low.load_state_dict(wide.state_dict())
    expected = wide(x, *rest)
    outputs = [low(x.to(dtype), *rest)]
    assert outputs[0].dtype == dtype
    if device.type != "cpu" or dtype == torch.bfloat16:
        with torch.autocast(device.type, dtype=dtype):
            outputs.append(wide(x, *rest))
        outputs[1].float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in wide.parameters())
    for output in outputs:
        # A handful of roundings to dtype between input and output, each of the size of one eps.
        assert (output.float() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def check_compile(module, x, *rest):
    """One graph, forward and backward, in float32."""
    x = x.to(next(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs, grads = [], []
    for call in (compiled, module):
        leaf = x.clone().requires_grad_()
        outputs.append(call(leaf, *rest))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), [leaf, *module.parameters()]))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1])
