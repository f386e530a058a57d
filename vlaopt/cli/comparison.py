"""A comparison told to a person, or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlaopt.cli import terminal

if TYPE_CHECKING:
    from vlaopt.benchmark.assertions import Outcome
    from vlaopt.benchmark.compare import Comparison
    from vlaopt.benchmark.sides import Side

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Of the sides; the others are held against A."""
ANSWERS = {
    "FASTER": "is FASTER than A",
    "SLOWER": "is SLOWER than A",
    "SAME": "is the SAME as A within 2 %",
    "UNCLEAR": "against A is UNCLEAR, more launches may tell",
}
HOW = {"paced": "paced", "back_to_back": "back-to-back"}
FIGURES = {
    "p99_ms": "paced p99, ms",
    "miss_rate": "miss rate, paced",
    "energy_j": "energy per chunk, J",
    "cold_start_ms": "cold start, ms",
    "host_mib": "peak memory, MiB",
    "device_mib": "GPU memory, MiB",
    "size_mb": "size, MB",
    "action_error_mean": "mean action error, σ",
}


def show(
    sides: Sequence[Side],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    outcomes: Mapping[str, Sequence[Outcome]],
    told: Sequence[str],
) -> None:
    """Print a comparison: what is compared, figures side by side, the answers, and what they rest on (`told`)."""
    for name, side in zip(NAMES, sides, strict=False):
        terminal.give(f"{name}: {side.source}")
    _show_table(sides)
    for name, found in comparisons.items():
        for how, comparison in found.items():
            terminal.give_words(_sentence(name, how, comparison))
    for name, side in zip(NAMES, sides, strict=False):
        if side.doubts:
            terminal.give_words(f"{name} may be wrong: {'; '.join(side.doubts)}")
    for line in told:
        terminal.give_words(line)
    for name, judged in outcomes.items():
        for outcome in judged:
            reason = f" ({outcome.reason})" if outcome.reason else ""
            terminal.give(f"{'held  ' if outcome.ok else 'MISSED'} {name}: {outcome.expression}{reason}")


def _show_table(sides: Sequence[Side]) -> None:
    """Medians and figures, those that are known of any side; beside each what it is of A's."""
    from vlaopt.benchmark.statistics import median

    names = [column for name in NAMES[1 : len(sides)] for column in (name, f"{name} / A")]
    table = terminal.table("", "A", *names, right=("A", *names))
    rows: dict[str, list[float | None]] = {
        f"median {HOW[how]}, ms": [median(side.latencies_ms[how]) for side in sides] for how in sides[0].latencies_ms
    }
    rows |= {label: [side.figures.get(name) for side in sides] for name, label in FIGURES.items()}
    for label, values in rows.items():
        if any(value is not None for value in values):
            table.add_row(label, *_cells(values))
    terminal.give_table(table)


def _cells(values: Sequence[float | None]) -> list[str]:
    from vlaopt.benchmark.sides import ratio

    cells = [_number(values[0])]
    for value in values[1:]:
        share = ratio(values[0], value)
        cells += [_number(value), "—" if share is None else f"{share:.3f}"]
    return cells


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _sentence(name: str, how: str, found: Comparison) -> str:
    return (
        f"{name} {ANSWERS[found.answer]}, {HOW[how]}: {found.speedup:.2f} times A's speed; ratio {found.ratio:.3f} "
        f"({found.ratio_low:.3f} to {found.ratio_high:.3f}), difference {found.difference_ms:+.3f} ms "
        f"({found.difference_low_ms:+.3f} to {found.difference_high_ms:+.3f}) at 99 %, p = {found.p_value:.1g}"
    )


def as_value(
    sides: Sequence[Side],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    outcomes: Mapping[str, Sequence[Outcome]],
    told: Sequence[str],
) -> dict[str, Any]:
    """The same as plain JSON values, with every latency that was held against another."""
    return {
        "sides": {
            name: {
                "source": side.source,
                "unit": side.unit,
                "latencies_ms": {how: samples.tolist() for how, samples in side.latencies_ms.items()},
                "figures": dict(side.figures),
                "doubts": list(side.doubts),
            }
            for name, side in zip(NAMES, sides, strict=False)
        },
        "comparisons": {
            name: {how: {**vars(found), "speedup": found.speedup} for how, found in of.items()}
            for name, of in comparisons.items()
        },
        "assertions": {name: [vars(outcome) for outcome in judged] for name, judged in outcomes.items()},
        "told": list(told),
    }
