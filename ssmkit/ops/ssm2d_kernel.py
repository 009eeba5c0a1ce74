"""The kernel of 2-D SSM: impulse response of a state-space model over the two axes of an image.

    h_ij = c_ij (A_1 h_{i,j-1} + A_2 v_{i,j-1}) + B_1 u_ij                    (1)
    v_ij = c_ij (A_3 h_{i-1,j} + A_4 v_{i-1,j}) + B_2 u_ij                    (2)
    K_ij = sum_n (C_1 h_ij + C_2 v_ij) / sqrt(dstate)                         (3)

u is 1 at the origin and 0 elsewhere; c is 1 in the first row and the first column and 1/2 in all others. This is
Roesser's model as Baron et al. 2023, "A 2-Dimensional State Space Layer for Spatial Inductive Bias", arXiv:2306.06635,
normalise it. Their program halves a sum where both of its terms can be other than zero, and in the end doubles the first
row and the first column of K but for the origin; moving those factors of two into (1) and (2) leaves c. It expands each
cell's polynomial in A into a table of powers, which grows with the fourth power of the side; here one cell follows from its
two neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from ssmkit.backends import Backend, choose, load
from ssmkit.ops._check import COMPLEXES, FLOATS, check_device, check_dtype, check_ndim, check_shape
from ssmkit.ops._define import absent, acc_dtype, define

BACKENDS = (
    Backend("cuda", device="cuda", module="ssmkit.native.ssm2d_kernel_cuda"),
    Backend("triton", device="cuda", module="ssmkit.kernels.ssm2d_kernel"),
    Backend("cpu", device="cpu", module="ssmkit.native.ssm2d_kernel"),
)


def ssm2d_kernel(A: Tensor, B: Tensor, C: Tensor, height: int, width: int, *, backend: str = "auto") -> Tensor:
    """Impulse response of the 2-D state-space model, one kernel per channel.

        h_ij = c_ij (A_1 h_{i,j-1} + A_2 v_{i,j-1}) + B_1 u_ij                (1)
        v_ij = c_ij (A_3 h_{i-1,j} + A_4 v_{i-1,j}) + B_2 u_ij                (2)
        K_ij = sum_n (C_1 h_ij + C_2 v_ij) / sqrt(dstate)                     (3)

    u is the impulse at the origin; c is 1 in the first row and column, else 1/2. Numbers follow arXiv:2306.06635.
    Channel k reads the states of group k mod ngroups. Of complex numbers K is the real part; their gradients follow
    PyTorch (dL/dRe + i dL/dIm).

    Args:
        A: A_1 to A_4                     (4, ngroups, dstate)   fp32, bf16, fp16, fp64, complex64 or complex128
        B: B_1 and B_2                    (2, ngroups, dstate)   as A
        C: C_1 and C_2                    (2, channels, dstate)  as A; ngroups divides channels
        height, width: Size of the kernel.
        backend: "auto", "reference", or a name from BACKENDS.
    Returns:
        K (channels, height, width) in fp32 (fp64 for fp64 and complex128).
    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        BackendError: the backend asked for cannot take the call.
    """
    check(A, B, C, height, width)
    chosen = choose("ssm2d_kernel", BACKENDS, backend, A)
    if chosen == "reference":
        return ssm2d_kernel_ref(A, B, C, height, width)
    acc = acc_dtype(A.dtype)
    A, B, C = (t.to(acc) for t in (A, B, C))
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (A, B, C))
    return ssm2d_kernel_fwd(A, B, C, height, width, save, chosen)[0]


def check(A: Tensor, B: Tensor, C: Tensor, height: int, width: int) -> None:
    """Refuse what no backend may see."""
    for name, tensor, rows, axes in (
        ("A", A, 4, "4, ngroups, dstate"),
        ("B", B, 2, "2, ngroups, dstate"),
        ("C", C, 2, "2, channels, dstate"),
    ):
        check_ndim(name, tensor, axes)
        check_shape(name, tensor, (rows, tensor.shape[1] if name == "C" else A.shape[1], A.shape[2]), axes)
        check_dtype(name, tensor, (*FLOATS, *COMPLEXES) if name == "A" else (A.dtype,), "" if name == "A" else "like A")
    ngroups, channels = A.shape[1], C.shape[1]
    if ngroups < 1 or channels % ngroups:
        raise ValueError(f"A has {ngroups} groups, which must divide the {channels} channels of C")
    if A.shape[2] < 1:
        raise ValueError(f"A must have at least one state, got shape {tuple(A.shape)}")
    for name, size in (("height", height), ("width", width)):
        if size < 0 or size >= 2**31:
            raise ValueError(f"{name} must be from 0 to 2**31 - 1, got {size}")
    check_device(A, "A", B=B, C=C)


def ssm2d_kernel_ref(A: Tensor, B: Tensor, C: Tensor, height: int, width: int) -> Tensor:
    """Equations (1) to (3), one cell at a time, in float64 (complex128)."""
    wide = torch.complex128 if A.is_complex() else torch.float64
    A1, A2, A3, A4 = A.to(wide)
    B1, B2 = B.to(wide)
    states: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    nothing = (torch.zeros_like(B1), torch.zeros_like(B2))
    for i in range(height):
        for j in range(width):
            c = 0.5 if i and j else 1.0
            h_left, v_left = states.get((i, j - 1), nothing)
            h_above, v_above = states.get((i - 1, j), nothing)
            h = c * (A1 * h_left + A2 * v_left) + (0.0 if i or j else B1)  # (1)
            v = c * (A3 * h_above + A4 * v_above) + (0.0 if i or j else B2)  # (2)
            states[i, j] = h, v
    out = REALS[acc_dtype(A.dtype)]
    if not states:
        return C.new_zeros(C.shape[1], height, width, dtype=out)
    C_SMGN = (C.to(wide) / A.shape[2] ** 0.5).unflatten(1, (-1, A.shape[1]))
    X_SGNL = torch.stack([torch.stack(cells, dim=-1) for cells in zip(*states.values(), strict=True)])
    K_MGL = torch.einsum("smgn,sgnl->mgl", C_SMGN, X_SGNL)  # (3)
    K = K_MGL.real if A.is_complex() else K_MGL
    return K.reshape(C.shape[1], height, width).to(out)


REALS = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def _as_reals(x: Tensor) -> Tensor:
    """(..., dstate) as reals, those of complex numbers side by side."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _as_numbers(x: Tensor, like: Tensor) -> Tensor:
    """Undoes `_as_reals`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if like.is_complex() else x


def _weights(C: Tensor, ngroups: int) -> tuple[Tensor, Tensor]:
    """C_1 and C_2 over sqrt(dstate) as reals, of each group the rows of its channels: (ngroups, channels, states)."""
    scaled = _as_reals(C.conj_physical() / C.shape[2] ** 0.5)
    first, second = scaled.unflatten(1, (-1, ngroups)).transpose(1, 2).unbind()
    return first, second


def _columns(states: Tensor) -> Tensor:
    """(height, width, ngroups, dstate) as reals of each group: (ngroups, states, cells)."""
    return _as_reals(states).flatten(0, 1).permute(1, 2, 0)


def _in_full_precision(like: Tensor) -> torch.autocast:
    """Autocast reaches into ops, and would round their products to 16 bits."""
    return torch.autocast(like.device.type, enabled=False)


def _dense(x: Tensor) -> Tensor:
    """`x` in memory as it is meant: inside an op nothing carries out a lazy conjugation."""
    return x.resolve_conj().resolve_neg().contiguous()


def _forward(
    A: Tensor, B: Tensor, C: Tensor, height: int, width: int, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    h, v = load(BACKENDS, backend).forward(_dense(A), _dense(B), height, width)
    C_h, C_v = _weights(_dense(C), A.shape[1])
    with _in_full_precision(A):
        K = torch.baddbmm(torch.bmm(C_h, _columns(h)), C_v, _columns(v))  # (3)
    K = K.transpose(0, 1).reshape(C.shape[1], height, width).contiguous()
    return (K, h, v) if save else (K, absent(h), absent(v))


def _forward_fake(
    A: Tensor, B: Tensor, C: Tensor, height: int, width: int, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    states = (height, width, *A.shape[1:]) if save else (0,)
    return A.new_empty(C.shape[1], height, width, dtype=REALS[A.dtype]), A.new_empty(states), A.new_empty(states)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    A, B, C, height, width, save, backend = inputs
    if not save:  # within torch.vmap the call cannot see that a gradient is wanted
        output = ssm2d_kernel_fwd(A, B, C, height, width, True, backend)
    _, h, v = output
    ctx.save_for_backward(A, C, h, v)
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dK: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dK is None:
        return (None,) * 7
    return (*ssm2d_kernel_bwd(dK, *ctx.saved_tensors, ctx.backend), *[None] * 4)


def _backward(dK: Tensor, A: Tensor, C: Tensor, h: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    ngroups = A.shape[1]
    h, v = h.contiguous(), v.contiguous()
    dK_GML = dK.flatten(1).unflatten(0, (-1, ngroups)).transpose(0, 1)
    C_h, C_v = _weights(_dense(C), ngroups)
    # One product for each of h and v, and the same for their weights; of a complex number the conjugate of what reads it.
    with _in_full_precision(A):
        dh, dv = (torch.bmm(dK_GML.transpose(1, 2), weight) for weight in (C_h, C_v))
        read = [torch.bmm(dK_GML, _columns(states).transpose(1, 2)).transpose(0, 1) for states in (h, v)]
    dh, dv = (_as_numbers(t.transpose(0, 1).contiguous(), h).view(h.shape) for t in (dh, dv))
    dC = _as_numbers(torch.stack(read).flatten(1, 2) / C.shape[2] ** 0.5, C)
    dC = dC.conj_physical()
    dA, dB = load(BACKENDS, backend).backward(dh, dv, _dense(A), h, v)
    return dA, dB, dC.contiguous()


def _backward_fake(
    dK: Tensor, A: Tensor, C: Tensor, h: Tensor, v: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return A.new_empty(A.shape), A.new_empty(2, *A.shape[1:]), C.new_empty(C.shape)


ssm2d_kernel_bwd = define(
    "ssm2d_kernel_bwd(Tensor dK, Tensor A, Tensor C, Tensor h, Tensor v, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
ssm2d_kernel_fwd = define(
    "ssm2d_kernel_fwd(Tensor A, Tensor B, Tensor C, SymInt height, SymInt width, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)
