"""Mamba3: the written-out recurrence, the official reference's numbers, steps, states, pads, packing, compilation."""

import math
from functools import partial
from itertools import pairwise

import mixers
import pytest
import torch
import torch.nn.functional as F
from golden_cases import load, names
from mixers import tokens, with_gradients
from torch.func import functional_call

from ssmkit.nn import Mamba3, MambaStack
from ssmkit.ops import ssd
from ssmkit.testing import CANCELLATION, assert_close, device_of

BACKENDS = mixers.usable("ssd", "rms_norm", "ssd_step")
thorough = partial(mixers.thorough, BACKENDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Each op is compiled and exported on every backend elsewhere, and Mamba2 is.
compiled_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"][-1:])
SMALL = {"d_model": 8, "d_state": 6, "headdim": 4}
VARIANTS = {
    "plain": {},
    "groups": {"ngroups": 2},
    "all states turn": {"rope_fraction": 1.0},
    "norm": {"is_outproj_norm": True},
    "slowest rate": {"A_floor": 0.8},
}
every_variant = pytest.mark.parametrize(("variant", "backend"), thorough(VARIANTS, ["groups"]))


def layer(backend="auto", dtype=torch.float64, seed=0, **options):
    """With parameters that all matter, steps of very different length and angles of more than a turn."""
    torch.manual_seed(seed)
    made = Mamba3(**(SMALL | options), backend=backend).to(dtype)
    for name, parameter in made.named_parameters():
        if name in ("D", "norm.weight", "B_norm.weight", "C_norm.weight", "B_bias", "C_bias"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        if name == "dt_bias":
            torch.nn.init.uniform_(parameter, -4.0, 1.0)
        if name == "in_proj.weight":
            torch.nn.init.normal_(parameter, 0.0, 0.7)
    return made.to(device_of(backend))


def recurrence(mixer, u):
    """The layer token by token in float64, as its equations stand: (1) and (2) with the state of the token before."""
    heads, N, P, G = mixer.nheads, mixer.d_state, mixer.headdim, mixer.ngroups
    pairs = int(N * (1.0 if mixer.nangles * 2 > N // 2 + 1 else 0.5)) // 2
    parameters = {name: p.double() for name, p in mixer.named_parameters()}
    projected = u.double() @ parameters["in_proj.weight"].T
    z, x, B, C, dt, A, lam, theta = projected.split(
        [heads * P, heads * P, G * N, G * N, heads, heads, heads, pairs], -1
    )

    def normed(weight, name):
        weight = weight.unflatten(-1, (G, N))
        weight = weight / (weight.square().mean(-1, keepdim=True) + 1e-5).sqrt() * parameters[f"{name}_norm.weight"]
        return weight[:, :, [h // (heads // G) for h in range(heads)]] + parameters[f"{name}_bias"][:, 0]

    def turned(weight, angle):
        # A pair is a complex number.
        head = torch.view_as_complex(weight[..., : 2 * pairs].unflatten(-1, (pairs, 2)).contiguous())
        head = torch.view_as_real(head * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        return torch.cat([head, weight[..., 2 * pairs :]], -1)

    k, q, v = normed(B, "B"), normed(C, "C"), x.unflatten(-1, (heads, P))
    dt, lam = F.softplus(dt + parameters["dt_bias"]), lam.sigmoid()
    A = -torch.where(A >= 0, 1 + A, 1 / (1 - A.clamp(max=0))).clamp(min=mixer.A_floor)
    batch, y = len(u), []
    h, angle = u.new_zeros(batch, heads, P, N).double(), u.new_zeros(batch, heads, pairs).double()
    before = torch.zeros_like(h)
    for t in range(u.shape[1]):
        angle = angle + dt[:, t, :, None] * math.pi * theta[:, t, None].tanh()
        now = v[:, t, :, :, None] * turned(k[:, t], angle)[:, :, None, :]
        alpha, beta = torch.exp(dt[:, t] * A[:, t]), (1 - lam[:, t]) * dt[:, t] * torch.exp(dt[:, t] * A[:, t])
        alpha, beta, gamma = (s[..., None, None] for s in (alpha, beta, lam[:, t] * dt[:, t]))
        h = alpha * h + beta * before + gamma * now
        before = now
        y.append((h * turned(q[:, t], angle)[:, :, None, :]).sum(-1) + parameters["D"][:, None] * v[:, t])
    y = torch.stack(y, dim=1)
    if mixer.norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * parameters["norm.weight"].view(heads, P)
    return (y.flatten(-2) * F.silu(z)) @ parameters["out_proj.weight"].T


@every_variant
def test_outputs_and_gradients_of_the_recurrence(variant, backend):
    mixer, hidden, dy = (
        layer(backend, **VARIANTS[variant]),
        tokens(backend, seqlen=21),
        tokens(backend, seqlen=21, seed=2),
    )
    expected = with_gradients(mixer, hidden, dy, lambda u: recurrence(mixer, u))
    torch.testing.assert_close(with_gradients(mixer, hidden, dy, mixer), expected)


@pytest.mark.parametrize("turning", [True, False])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu" or torch.cuda.is_available()])
def test_float32_over_many_tokens(backend, turning):
    """Only differences of angles matter, so an angle's gradient adds up terms that cancel, to the end of the sequence."""
    seqlen = 300
    mixer, hidden, dy = (
        layer(backend, torch.float32),
        *(tokens(backend, 2, seqlen, seed=seed).float() for seed in (1, 2)),
    )
    if not turning:
        mixer.in_proj.weight.data[-mixer.nangles :] = 0.0
    wide = layer(backend)
    wide.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    found = ["y", "du", *(f"d{name}" for name, _ in mixer.named_parameters())]
    actual = dict(zip(found, with_gradients(mixer, hidden, dy, mixer), strict=True))
    expected = dict(zip(found, with_gradients(wide, hidden.double(), dy, wide), strict=True))
    for gradients in (actual, expected):
        gradients["dtheta"] = gradients["din_proj.weight"][-mixer.nangles :]
        gradients["din_proj.weight"] = gradients["din_proj.weight"][: -mixer.nangles]
    for name in actual:
        # The errors of those sums walk at random and neighbours share them: in a total they grow like the length. dt moves
        # the angles, and u moves dt.
        through_angles = name == "dtheta" or (turning and name in ("du", "ddt_bias", "din_proj.weight"))
        slack = seqlen / 5 if through_angles else 1.0 if name in ("y", "du") else CANCELLATION
        assert_close(name, actual[name], expected[name], slack=slack)


@pytest.mark.parametrize(("name", "backend"), thorough(names("mamba3_block*"), []))
def test_official_block(name, backend):
    """The official layer around the reference recurrence of its tests, in float64 and to the stored bounds in float32."""
    case = load(name)
    for dtype in (torch.float64, torch.float32):
        mixer = Mamba3(**case.meta["config"], backend=backend)
        mixer.load_state_dict(case.params, strict=True)
        mixers.check_official_block(case, mixer.to(device_of(backend), dtype), carried=True)


def test_gradcheck():
    mixer, hidden = layer("reference", d_model=4, d_state=4, headdim=4), tokens(seqlen=4, dim=4)
    given = list(mixer.named_parameters())

    def run(u, *values):
        resets = torch.tensor([[False, False, True, False]] * 2)
        return functional_call(
            mixer, dict(zip([name for name, _ in given], values, strict=True)), (u,), {"resets": resets}
        )

    torch.autograd.gradcheck(run, (hidden.requires_grad_(), *(p.detach().clone().requires_grad_() for _, p in given)))


def test_lambda_of_one_and_no_angle_is_plain_ssd():
    mixer, hidden = layer(), tokens()
    z, found = mixer._project(hidden)
    still = found._replace(lam=torch.ones_like(found.lam), theta=torch.zeros_like(found.theta))
    rate = torch.full((mixer.nheads,), -0.7, dtype=torch.float64)
    mixer._project = lambda _: (z, still._replace(A=rate.expand_as(found.A)))
    y = ssd(found.v, found.dt, rate, found.k, found.q, D=mixer.D, z=z.unflatten(-1, (mixer.nheads, mixer.headdim)))
    torch.testing.assert_close(mixer(hidden), mixer.out_proj(y.flatten(-2)))


@every_variant
def test_step_equals_forward(variant, backend):
    mixers.check_step_equals_forward(layer(backend, **VARIANTS[variant]), tokens(backend, seqlen=5))


@pytest.mark.parametrize(("cut", "backend"), thorough([0, 1, 6, 11], [6]))
def test_carried_state_equals_one_pass(cut, backend):
    mixers.check_carried_state(layer(backend, ngroups=2), tokens(backend), cut)


def test_inference_params_like_the_official_ones():
    mixer, hidden = layer(layer_idx=3), tokens()
    cache, expected = mixers.inference_params(), mixer(hidden)
    for _ in range(2):  # the second prompt starts from fresh states
        torch.testing.assert_close(mixers.prompt_and_steps(mixer, hidden, cache), expected)
    assert set(cache.key_value_memory_dict) == {3}


def test_inference_params_of_a_layer_that_was_moved():
    mixers.check_inference_params_elsewhere(layer(layer_idx=3), tokens())


@pytest.mark.parametrize(("variant", "backend"), thorough(["plain", "norm"], []))
def test_packed_equals_separate_sequences(variant, backend):
    mixer, hidden = layer(backend, **VARIANTS[variant]), tokens(backend, batch=1)
    mixers.check_packed(mixer, hidden, dy=tokens(backend, batch=1, seed=2))


@every_backend
def test_packed_sequences_continue_their_states(backend):
    mixers.check_packed_states(layer(backend), tokens(backend, batch=3))


PADDED = {"left": [3, 4, 5, 6, 7, 8, 9, 10], "right": [0, 1, 2, 3], "inside": [1, 2, 6, 9]}


@pytest.mark.parametrize(("side", "backend"), thorough(PADDED, []))
def test_pads_change_nothing(side, backend):
    """Neither outputs nor states nor gradients, with a state from before and with one reset among the tokens."""
    mixer, hidden = layer(backend), tokens(backend)
    mask = torch.zeros(11, dtype=torch.bool)
    mask[PADDED[side]] = True
    mask = mask.to(hidden.device)
    resets = torch.zeros(2, 11, dtype=torch.bool, device=hidden.device)
    resets[1, PADDED[side][2]] = True

    def after(prompt, u, **walk):
        state = mixer.allocate_inference_cache(2)
        mixer(prompt, state=state)
        return mixer(u, state=state, **walk), state

    prompt, dy = tokens(backend, seqlen=3, seed=3), tokens(backend, seed=2)
    _, wanted_state = after(prompt, hidden[:, mask], resets=resets[:, mask])
    wanted = with_gradients(mixer, hidden, dy[:, mask], lambda u: after(prompt, u[:, mask], resets=resets[:, mask])[0])
    for value in (0.0, 1e4):
        padded = torch.where(mask[None, :, None], hidden, value)
        walk = {"mask": mask.expand(2, 11), "resets": resets}
        _, state = after(prompt, padded, **walk)
        torch.testing.assert_close(state, wanted_state)
        actual = with_gradients(mixer, padded, dy * mask[:, None], lambda u, walk=walk: after(prompt, u, **walk)[0])
        actual[0] = actual[0][:, mask]
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(("seed", "backend"), thorough(range(6), []))
def test_any_walk_equals_its_tokens_one_by_one(seed, backend):
    """Packed sequences of any length, pads and resets anywhere, states from before: outputs and states."""
    mixer = layer(backend, ngroups=2)
    torch.manual_seed(seed)
    ends = torch.cat([torch.zeros(1), torch.randint(0, 15, (4,)).sort().values, torch.tensor([14.0])]).long()
    real, resets = torch.rand(1, 14) < 0.6, torch.rand(1, 14) < 0.2
    hidden = tokens(backend, batch=1, seqlen=14, seed=seed)
    state = mixer.allocate_inference_cache(5)
    with torch.no_grad():
        mixer(tokens(backend, batch=5, seqlen=2, seed=seed + 9), state=state)
        expected, singles = torch.zeros_like(hidden), [[part[i : i + 1].clone() for part in state] for i in range(5)]
        for single, (start, end) in zip(singles, pairwise(ends.tolist()), strict=True):
            for token in range(start, end):
                if resets[0, token]:
                    for part in single:
                        part.zero_()
                if real[0, token]:
                    expected[:, token] = mixer.step(hidden[:, token : token + 1], *single)[0][:, 0]
        walk = {"cu_seqlens": ends, "mask": real, "resets": resets}
        y = mixer(hidden, state=state, **{name: told.to(hidden.device) for name, told in walk.items()})
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(list(state), [torch.cat(parts) for parts in zip(*singles, strict=True)])


def test_pads_alone_keep_the_state_unless_they_reset():
    mixer, hidden = layer(), tokens()
    state, before = mixer.allocate_inference_cache(2), mixer.allocate_inference_cache(2)
    for into in (state, before):
        mixer(hidden[:, :6], state=into)
    pads = torch.zeros(2, 5, dtype=torch.bool)
    resets = torch.zeros(2, 5, dtype=torch.bool)
    resets[1, 2] = True
    mixer(hidden[:, 6:], mask=pads, resets=resets, state=state)
    for part, kept in zip(state, before, strict=True):
        torch.testing.assert_close(part[0], kept[0])
        assert not part[1].any()


def test_steps_too_short_to_move_the_state():
    """A vanishing dt keeps the state, its output and its gradients finite, in every dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        mixer, hidden = layer(dtype=dtype), tokens(dtype=dtype)
        state = mixer.allocate_inference_cache(2)
        mixer(hidden[:, :5], state=state)
        before = state.ssm.clone()
        with torch.no_grad():
            mixer.dt_bias.fill_(-1000.0)
        mixer(hidden[:, 5:], state=state).float().sum().backward()
        torch.testing.assert_close(state.ssm, before)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_initialisation_names_and_shapes():
    torch.manual_seed(0)
    mixer = Mamba3(32, d_state=8, headdim=16, ngroups=2, is_outproj_norm=True, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in mixer.state_dict().items()}
    assert shapes == {
        "dt_bias": (4,),
        "B_bias": (4, 1, 8),
        "C_bias": (4, 1, 8),
        "D": (4,),
        "in_proj.weight": (2 * 64 + 4 * 8 + 3 * 4 + 2, 32),
        "B_norm.weight": (8,),
        "C_norm.weight": (8,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }
    kept = {"dt_bias", "B_bias", "C_bias", "D"}
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == kept
    assert all((p == 1).all() for name, p in mixer.named_parameters() if "proj" not in name and name != "dt_bias")
    assert mixer.D._no_weight_decay and mixer.dt_bias._no_weight_decay
    dt = F.softplus(Mamba3(512, headdim=2, dt_min=0.002, dt_max=0.05).dt_bias)
    assert dt.min() >= 0.002 * (1 - 1e-5) and dt.max() <= 0.05 * (1 + 1e-5)
    spread = math.log(0.05 / 0.002) / 12**0.5
    assert (dt.log().std() / spread - 1).abs() <= 5 / 512**0.5
    assert Mamba3(64, device="meta").in_proj.weight.is_meta


@pytest.mark.parametrize(("dtype", "backend"), thorough(["bfloat16", "float16"], []))
def test_low_precision_and_autocast(dtype, backend):
    dtype = getattr(torch, dtype)
    mixer, hidden = layer(backend, torch.float32, ngroups=2), tokens(backend, dtype=torch.float32)
    low = layer(backend, torch.float32, ngroups=2).to(dtype)
    for parameter in (*mixer.parameters(), hidden):
        parameter.data.copy_(parameter.to(dtype))
    expected = mixer(hidden)
    for output in mixers.low_precision(mixer, low, hidden, dtype, [torch.float32] * 3 + [dtype]):
        # The projections, from which decays and angles are made, are rounded to dtype, and the gated product is again.
        assert (output - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@compiled_backend
def test_compile_fullgraph(backend):
    mixer, hidden = layer(backend, torch.float32), tokens(backend, dtype=torch.float32)
    numbers = torch.arange(11, device=hidden.device).ge(8).int().expand(2, 11)
    mixers.check_compile_fullgraph(mixer, hidden, seq_idx=numbers)


@compiled_backend
def test_export(backend):
    inputs = (tokens(backend, seqlen=seqlen, dtype=torch.float32) for seqlen in (11, 20))
    mixers.check_export(layer(backend, torch.float32), *inputs)


def test_in_a_stack():
    torch.manual_seed(0)
    stack = MambaStack(8, 2, make_mixer=lambda index: Mamba3(**SMALL, layer_idx=index)).double()
    hidden, state = tokens(), stack.allocate_inference_cache(2)
    with torch.no_grad():
        stepped = torch.cat([stack.step(hidden[:, t : t + 1], state) for t in range(11)], dim=1)
    torch.testing.assert_close(stepped, stack(hidden))


BAD = {
    "is_mimo": ({"is_mimo": True}, "is_mimo must be False: the layer has the SISO form only"),
    "d_state": ({"d_state": 3}, "d_state must be at least 4 for a pair to turn, got 3"),
    "headdim": ({"headdim": 5}, "headdim must divide the inner width 16, got 5"),
    "ngroups": ({"ngroups": 3}, "ngroups must divide the number of heads 4, got 3"),
    "rope_fraction": ({"rope_fraction": 0.25}, "rope_fraction must be 0.5 or 1.0, got 0.25"),
    "dt_min": ({"dt_min": 0.0}, "step sizes need 0 < dt_min <= dt_max, got 0.0 and 0.1"),
    "A_floor": ({"A_floor": 0.0}, "A_floor must be positive, got 0.0"),
    "expand": ({"expand": 0}, "expand must be at least 1, got 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba3(**(SMALL | options))


def test_bad_calls():
    mixer, hidden = layer(), tokens()
    mixers.check_bad_states(mixer, hidden, walk="mask, resets, seq_idx or cu_seqlens")
    with pytest.raises(ValueError, match=r"seq_idx must have shape \(2, 11\)"):
        mixer(hidden, seq_idx=torch.zeros(2, 10, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"resets must have shape \(2, 11\)"):
        mixer(hidden, resets=torch.zeros(11, dtype=torch.bool))
    with pytest.raises(ValueError, match="hidden_states must have batch 1, got 2"):
        mixer(hidden, cu_seqlens=torch.tensor([0, 11]))
    with pytest.raises(ValueError, match=r"state angle must have shape \(2, 4, 1\), got \(3, 4, 1\)"):
        mixer(hidden, state=mixer.allocate_inference_cache(3))
