"""ggml's CPU operators through ctypes: from the folder in SSMKIT_GGML, else from the package libggml-python.

A library built for this very machine is the fairest rival; the package's is built for any x86-64.
"""

import ctypes
import importlib.util
import os
import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .registry import Absent, Prepared

F32, I32 = 0, 26


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def folder() -> Path:
    """Where libggml-base and libggml-cpu lie."""
    given = os.environ.get("SSMKIT_GGML")
    if given:
        return Path(given)
    package = importlib.util.find_spec("libggml")
    if package is None or not package.submodule_search_locations:
        raise Absent("pip install libggml-python, or name a folder with a libggml-cpu built here in SSMKIT_GGML")
    return Path(package.submodule_search_locations[0], "lib64")


@cache
def library() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml's base library and its CPU backend, signatures stated."""
    try:
        base, cpu = (ctypes.CDLL(str(folder() / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    except OSError as error:
        raise Absent(f"ggml does not load: {error}") from None
    handle, size = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "ggml_init": (handle, InitParams),
        "ggml_new_tensor_4d": (handle, handle, ctypes.c_int, size, size, size, size),
        "ggml_get_data": (handle, handle),
        "ggml_ssm_scan": (handle, *[handle] * 8, size),
        "ggml_ssm_conv": (handle, *[handle] * 3),
        "ggml_new_graph": (handle, handle),
        "ggml_build_forward_expand": (None, handle, handle),
        "ggml_free": (None, handle),
        "ggml_version": (ctypes.c_char_p,),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_graph_compute_with_ctx.argtypes = (handle, handle, ctypes.c_int)
    cpu.ggml_cpu_init()
    return base, cpu


def version() -> str:
    """Version, and the SIMD level the library was built for."""
    base, cpu = library()
    level = "AVX-512" if cpu.ggml_cpu_has_avx512() else "AVX2" if cpu.ggml_cpu_has_avx2() else "no AVX2"
    return f"ggml {base.ggml_version().decode()}, {level}"


class Context:
    """Tensors and a graph in one arena, freed with the last reference."""

    def __init__(self, nbytes: int) -> None:
        self.base, self.cpu = library()
        self.nbytes = nbytes
        self.handle = self.base.ggml_init(InitParams(nbytes, None, False))
        weakref.finalize(self, self.base.ggml_free, self.handle)

    def tensor(self, values: Tensor, *sizes: int) -> int:
        """A copy of `values` under ggml's sizes, the fastest first."""
        kind = I32 if values.dtype == torch.int32 else F32
        made = self.base.ggml_new_tensor_4d(self.handle, kind, *sizes, *[1] * (4 - len(sizes)))
        self.read(made, values.numel(), values.dtype).copy_(values.reshape(-1))
        return made

    def read(self, tensor: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first `count` elements of a tensor, in place."""
        kind = ctypes.c_int32 if dtype == torch.int32 else ctypes.c_float
        return torch.frombuffer((kind * count).from_address(self.base.ggml_get_data(tensor)), dtype=dtype)

    def graph(self, result: int) -> int:
        """What has to run for `result`."""
        graph = self.base.ggml_new_graph(self.handle)
        self.base.ggml_build_forward_expand(graph, result)
        return graph

    def compute(self, graph: int, threads: int) -> None:
        """Run a graph."""
        status = self.cpu.ggml_graph_compute_with_ctx(self.handle, graph, threads)
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute_with_ctx returned {status}")


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, threads: int) -> Prepared:
    """`ssm_scan` on copies of these inputs: softplus of dt, zero initial state, neither D nor gate.

    Args:
        x, dt: (batch, seqlen, dim) fp32.
        A: (dim, dstate) fp32.
        B, C: (batch, seqlen, ngroups, dstate) fp32.
    """
    if x.dtype != torch.float32:
        raise Absent("ssm_scan takes float32 only")
    (batch, seqlen, dim), dstate, ngroups = x.shape, A.shape[1], B.shape[2]
    elements = 4 * x.numel() + 4 * B.numel() + A.numel() + 3 * batch * dim * dstate
    context = Context(4 * elements + 2**26)
    result = context.base.ggml_ssm_scan(
        context.handle,
        context.tensor(torch.zeros(batch, dim, dstate), dstate, 1, dim, batch),
        context.tensor(x, 1, dim, seqlen, batch),
        context.tensor(dt, dim, seqlen, batch),
        context.tensor(A, dstate, dim),
        context.tensor(B, dstate, ngroups, seqlen, batch),
        context.tensor(C, dstate, ngroups, seqlen, batch),
        context.tensor(torch.arange(batch, dtype=torch.int32), batch),
        1,
    )
    graph = context.graph(result)

    def run() -> Tensor:
        context.compute(graph, threads)
        return context.read(result, x.numel()).view(batch, seqlen, dim)

    return Prepared(run, note=version(), held=context.nbytes)


def causal_conv1d(x: Tensor, weight: Tensor, threads: int) -> Prepared:
    """`ssm_conv` on copies of these inputs: zeros before the first token, neither bias nor activation.

    Args:
        x: (batch, seqlen, dim) fp32.
        weight: (dim, width) fp32.
    """
    if x.dtype != torch.float32:
        raise Absent("ssm_conv takes float32 only")
    (batch, seqlen, dim), width = x.shape, weight.shape[1]
    padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    context = Context(4 * (padded.numel() + weight.numel() + 2 * x.numel()) + 2**26)
    result = context.base.ggml_ssm_conv(
        context.handle,
        context.tensor(padded, seqlen + width - 1, dim, batch),
        context.tensor(weight, width, dim),
    )
    graph = context.graph(result)

    def run() -> Tensor:
        context.compute(graph, threads)
        return context.read(result, x.numel()).view(batch, seqlen, dim)

    return Prepared(run, note=version(), held=context.nbytes)
