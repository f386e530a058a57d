"""vlaopt sensitivity RECIPE"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides, RecipePath, TargetName

if TYPE_CHECKING:
    from vlaopt.quantization.sensitivity import Sensitivity, Suggestion
    from vlaopt.quantization.trials import Trials


def sensitivity(
    recipe: RecipePath,
    target: TargetName = None,
    overrides: Overrides = None,
    evaluations: Annotated[
        int, typer.Option(min=2, metavar="N", help="How many parts to measure, coarse ones first.")
    ] = 32,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the error and the time gained of each part.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what int8 costs and gains, part by part.

    Each component, block and layer that can be int8 is measured alone in it, the rest in FP32: its action error on the
    golden data, its milliseconds within the policy, its bytes. Worst per millisecond first, then rules to consider.
    """
    from vlaopt.artifact.store import Store
    from vlaopt.chain import run_stages
    from vlaopt.quantization.evaluations import Evaluations
    from vlaopt.quantization.plan import plan_nodes
    from vlaopt.quantization.sensitivity import measure, suggestions
    from vlaopt.recipe.load import load_recipe
    from vlaopt.stages import limits
    from vlaopt.stages.quantize import planned, trials_of

    loaded = load_recipe(recipe, overrides=overrides or (), target=target)
    rules = [(rule.scope, rule.scheme) for rule in loaded.quantize.rules]
    with terminal.watched(quiet=as_json) as progress:
        source = run_stages(loaded, None, ("export", "prune"), store=Store.default(), progress=progress)[-1].artifact
        made = planned(loaded, source, "int8", [("*", "int8")], progress)
        by_rules = plan_nodes(made.models, scheme="int8", rules=rules)
        with progress.task("measuring parts in int8", evaluations) as task:
            trials = trials_of(loaded, source, made)[0]
            found = measure(
                made.plan,
                Evaluations(trials, budget=evaluations, task=task),
                lambda error: limits(error, loaded.accept),
            )
    used = [(name, node) for name, nodes in by_rules.items() for node, plan in nodes.items() if plan.scheme != "fp32"]
    rules_to_add = suggestions(found, used)
    if plot:
        _draw(plot, found, f"{loaded.name} for {loaded.target.name}: int8 part by part")
    if as_json:
        terminal.give_json(_as_json(found, rules_to_add, trials))
    else:
        _show(found, rules_to_add, trials)


def _show(found: Sensitivity, rules: list[Suggestion], trials: Trials) -> None:
    times = "" if trials.measured else " (times are estimated by multiply-adds: the target's engine does not run here)"
    table = terminal.table(
        "part",
        "layers",
        "error",
        "flips",
        "jerk",
        "gain",
        "smaller by",
        "error per ms",
        right=("layers", "error", "flips", "jerk", "gain", "smaller by", "error per ms"),
        whole=("part",),
        title=f"alone in int8 on {trials.backend}, against {found.base_ms:.3f} ms and a mean error of "
        f"{found.base.executed.mean:.4f} in FP32{times}",
    )
    for cost in found.costs:
        if cost.refused:
            table.add_row(cost.group.scope, str(len(cost.group.nodes)), f"refused: {cost.refused}")
            continue
        told = cost.gain_ms >= found.least_ms
        table.add_row(
            cost.group.scope,
            str(len(cost.group.nodes)),
            f"{cost.error:+.4f}",
            "" if cost.flips is None else f"{cost.flips:+.4f}",
            f"{cost.jerk:+.3f}",
            f"{cost.gain_ms:+.3f} ms",
            terminal.size(cost.gain_bytes),
            f"{cost.per_ms(found.least_ms):.4f}" if told else "gains none",
        )
    terminal.give_table(table)
    if rules:
        terminal.give("rules to consider, under quantize: rules:")
    for rule in rules:
        terminal.give(f'  - {{scope: "{rule.scope}", scheme: {rule.scheme}}}  # {rule.why}')


def _as_json(found: Sensitivity, rules: list[Suggestion], trials: Trials) -> dict[str, Any]:
    return {
        "backend": trials.backend,
        "times": "measured" if trials.measured else "estimated by multiply-adds",
        "fp32": {"ms": found.base_ms, "error": found.base.to_json()},
        "parts": [cost.to_json() for cost in found.costs],
        "rules": [vars(rule) for rule in rules],
    }


def _draw(path: Path, found: Sensitivity, title: str) -> None:
    """Every finest part, as the table orders them: the error it adds beside the milliseconds it gains."""
    from vlaopt import plots
    from vlaopt.report.figures import sensitivity as figures

    parts = [figures.Cost(cost.group.scope, cost.error, cost.gain_ms) for cost in found.finest() if not cost.refused]
    with plots.drawn(path, title, height=0.4 + figures.height(parts)) as figure:
        figures.paint_costs(parts, "mean action error added (std. dev.)", "milliseconds of a chunk gained", figure)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt sensitivity recipes/edge-vla/cpu.yaml · vlaopt sensitivity recipes/edge-vla/cpu.yaml "
        "--evaluations 12 --plot /tmp/parts.svg"
    )(sensitivity)
