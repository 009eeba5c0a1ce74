"""Which products the layers hand to linear_step: few rows of plain tensors without gradients, and nothing else."""

import pytest
import torch
from torch import nn

from ssmkit.nn import linear as module
from ssmkit.nn.linear import LEAST_WEIGHT, MOST_ROWS, MOST_ROWS_OF_HALVES, product, project
from ssmkit.testing import assert_close, available

WIDTH = 256


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that linear_step computes, by the reference where the library is not compiled."""
    seen, op = [], module.linear_step
    backend = "auto" if "cpu" in available("linear_step") else "reference"

    def counted(*args):
        seen.append(args[0].shape)
        return op(*args, backend=backend)

    monkeypatch.setattr(module, "linear_step", counted)
    monkeypatch.setattr(module, "unusable", lambda name, module: None)
    return seen


def layer(width=WIDTH, *, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(width, WIDTH, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (8,), (2, 1), (2, 4), ()], ids=str)
def test_few_rows_of_a_plain_layer(shape, bias, calls):
    linear, x = layer(bias=bias), torch.randn(*shape, WIDTH)
    y = project(linear, x)
    assert len(calls) == 1
    assert_close("y", y, linear.double()(x.double()))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, MOST_ROWS), (torch.bfloat16, MOST_ROWS_OF_HALVES)], ids=["fp32", "bf16"]
)
def test_more_rows_are_torchs(dtype, most, calls):
    linear = layer(dtype=dtype)
    for rows, taken in ((0, 0), (most, 1), (most + 1, 1)):
        assert project(linear, torch.randn(rows, WIDTH, dtype=dtype)).shape == (rows, WIDTH)
        assert len(calls) == taken, f"{rows} rows"


def test_small_weights_are_torchs(calls):
    small = LEAST_WEIGHT // WIDTH - 1
    project(layer(small), torch.randn(1, small))
    assert not calls


def test_without_the_compiled_library_products_are_torchs(calls, monkeypatch):
    monkeypatch.setattr(module, "unusable", lambda name, module: "it is not compiled")
    linear, x = layer(), torch.randn(1, WIDTH)
    torch.testing.assert_close(project(linear, x), linear(x), rtol=0, atol=0)
    assert not calls


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_of_all_modules_are_called(register, calls):
    ran = []
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda module, *_: ran.append(module))
    try:
        linear = layer()
        project(linear, torch.randn(1, WIDTH))
        assert not calls
        assert ran == [linear] or register == "full_backward_hook"
    finally:
        handle.remove()
    project(linear, torch.randn(1, WIDTH))
    assert len(calls) == 1


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_whatever_else_a_layer_does_is_kept(calls):
    x = torch.randn(1, WIDTH)
    subclass = Adapted(WIDTH, WIDTH).requires_grad_(False)
    torch.testing.assert_close(project(subclass, x), subclass(x), rtol=0, atol=0)
    hooked = layer()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(project(hooked, x), hooked(x), rtol=0, atol=0)
    before = layer()
    before.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    torch.testing.assert_close(project(before, x), before(x), rtol=0, atol=0)
    replaced = layer()
    replaced.forward = lambda x: x
    assert project(replaced, x) is x
    parametrized = nn.utils.parametrizations.weight_norm(layer())
    torch.testing.assert_close(project(parametrized, x), parametrized(x), rtol=0, atol=0)
    assert not calls


def test_gradients_are_torchs(calls):
    linear, x = layer(), torch.randn(1, WIDTH, requires_grad=True)
    project(linear, x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0, keepdim=True))
    trained = layer().requires_grad_()
    project(trained, torch.randn(1, WIDTH)).sum().backward()
    assert trained.weight.grad is not None
    assert not calls
    with torch.no_grad():
        project(trained, x)
    assert len(calls) == 1


def test_tangents_and_levels_of_torch_func_are_torchs(calls):
    linear, x = layer(), torch.randn(2, WIDTH)

    def tangent(x):
        return torch.func.jvp(lambda x: project(linear, x), (x,), (x,))[1]

    def gradient(x):
        return torch.func.grad(lambda x: torch.vmap(lambda row: project(linear, row))(x).sum())(x)

    expected = {tangent: x @ linear.weight.T, gradient: linear.weight.sum(0).expand(2, WIDTH)}
    for function, value in expected.items():
        torch.testing.assert_close(function(x), value)
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), value)
    assert not calls


def test_a_compiled_layer_hands_its_few_rows_on():
    linear, x = layer(), torch.randn(2, WIDTH)
    for function in (project, lambda linear, x: torch.vmap(lambda row: project(linear, row))(x)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(linear, x), linear(x))


def test_autocast_and_mixed_dtypes_are_torchs(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(layer(), torch.randn(1, WIDTH)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        product(torch.randn(1, WIDTH), layer(dtype=torch.bfloat16).weight)
    assert not calls


def test_views(calls):
    wide = torch.randn(4, 2 * WIDTH)
    linear = layer()
    for x in (wide[:, WIDTH:], wide[:, ::2], wide[::2, :WIDTH]):
        assert_close("y", project(linear, x), x.double() @ linear.weight.double().T + linear.bias.double())
    assert len(calls) == 3
