"""A benchmark small enough to be run in a test: y = 2 x, with rivals that are right, wrong, absent, broken and picky."""

import os

import torch

from benchmarks import Absent, Bench, Prepared, Rival, register


def doubled(x, backend="auto"):
    if os.environ.get("TOY_WRONG") and backend != "reference":
        return 2.001 * x
    return 2 * x


def inputs(rows, *, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(rows, 8, generator=generator).to(device, dtype)}


def absent(x):
    raise Absent("pip install it")


def missing(x):
    import a_module_that_is_not_there

    return a_module_that_is_not_there.double(x)


def dies(x):
    os._exit(3)


def wrong_gradient(x):
    return x.detach() + x


def set_up(inputs):
    x = inputs["x"].detach().clone().requires_grad_(inputs["x"].requires_grad)
    return Prepared(lambda: x, leaves={"x": x}, finish=lambda results: {name: 2 * t for name, t in results.items()})


register(
    Bench(
        op=doubled,
        inputs=inputs,
        shapes={"few rows": {"rows": 4}, "many rows": {"rows": 512}},
        sweep=("rows", [16]),
        bytes_moved=lambda rows, dtype: 16 * rows * dtype.itemsize,
        fmas=lambda rows, mode: 8 * rows * (2 if mode == "fwdbwd" else 1),
        rivals={
            "right": lambda x: x + x,
            "wrong": lambda x: x * 2.01,
            "wrong gradient": wrong_gradient,
            "absent": absent,
            "missing": missing,
            "dies": dies,
            "picky": Rival(call=lambda x: x + x, declines=lambda rows: f"not {rows} rows", modes=("fwd",)),
            "forward only": Rival(call=lambda x: x + x, modes=("fwd",)),
            "set up": Rival(prepare=set_up),
            "for a GPU": Rival(call=lambda x: x + x, device="cuda"),
        },
    )
)
