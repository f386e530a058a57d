"""What was measured, for people: a table in Markdown, a plot, and both in README.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer.rows import VLAOPT
from peer.subjects import ROOT
from vlaopt.benchmark.environment import read_environment
from vlaopt.optional import installed_version
from vlaopt.plots import COLOURS, MARKERS, drawn

README, PLOT = ROOT / "README.md", ROOT / "recipes/peers.svg"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
LIBRARIES = ("vlaopt", "torch", "onnxruntime", "openvino", "nncf", "lerobot", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_bf16", "asimd", "i8mm", "bf16")
LEAST_ERROR = 1e-6
"""Standard deviations; what is nearer to the reference is drawn there."""
SHOWN = 4
"""The INT8 limit is drawn when no row is more than so many times slower: of a small policy it says nothing."""


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def machine() -> dict[str, Any]:
    """The machine, what its CPU can do, versions, and how busy it is before anything is measured."""
    found = read_environment()
    return {
        "cpu": found.cpu_model,
        "cores": found.logical_cores,
        "flags": [flag for flag in FLAGS if flag in found.cpu_features],
        "load": found.load_average,
        "memory_mib": found.memory_mib,
        "virtual": found.virtual,
        "python": found.python,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of every library that a row is made of."""
    return {name: installed_version(name) or "not installed" for name in LIBRARIES}


def machine_line(found: dict[str, Any]) -> str:
    """All of that on one line."""
    load = found["load"][0] if found["load"] else math.nan
    flags = ", ".join(found["flags"]) or "none of the flags asked for"
    libraries = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {found['cores']} cores, {flags}; load at start {load:.2f}; {libraries}"


def table(subject: dict[str, Any]) -> str:
    """One subject as a table, fastest first; rows that failed last, with their reasons."""
    title = f"{subject['title']}, {_threads(subject['threads'])}, {subject['gmacs']:.2f}·10⁹ multiply-adds"
    error = "action error" if subject["component"] is None else "output error"
    lines = [
        f"**{title}**",
        "",
        f"| row | × vlaopt | median ms | {error} (std) | MB | peak MB | build s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    ran = [row for row in subject["rows"] if row["failed"] is None and row["rounds_ms"]]
    for row in sorted(ran, key=_ratio):
        label = f"**{row['label']}**" if row["row"] == VLAOPT else row["label"]
        cells = [
            label,
            f"{_ratio(row):.2f}",
            _digits(median(row["rounds_ms"])),
            _digits(row["error"]["mean"]) if row["error"] else "",
            _digits(row["bytes"] / 1e6),
            f"{row['peak_mib'] * 1.048576:.0f}" if row["peak_mib"] else "",
            f"{row['build_s']:.0f}" if row["build_s"] is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in subject["rows"]:
        if row["failed"] is not None:
            reason = row["failed"].replace("|", "/")
            lines.append(f"| {row['label']} | n/a: {reason} | | | | | |")
    own = next(row for row in subject["rows"] if row["row"] == VLAOPT)
    if own["error"] and "per_action" in own["error"]:
        joints = ", ".join(f"{mean:.3f}" for mean in own["error"]["per_action"])
        lines += ["", f"vlaopt's action error, joint by joint: {joints}."]
    limit = subject["limit"]
    if limit["ms"]:
        lines += ["", _limit_line(limit, own)]
    return "\n".join(lines) + "\n"


def _limit_line(limit: dict[str, Any], own: dict[str, Any]) -> str:
    said = (
        f"INT8 limit: {limit['gmacs_per_s']:.0f}·10⁹ multiply-adds per second ({limit['library']}), so "
        f"{_digits(limit['ms'])} ms for the policy's"
    )
    if limit["artifact_ms"] != limit["ms"]:
        said += f", {_digits(limit['artifact_ms'])} ms for the pruned artifact's"
    if own["rounds_ms"]:
        said += f"; vlaopt takes {median(own['rounds_ms']) / limit['artifact_ms']:.2f} times that"
    return f"{said}."


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency against error, a panel for each subject; both axes logarithmic. Labels name the rows."""
    from matplotlib.ticker import LogLocator, NullFormatter

    subjects = result["subjects"]
    with drawn(path, "Latency against error, vlaopt and its peers", width=9, height=4.2 * len(subjects)) as figure:
        for axes, subject in zip(figure.subplots(len(subjects), 1, squeeze=False)[:, 0], subjects, strict=True):
            ran = [row for row in subject["rows"] if row["failed"] is None and row["rounds_ms"] and row["error"]]
            for place, row in enumerate(sorted(ran, key=lambda row: row["row"] != VLAOPT)):
                colour = COLOURS[place % len(COLOURS)]
                marker = "*" if row["row"] == VLAOPT else MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
                error = max(row["error"]["mean"], LEAST_ERROR)
                size = 16 if row["row"] == VLAOPT else 7
                axes.plot(median(row["rounds_ms"]), error, marker, color=colour, markersize=size, label=row["label"])
            fastest = min((median(row["rounds_ms"]) for row in ran), default=0.0)
            if subject["limit"]["artifact_ms"] and subject["limit"]["artifact_ms"] > fastest / SHOWN:
                axes.axvline(subject["limit"]["artifact_ms"], color="#888888", linestyle="--", label="INT8 limit")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{subject['title']}, {_threads(subject['threads'])}")
            axes.set_xlabel("median latency, ms")
            axes.set_ylabel("mean error, standard deviations")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def write_readme(result: dict[str, Any], readme: Path = README, drawing: Path = PLOT) -> None:
    """Rewrite the block between the markers, and the plot that it shows. Raises ValueError without markers."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no block between {BEGIN} and {END}")
    plot(result, drawing)
    shown = drawing.relative_to(readme.parent).as_posix()
    untrained = [subject["title"] for subject in result["subjects"] if not subject["trained"]]
    block = [
        f"![Latency against error of every row](<{shown}>)" if " " in shown else f"![Latency against error]({shown})",
        "",
        f"{machine_line(result['machine'])}; {result['rounds']} rounds.",
        "",
        *(table(subject) for subject in result["subjects"]),
    ]
    if untrained:
        block.append(
            f"Random weights: {', '.join(untrained)}. Their errors compare rows and say nothing of a policy.\n"
        )
    readme.write_text("\n".join([f"{before}{begin}", *block, f"{end}{after}"]), encoding="utf-8")


def _ratio(row: dict[str, Any]) -> float:
    return median(row["ratios"]) if row["ratios"] else math.nan


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _digits(value: float) -> str:
    """Three significant digits, plain where they are readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.0e}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"
