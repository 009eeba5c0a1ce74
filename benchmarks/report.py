"""A run's results: the table on screen, the JSON file, the plot."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .candidate import OURS

MIB = 2**20
COLUMNS = ("candidate", "time", "spread", "times ours", "of limit", "rate", "peak MiB", "error")


def text(report: Mapping[str, Any]) -> str:
    """The whole report for a terminal."""
    plan, cpu = report["plan"], report["machine"]["cpu"]
    heads = [
        f"{report['bench']} at {report['commit']}",
        f"{report['machine'].get('gpu', cpu)['name']}, {cpu['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"allocator: {plan['allocator']}; medians of paired rounds, ratios with their quartiles",
    ]
    return "\n".join(heads + [line for cell in report["cells"] for line in ("", *cell_lines(cell))])


def cell_lines(cell: Mapping[str, Any]) -> list[str]:
    """One cell: a heading, the table, the notes."""
    sizes = ", ".join(f"{name} {value}" for name, value in cell["sizes"].items())
    head = f"{cell['shape']} ({sizes}): {setting(cell)}"
    table = [COLUMNS, *(row_of(cell, row) for row in cell["rows"])]
    lines = [head, *aligned(table)]
    if "limit" in cell:
        rates = ", ".join(f"{kind} {value['median'] / 1e9:.3g} G/s" for kind, value in cell["rates"].items())
        lines.append(f"  limit {ms(cell['limit']['seconds']['median'])}, bound by {cell['limit']['binding']} ({rates})")
    return lines + [f"  {row['name']}: {note}" for row in cell["rows"] for note in notes_of(row)]


def setting(cell: Mapping[str, Any]) -> str:
    """Dtype, mode, threads and capability in words."""
    threads = f"{cell['threads']} thread" + "s" * (cell["threads"] > 1)
    return f"{cell['dtype']} {cell['mode']}, {threads}, {cell['capability']}"


def row_of(cell: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    """One candidate's line of the table."""
    if row["status"] != "ok":
        return (row["name"], row["status"], *[""] * (len(COLUMNS) - 2))
    time = row["time"]
    median = time["median"]
    ratio = row.get("ratio")
    limit = cell.get("limit")
    same = not row.get("variant")
    if row["name"] == OURS and limit is not None:
        share = f"{limit['share']['median']:.0%}"
    else:
        share = f"{limit['seconds']['median'] / median:.1%}" if limit is not None and same else ""
    moved = cell["cost"].get("bytes_moved", 0) + cell["cost"].get("bytes_read", 0)
    memory = row.get("memory")
    return (
        row["name"],
        ("<= " if row.get("once") else "") + ms(median),
        f"±{(time['q3'] - time['q1']) / 2 / median:.0%}",
        "" if ratio is None else f"{ratio['median']:.3g} [{ratio['q1']:.3g}, {ratio['q3']:.3g}]",
        share,
        f"{moved / median / 1e9:.3g} GB/s" if moved and same else "",
        "" if not memory else f"{(memory['held'] + memory['added']) / MIB:.0f}",
        f"{max(row['errors'].values()):.1e}" if row.get("errors") else "",
    )


def notes_of(row: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a row: why it was not timed, how it was called, how loaded the machine was."""
    notes = [row["reason"]] if row["status"] != "ok" else []
    notes += [row["note"]] if row.get("note") else []
    notes += row.get("notes", [])
    if row.get("once"):
        notes.append("one run, over the time budget")
    load = row.get("load")
    if load is not None and not load["quiet"]:
        foreign, waited = (load[kind]["median"] for kind in ("foreign_cores", "waited_share"))
        notes.append(f"other programs were busy: {foreign:.2f} cores, {waited:.0%} of the time spent waiting for a CPU")
    return notes


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 10 else f"{seconds:.3g} s"


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines, columns padded; the first column to the left, the others to the right."""
    rows = list(rows)
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return [
        "  " + "  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in used).rstrip()
        for row in rows
    ]


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write all or nothing: a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        os.chmod(staged, 0o644)
        os.replace(staged, path)
    except BaseException:
        os.unlink(staged)
        raise


# What tells one cell from another.
KEY = ("shape", "dtype", "mode", "threads", "capability", "allocator", "exclusive")


def merged(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """`new`, and what `old` holds besides: other cells, and other rows of the same cell at the same commit.

    A row's ratio stands by itself, as its pairs are its own. Where another set-up measured it, `old` is dropped.
    """
    same = old is not None and all(old[part] == new[part] for part in ("schema", "bench", "machine", "versions"))
    cells = {cell_key(cell): dict(cell) for cell in (old["cells"] if old is not None and same else ())}
    for cell in new["cells"]:
        before = cells.get(cell_key(cell), {"commit": None})
        measured = {row["name"] for row in cell["rows"]}
        kept = (
            [row for row in before["rows"] if row["name"] not in measured] if before["commit"] == cell["commit"] else []
        )
        cells[cell_key(cell)] = {**cell, "rows": [*cell["rows"], *kept]}
    return {**new, "cells": list(cells.values())}


def cell_key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[part] for part in KEY)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """A panel per mode, dtype and thread count: time of every candidate at every shape, on a log scale."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'ssmkit[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Mapping[str, Any]]] = {}
    for cell in report["cells"]:
        panels.setdefault(setting(cell), []).append(cell)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, (title, cells) in zip(axes[0], panels.items(), strict=True):
        names = list(dict.fromkeys(row["name"] for cell in cells for row in cell["rows"] if timed(row)))
        for place, name in enumerate(names):
            found = [
                (i, row) for i, cell in enumerate(cells) for row in cell["rows"] if row["name"] == name and timed(row)
            ]
            width = 0.8 / len(names)
            where = [i + (place - (len(names) - 1) / 2) * width for i, _ in found]
            axis.bar(where, [1e3 * row["time"]["median"] for _, row in found], width, label=name)
        bounds = [(i, cell["limit"]["seconds"]["median"]) for i, cell in enumerate(cells) if "limit" in cell]
        for i, seconds in bounds:
            axis.hlines(1e3 * seconds, i - 0.45, i + 0.45, colors="black", label="machine's limit" if i == 0 else None)
        axis.set_yscale("log")
        axis.set_ylabel("ms per call")
        axis.set_xticks(range(len(cells)), [cell["shape"].replace(", ", ",\n") for cell in cells], fontsize="small")
        axis.set_title(title)
        axis.legend(fontsize="small")
    figure.suptitle(f"{report['bench']}, {report['machine'].get('gpu', report['machine']['cpu'])['name']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def timed(row: Mapping[str, Any]) -> bool:
    return row["status"] == "ok" and not row.get("variant")
