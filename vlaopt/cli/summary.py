"""A build told to a person: one table, then what matters in words."""

from __future__ import annotations

from vlaopt.cli import terminal
from vlaopt.summary import Row, Summary


def show_summary(summary: Summary, *, as_json: bool) -> None:
    """Print a summary; the last line is the artifact's path."""
    if as_json:
        terminal.give_json(summary.model_dump(mode="json"))
        return
    title = f"{summary.name} {summary.version} for {summary.target}"
    numbers = ("size", "latency", "faster", "action error", "worst")
    table = terminal.table("form", "runs on", *numbers, right=numbers, title=title)
    for row in summary.rows:
        table.add_row(*_cells(row, summary.rows[0]))
    terminal.give_table(table)
    for line in (*_measured(summary), *_gates(summary), *_done(summary)):
        terminal.give_words(line)
    terminal.give(summary.path)


def _cells(row: Row, reference: Row) -> tuple[str, ...]:
    faster = f"{reference.latency_ms / row.latency_ms:.1f}×" if row.latency_ms and reference.latency_ms else "—"
    return (
        row.form,
        row.backend,
        f"{terminal.size(row.bytes)} {row.bytes / reference.bytes:4.0%}",
        f"{row.latency_ms:.2f} ms" if row.latency_ms else "not here",
        faster,
        "reference" if row is reference else _number(row.action_error_mean),
        "" if row is reference else _number(row.action_error_max),
    )


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def _measured(summary: Summary) -> list[str]:
    lines = [
        f"latency: {summary.how}",
        "action error: mean and worst of the executed actions on golden observations, in standard deviations of each",
    ]
    if summary.busy:
        lines.insert(1, f"busy machine: {summary.busy}; trust no latency above; --from engine measures again")
    if len(summary.candidates_ms) > 1:
        told = ", ".join(f"{backend} {latency:.2f} ms" for backend, latency in summary.candidates_ms.items())
        lines.append(f"backends measured: {told}")
    lines += [f"refused: {backend}: {reason}" for backend, reason in summary.refused.items()]
    lines += [f"{name}: {variant}, {reason}" for name, (variant, reason) in summary.components.items()]
    if summary.precisions:
        layers = ", ".join(f"{count} {name}" for name, count in sorted(summary.precisions.items()))
        lines.append(f"layers that really run: {layers}")
    bench = summary.bench or {}
    if "hz" in bench:
        p99 = "insufficient samples" if bench["paced_p99_ms"] is None else f"{bench['paced_p99_ms']:.2f} ms"
        reasons = f" ({'; '.join(bench['reasons'])}); `vlaopt bench` measures again" if bench["reasons"] else ""
        lines.append(
            f"paced at {bench['hz']:g} Hz: p50 {bench['paced_p50_ms']:.2f} ms, p99 {p99}, "
            f"{bench['miss_rate']:.2%} missed; {bench['verdict']}{reasons}"
        )
    return lines


def _gates(summary: Summary) -> list[str]:
    held = sum(gate["held"] for gate in summary.gates)
    lines = [summary.verified_on]
    if summary.graph_check:
        lines.append(f"graphs checked for TensorRT: {summary.graph_check}")
    if summary.gates:
        tightest = max(summary.gates, key=lambda gate: gate["value"] / gate["limit"] if gate["limit"] else 0)
        lines.append(
            f"gates: {held} of {len(summary.gates)} held; closest: {tightest['name']} "
            f"{tightest['value']:.4g} of {tightest['limit']:.4g}"
        )
    if summary.success:
        low, high = summary.success["interval"]
        lines.append(
            f"success: {summary.success['successes']} of {summary.success['episodes']} episodes "
            f"({low:.1%} – {high:.1%}, Wilson 95 %)"
        )
    elif not summary.finish:
        lines.append("success: not evaluated in this build (vlaopt eval, or verify.closed_loop in the recipe)")
    return lines


def _done(summary: Summary) -> list[str]:
    lines = [f"finish on the target: {summary.finish['command']}"] if summary.finish else []
    lines.append(f"ran {', '.join(summary.ran)}" if summary.ran else "nothing to do, all stages were stored")
    memory = "not known here" if summary.peak_memory_mib is None else f"{summary.peak_memory_mib / 1024:.2f} GiB"
    return [*lines, f"the build took {summary.seconds:.0f} s; peak memory {memory}"]
