"""Triton's interpreter stands in where there is no GPU; it must be chosen before triton is imported."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def patch_the_language_once() -> None:
    """Interpreted kernels take half as long: one jit function calling another patches triton.language all over again."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        if tl.core.is_builtin(tl.full) or tl.core.is_builtin(tl.core.full):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_the_language_once()


@pytest.fixture(autouse=True)
def restore_threads():
    """Sums are split by the number of threads, so a test that sets it must not change what others compute."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def compile_afresh(request):
    """A test that compiles starts without the compiled forms, and the count of them, that others left."""
    if "compile" in request.node.name:
        torch._dynamo.reset()
