"""A build told to a person: one table, then what matters in words."""

from __future__ import annotations

from vlaopt.cli import terminal
from vlaopt.summary import Summary


def show_summary(summary: Summary, *, as_json: bool) -> None:
    """Print a summary; the last line is the artifact's path."""
    if as_json:
        terminal.give_json(summary.model_dump(mode="json"))
        return
    table = terminal.table(
        "form",
        "runs on",
        "size",
        "of FP32",
        "latency",
        "faster",
        "action error mean",
        "max",
        right=("size", "of FP32", "latency", "faster", "action error mean", "max"),
        title=f"{summary.name} {summary.version} for {summary.target}",
    )
    first = summary.rows[0]
    for row in summary.rows:
        faster = f"{first.latency_ms / row.latency_ms:.1f}×" if row.latency_ms and first.latency_ms else "—"
        table.add_row(
            row.form,
            row.backend,
            terminal.size(row.bytes),
            f"{row.bytes / first.bytes:.0%}",
            f"{row.latency_ms:.2f} ms" if row.latency_ms else "not run here",
            faster,
            "reference" if row.form == "eager" else _number(row.action_error_mean),
            "" if row.form == "eager" else _number(row.action_error_max),
        )
    terminal.give_table(table)
    for line in _words(summary):
        terminal.give(line)
    terminal.give(summary.path)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def _words(summary: Summary) -> list[str]:
    lines = [f"latency: {summary.how}; action error in standard deviations of each action, on golden observations"]
    if summary.precisions:
        layers = ", ".join(f"{count} {name}" for name, count in sorted(summary.precisions.items()))
        lines.append(f"layers that really run: {layers}")
    for component, reason in summary.kept_plain.items():
        lines.append(f"kept plain: {component} ({reason})")
    if summary.verified_on:
        lines.append(summary.verified_on)
    held = sum(gate["held"] for gate in summary.gates)
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
        lines.append("success: not evaluated in this build (make eval, or verify.closed_loop in the recipe)")
    if summary.bench and "paced" in summary.bench:
        lines.append(f"bench: {summary.bench['paced']}")
    if summary.finish:
        lines.append(f"finish on the target: {summary.finish['command']}")
    ran = (
        f"ran {', '.join(summary.ran)} in {summary.seconds:.0f} s"
        if summary.ran
        else "nothing to do, all stages were stored"
    )
    return [*lines, ran]
