"""Is this machine ready? For a target, for an artifact, or for anything; with what is missing and what mends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlaopt.doctor.artifacts import judge_artifact
from vlaopt.doctor.checks import Check, Verdict
from vlaopt.doctor.probe import State, probe_all
from vlaopt.doctor.targets import TargetState, examine, judge
from vlaopt.doctor.text import show_machine, show_verdict
from vlaopt.machine import Machine
from vlaopt.target import Target

__all__ = [
    "Check",
    "State",
    "TargetState",
    "Verdict",
    "examine_all",
    "judge",
    "judge_artifact",
    "probe_all",
    "show_machine",
    "show_verdict",
]


def examine_all(targets: Sequence[Target], machine: Machine, states: Mapping[str, State]) -> list[TargetState]:
    """What this machine does for each target."""
    return [examine(target, machine, states) for target in targets]
