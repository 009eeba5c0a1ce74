"""What torch.func and forward mode see of the ops: right numbers or a refusal, never a tangent or gradient that is lost."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ssmkit import ops, testing
from ssmkit.backends import BackendError
from ssmkit.testing import available

SIZES = {
    "causal_conv1d": (2, 5, 4, 3),
    "causal_conv1d_step": (2, 4, 3),
    "cross_selective_scan": (2, 2, 3, 4, 3),
    "grid_scan": (2, 2, 3, 4, 2),
    "linear_scan": (2, 5, 4),
    "linear_step": (2, 4, 3),
    "rms_norm": (2, 5, 4),
    "selective_scan": (2, 5, 4, 3),
    "selective_state_step": (2, 4, 3),
    "ssd": (2, 5, 2, 4, 3),
    "ssd_noncausal": (2, 5, 2, 4, 3),
    "ssd_step": (2, 2, 4, 3),
    "ssm2d_kernel": (3, 4, 2, 4, 3),
    "tree_scan": (2, 2, 3, 4),
}
DIFFERENTIABLE = [op for op in SIZES if not op.endswith("_step")]
CASES = [(op, backend) for op in SIZES for backend in available(op)]
IN_PLACE_CASES = [(op, backend) for op, backend in CASES if op.endswith("_step") and op != "linear_step"]
DIFFERENTIABLE_CASES = [(op, backend) for op, backend in CASES if op in DIFFERENTIABLE]


def call(op, backend):
    """The op as a function of its input in float64, everything else held, and that input."""
    optional = {"optional": ()} if op == "rms_norm" else {}
    device = testing.device_of(backend)
    varied = {"linear_scan": "b", "tree_scan": "b", "ssm2d_kernel": "A"}.get(op, "x")
    inputs = getattr(testing, f"{op}_inputs")(*SIZES[op], dtype=torch.float64, device=device, **optional)
    inputs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    x = inputs.pop(varied)

    def function(x):
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return getattr(ops, op)(**{varied: x}, **given, backend=backend)

    return function, x


def test_every_op_is_here():
    # a tree has no derivative, and what long_conv consists of has them all
    assert list(SIZES) == [op for op in ops.__all__ if op not in ("long_conv", "minimum_spanning_tree")]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_forward_mode_is_refused(op, backend):
    function, x = call(op, backend)
    with pytest.raises(BackendError, match=rf"{op}: no kernel carries forward-mode.*backend='reference'"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(BackendError, match=f"{op}: no kernel"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    assert function(x).isfinite().all()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_over_the_backward_kernel_is_refused(op):
    function, x = call(op, available(op)[0])
    y = function(x.requires_grad_())
    with forward_ad.dual_level(), pytest.raises(BackendError, match=f"{op}_bwd: no kernel"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_forward_mode_is_refused_in_a_compiled_function():
    function, x = call("rms_norm", available("rms_norm")[0])
    compiled = torch.compile(lambda x: torch.func.jvp(function, (x,), (x,))[1], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="rms_norm: no kernel carries forward-mode"):
        compiled(x)


@pytest.mark.parametrize("op", SIZES)
def test_the_reference_carries_forward_mode(op):
    function, x = call(op, "reference")
    tangent, step = torch.randn_like(x), 1e-6
    y, dy = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(y, function(x), rtol=0, atol=0)
    difference = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    # Central differences of float64: the step squared, and rounding over the step.
    torch.testing.assert_close(dy, difference, rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("op", "backend"), DIFFERENTIABLE_CASES)
def test_vmap(op, backend):
    function, x = call(op, backend)
    several = torch.stack([x, 2 * x]).requires_grad_()
    mapped, looped = torch.vmap(function)(several), torch.stack([function(x) for x in several])
    torch.testing.assert_close(mapped, looped, rtol=0, atol=0)
    # Within vmap the call cannot see that its input requires a gradient.
    gradients = [torch.autograd.grad(y.square().sum(), several)[0] for y in (mapped, looped)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", available("linear_step"))
def test_vmap_hides_no_gradient_from_an_op_that_has_none(backend):
    function, x = call("linear_step", backend)
    several = torch.stack([x, 2 * x])
    mapped, refused = torch.vmap(function), "linear_step has no gradient and x requires one"
    for loss in (lambda x: mapped(x).sum(), lambda x: torch.vmap(mapped)(x[None]).sum()):
        with pytest.raises(ValueError, match=refused):
            torch.func.grad(loss)(several)
        with pytest.raises(Exception, match=refused):
            torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(several)
    with pytest.raises(ValueError, match=refused):
        mapped(several.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(mapped(several.clone().requires_grad_()), mapped(several))


@pytest.mark.parametrize(("op", "backend"), DIFFERENTIABLE_CASES)
def test_a_gradient_of_the_gradient_is_refused_by_kernels(op, backend):
    function, x = call(op, backend)
    x.requires_grad_()
    first = torch.autograd.grad(function(x).square().sum(), x)[0]
    kept = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(kept, first, rtol=0, atol=0)
    with pytest.raises(BackendError, match=f"{op}: kernels give first derivatives only.*backend='reference'"):
        # What else leads to x does not hide it.
        torch.autograd.grad(kept.square().sum() + x.sum(), x)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_saved_tensors_are_read_once(op):
    function, x = call(op, available(op)[0])
    x.requires_grad_()
    expected = torch.autograd.grad(function(x).square().sum(), x)[0]
    packed, unpacked = [], []
    with saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: unpacked.append(t.shape) or t):
        y = function(x)
    torch.autograd.grad(y.sum(), x, create_graph=True)
    assert packed == unpacked != []
    y = checkpoint(function, x, use_reentrant=False)
    gradient = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_gradient_of_the_gradient_of_the_reference(op):
    function, x = call(op, "reference")
    tangent, step = torch.randn_like(x), 1e-6

    def gradient(x, **kwargs):
        x = x.detach().requires_grad_()
        return x, torch.autograd.grad(function(x).pow(3).sum(), x, **kwargs)[0]

    x, first = gradient(x, create_graph=True)
    second = torch.autograd.grad((first * tangent).sum(), x)[0]
    difference = (gradient(x + step * tangent)[1] - gradient(x - step * tangent)[1]) / (2 * step)
    # Central differences of float64: the step squared, and rounding over the step.
    torch.testing.assert_close(second, difference, rtol=1e-6, atol=1e-6 * difference.abs().max().item())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", ["linear_scan", "selective_scan", "ssd"])
def test_vmap_of_a_constant_in_lower_precision(op):
    inputs = getattr(testing, f"{op}_inputs")(*SIZES[op], dtype=torch.bfloat16)
    name = {"linear_scan": "a"}.get(op, "A")
    constant = inputs[name][0, 0].detach().float() if op == "linear_scan" else inputs[name].detach()
    several = torch.stack([constant, constant / 2]).requires_grad_()

    def function(value):
        return getattr(ops, op)(**{**inputs, name: value}).float().square().sum()

    losses = torch.vmap(function)(several).sum(), function(several[0]) + function(several[1])
    gradients = [torch.autograd.grad(loss, several)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "backend"), IN_PLACE_CASES)
def test_vmap_of_a_state_in_place_is_refused(op, backend):
    function, x = call(op, backend)
    with pytest.raises(RuntimeError, match=f"Batching rule not implemented for ssmkit::{op}"):
        torch.vmap(function)(torch.stack([x, x]))


@pytest.mark.parametrize(("op", "backend"), DIFFERENTIABLE_CASES)
def test_func_grad_is_refused_by_kernels(op, backend):
    function, x = call(op, backend)
    refused = f"{op}: kernels give no gradients to torch.func.*backend='reference'"
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian, lambda f: lambda x: torch.func.vjp(f, x)):
        with pytest.raises(BackendError, match=refused):
            transform(lambda x: function(x).square().sum())(x)
    with pytest.raises(BackendError, match=refused):
        torch.vmap(torch.func.grad(lambda x: function(x).square().sum()))(x[None])
    # What does not lead to the argument is a constant there.
    assert torch.func.grad(lambda scale: (scale * function(x)).sum())(torch.tensor(2.0)).isfinite()


def test_func_grad_is_refused_in_a_compiled_function():
    function, x = call("rms_norm", available("rms_norm")[0])
    compiled = torch.compile(torch.func.grad(lambda x: function(x).sum()), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"rms_norm: kernels give no gradients to torch\.func"):
        compiled(x)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_func_grad_of_the_reference(op):
    function, x = call(op, "reference")
    several = torch.stack([x, 2 * x]).requires_grad_()
    expected = torch.autograd.grad(sum(function(x).square().sum() for x in several), several)[0]
    mapped = torch.vmap(torch.func.grad(lambda x: function(x).square().sum()))(several.detach())
    torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-12)
