"""GrootVL's layer for text: its equations token by token, the edges of a prompt, what is left of Mamba without a tree."""

import images
import pytest
import torch
import torch.nn.functional as F

from ssmkit.nn import GrootL, Mamba
from ssmkit.nn.grootl import prompt_edges
from ssmkit.ops import minimum_spanning_tree
from ssmkit.testing import available, device_of

BACKENDS = [name for name in available("tree_scan", reference=True) if name != "triton" or torch.cuda.is_available()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def layer(backend="auto", dtype=torch.float64, kind=GrootL):
    torch.manual_seed(0)
    return images.perturbed(kind(6, d_state=3, backend=backend)).to(device_of(backend), dtype)


def tokens(backend="auto", seqlen=9):
    return images.image(1, seqlen, 6, backend)[:, 0]


def official_pairs(seqlen, prompt):
    """As the paper's code lists them, over the tokens from the last to the first."""
    pairs = [(i, i + 1) for i in range(seqlen - prompt)]
    for i in range(seqlen - prompt, seqlen - 3):
        pairs += [(i, i + k) for k in (1, 2, 3)]
    pairs += [(seqlen - 3, seqlen - 2), (seqlen - 3, seqlen - 1), (seqlen - 2, seqlen - 1)]
    return [[seqlen - 1 - i, seqlen - 1 - j] for i, j in pairs]


@pytest.mark.parametrize(("seqlen", "prompt"), [(9, 9), (9, 5), (9, 4), (9, 3), (4, 4), (3, 3)])
def test_edges_are_the_official_ones(seqlen, prompt):
    assert prompt_edges(seqlen, prompt).tolist() == official_pairs(seqlen, prompt)


def test_edges_of_short_prompts_are_a_chain():
    for prompt in (0, 1, 2):
        assert prompt_edges(4, prompt).tolist() == [[3, 2], [2, 1], [1, 0]]
    assert prompt_edges(0, 0).shape == prompt_edges(1, 1).shape == (0, 2)
    assert prompt_edges(2, 2).tolist() == [[1, 0]]


def mixed_by_hand(mixer, u, prompt):
    """The layer's equations, one token at a time."""
    dim, states, seqlen = mixer.d_inner, mixer.d_state, u.shape[1]
    x, z = (u @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    padded = F.pad(x, (0, 0, 3, 0))
    x = F.silu(sum(padded[:, k : k + seqlen] * mixer.conv1d.weight[:, 0, k] for k in range(4)) + mixer.conv1d.bias)
    dt, B, C = (x @ mixer.x_proj.weight.T).split((mixer.dt_rank, states, states), dim=-1)
    dt = torch.log1p((dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias).exp())
    a, b = torch.exp(dt[..., None] * -mixer.A_log.exp()), (dt * x)[..., None] * B[:, :, None]
    edges = prompt_edges(seqlen, prompt)
    flat = b.detach().flatten(2).cpu()
    cosine = torch.cosine_similarity(flat[:, edges[:, 0]], flat[:, edges[:, 1]], dim=-1)
    tree = minimum_spanning_tree((-cosine).exp(), edges, seqlen, root=seqlen - 1, backend="reference")
    rows = []
    for row in range(len(u)):
        h, g = [], list(b[row])
        for t in range(seqlen):
            h.append(b[row, t] + (a[row, t] * h[t - 1] if t else 0))
        order, parent = (table[row].tolist() for table in tree)
        for p in range(seqlen - 1, 0, -1):
            child, above = order[p], order[parent[p]]
            g[above] = g[above] + a[row, child + 1] * g[child]
        rows.append(torch.stack(h) + 0.3 * torch.stack(g))
    y = (torch.stack(rows) * C[:, :, None]).sum(-1) + mixer.D * x
    assert y.shape[-1] == dim
    return (y * F.silu(z)) @ mixer.out_proj.weight.T


@every_backend
@pytest.mark.parametrize("prompt", [9, 5, 0])
def test_equations_and_gradients(prompt, backend):
    mixer, u = layer(backend), tokens(backend).requires_grad_()
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(0), dtype=u.dtype).to(u)
    leaves = [u, *mixer.parameters()]
    results = []
    for y in (mixer(u, prompt), mixed_by_hand(mixer, u, prompt)):
        results.append([y, *torch.autograd.grad(y, leaves, weight)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_without_a_prompt_the_tree_is_mambas_chain():
    mixer, plain, u = layer(), layer(kind=Mamba), tokens()
    plain.load_state_dict(mixer.state_dict(), strict=True)
    mixer.tree_weight = 0.0
    torch.testing.assert_close(mixer(u), plain(u))
    mixer.tree_weight = 1.0
    with torch.no_grad():
        mixer.D *= 2.0
    # Then all of y is there twice, and out_proj is linear.
    torch.testing.assert_close(mixer(u, 0), 2 * plain(u))
    assert not torch.allclose(mixer(u), 2 * plain(u))


@pytest.mark.parametrize("seqlen", [0, 1, 2, 3])
def test_short_texts(seqlen):
    mixer, u = layer(), tokens()[:, :seqlen]
    torch.testing.assert_close(mixer(u), mixed_by_hand(mixer, u, seqlen) if seqlen else u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_and_autocast(dtype):
    # With no prompt there is one tree alone: among others a rounding may choose another tree.
    images.check_low_precision(layer(dtype=torch.float32), GrootL(6, d_state=3, dtype=dtype), dtype, tokens(), 0)


def test_compile():
    images.check_compile(layer(dtype=torch.float32), tokens(), 5)


def test_bad_calls():
    with pytest.raises(ValueError, match=r"context_len must lie in 0\.\.9, the number of tokens, got 10"):
        layer()(tokens(), 10)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(batch, seqlen, d_model\), got \(9, 6\)"):
        layer()(tokens()[0])
    with pytest.raises(NotImplementedError, match="GrootL takes whole sequences"):
        layer().step(tokens()[:, :1], *layer().allocate_inference_cache(2))
