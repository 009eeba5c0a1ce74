"""What a benchmark declares, and the list of those there are.

The smallest complete file, for an op `cumulative`, is benchmarks/bench_cumulative.py:

    import torch
    from torch import Tensor

    from ssmkit.ops import cumulative
    from ssmkit.testing import cumulative_inputs

    from . import Bench, register

    def torch_cumsum(x: Tensor) -> Tensor:               # a rival takes the op's own keyword inputs
        return torch.cumsum(x, dim=1)

    register(Bench(
        op=cumulative,
        inputs=cumulative_inputs,                        # called with sizes, `fixed`, dtype and device
        shapes={"Mamba-130M, 1024 tokens": {"batch": 1, "seqlen": 1024, "dim": 768}},
        fixed={"requires_grad": False},
        bytes_moved=lambda batch, seqlen, dim, dtype: 2 * batch * seqlen * dim * dtype.itemsize,
        rivals={"torch.cumsum": torch_cumsum},
    ))

A rival that needs setting up, declines some shapes or has no backward is a `Rival`.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MODES = ("fwd", "fwdbwd")


class Absent(Exception):
    """A rival that cannot run here; the message says why and how to get it. Raised by the rival itself."""


@dataclass(frozen=True)
class Prepared:
    """A candidate whose set-up is not to be timed: what to call, and the tensors whose gradients are compared.

    Args:
        call: Takes nothing, returns the output tensor or a tuple whose first item it is.
        leaves: By the reference's input names; the inputs themselves where a call reads them directly.
        finish: Turns the results ("y", and "d" + name for each gradient) into ours before they are compared; not timed.
        note: What a reader should know of this very call, the library's build for example.
        held: Bytes that the set-up holds besides the inputs.
    """

    call: Callable[[], Any]
    leaves: Mapping[str, Tensor] | None = None
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    note: str = ""
    held: int = 0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another implementation of the op. A plain function in `Bench.rivals` is the same as `Rival(call=function)`.

    Args:
        call: Takes the op's keyword inputs, returns the output (or a tuple whose first item it is).
        prepare: Instead of `call`: takes the inputs as a dict, returns a `Prepared`.
        modes: What it can do; "fwd" alone for one without gradients.
        device: The device type it is for.
        declines: Given the sizes, mode and dtype (those it names), why it is not run there, or None.
        note: What a reader should know of the way it is called.
        contrast: It computes something else of the same size: timed, not compared with the reference.
    """

    call: Callable[..., Any] | None = None
    prepare: Callable[[dict[str, Any]], Prepared] | None = None
    modes: tuple[str, ...] = MODES
    device: str = "cpu"
    declines: Callable[..., str | None] | None = None
    note: str = ""
    contrast: bool = False

    def __post_init__(self) -> None:
        if (self.call is None) == (self.prepare is None):
            raise ValueError("a Rival needs either call or prepare")

    def ready(self, inputs: dict[str, Any]) -> Prepared:
        """The call to time on these inputs."""
        if self.prepare is not None:
            return self.prepare(inputs)
        call = self.call
        assert call is not None
        return Prepared(lambda: call(**inputs))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One subject: the op, its inputs, the shapes to time it at, what it costs at best, and its rivals.

    Args:
        op: The public function, called as `op(**inputs)`; or a `Rival` where it needs preparing.
        inputs: The tests' factory, called with the sizes, `fixed`, `dtype`, `device`; returns keyword inputs.
        shapes: Label (say which model the shape comes from) -> sizes.
        sweep: Instead of or besides shapes: one size and its values, the others taken from `fixed`.
        fixed: Further keywords of `inputs`, the same everywhere.
        bytes_moved, bytes_read, exps, fmas, products: What one call costs at best: bytes read and written; bytes only
            read, of which there may be far more (weights); exponentials; multiply-adds; those of matrix products. Each is
            called with those of its parameters among the sizes, `dtype` and `mode` ("fwd" or "fwdbwd").
        rivals: Name -> adapter. An import error, or `Absent`, in an adapter reports the rival as absent.
        slack: Multiplies the bounds of the tests that our own op is held to; say why beside it.
        parameters: Inputs that serve every token: their gradients have the tests' `CANCELLATION` besides.
        rounds_operands: Its matrix products take their operands in the inputs' dtype, so that results in fp32 carry that
            dtype's rounding and are held to its bounds.
        reference: The float64 truth, called as the op is; by default the op with `backend="reference"`.
        gradients: Names of the inputs to differentiate; by default every floating-point tensor.
        modes: "fwd" alone for an op without gradients.
        name: By default the op's.
    """

    op: Callable[..., Any] | Rival
    inputs: Callable[..., dict[str, Any]]
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sweep: tuple[str, Sequence[int]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    bytes_moved: Callable[..., float] | None = None
    bytes_read: Callable[..., float] | None = None
    exps: Callable[..., float] | None = None
    fmas: Callable[..., float] | None = None
    products: Callable[..., float] | None = None
    rivals: Mapping[str, Callable[..., Any] | Rival] = field(default_factory=dict)
    slack: float = 1.0
    parameters: tuple[str, ...] = ()
    rounds_operands: bool = False
    reference: Callable[..., Any] | None = None
    gradients: tuple[str, ...] | None = None
    modes: tuple[str, ...] = MODES
    name: str = ""

    def __post_init__(self) -> None:
        if not self.shapes and self.sweep is None:
            raise ValueError("a Bench needs shapes or a sweep")
        if not self.name:
            if isinstance(self.op, Rival):
                raise ValueError("a Bench whose op is a Rival needs a name")
            object.__setattr__(self, "name", self.op.__name__)

    def rival(self, name: str) -> Rival:
        """The adapter of a rival, wrapped where it is a plain function."""
        adapter = self.rivals[name]
        return adapter if isinstance(adapter, Rival) else Rival(call=adapter)

    def rivals_on(self, device: str) -> list[str]:
        """Names of the rivals made for this device type."""
        return [name for name in self.rivals if self.rival(name).device == device]

    def cases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each shape's label and sizes, the sweep's points last."""
        for label, sizes in self.shapes.items():
            yield label, dict(sizes)
        if self.sweep is not None:
            size, values = self.sweep
            for value in values:
                yield f"{size}={value}", {size: value}

    def make(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Inputs on `device`, asking for no gradient."""
        options = {**self.fixed, **sizes, "dtype": dtype, "device": device}
        return {name: _detached(value) for name, value in self.inputs(**options).items()}

    def cost(self, sizes: Mapping[str, Any], dtype: torch.dtype, mode: str) -> dict[str, float]:
        """The declared costs of one call, by name."""
        facts = {**self.fixed, **sizes, "dtype": dtype, "mode": mode}
        declared = {name: getattr(self, name) for name in ("bytes_moved", "bytes_read", "exps", "fmas", "products")}
        return {name: float(sizes_of(count, facts)) for name, count in declared.items() if count is not None}


def sizes_of(function: Callable[..., Any], facts: Mapping[str, Any]) -> Any:
    """Call `function` with those of `facts` that its parameters name."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**facts)
    return function(**{name: facts[name] for name in parameters})


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


BENCHES: dict[str, Bench] = {}
MODULES: dict[str, str] = {}


def compiled_anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, for this shape and mode alone."""
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def register(bench: Bench) -> Bench:
    """Make a benchmark known under its name. Called once per `bench_<name>.py`, at import."""
    if bench.name in BENCHES:
        raise ValueError(f"a benchmark named {bench.name!r} is registered twice")
    BENCHES[bench.name] = bench
    MODULES[bench.name] = sys._getframe(1).f_globals["__name__"]
    return bench


def names() -> list[str]:
    """Names of the benchmarks that can be run, from the files beside this one."""
    package = importlib.import_module(__package__)
    prefix = "bench_"
    return sorted(
        m.name.removeprefix(prefix) for m in pkgutil.iter_modules(package.__path__) if m.name.startswith(prefix)
    )


def find(name: str) -> Bench:
    """The benchmark `name`, its file imported at first use."""
    if name not in BENCHES:
        if name not in names():
            raise ValueError(f"no benchmark is called {name!r}; there are: {', '.join(names())}")
        importlib.import_module(f"{__package__}.bench_{name}")
    if name not in BENCHES:
        raise ValueError(f"bench_{name}.py registers no benchmark called {name!r}")
    return BENCHES[name]
