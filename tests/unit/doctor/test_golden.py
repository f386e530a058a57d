"""What doctor tells of every sampled machine reads well: kept as golden files, at the widths of two terminals."""

from __future__ import annotations

import pytest

from tests.unit.doctor.golden_files import hold
from tests.unit.machine.sampled import NAMES, sample
from vlaopt import doctor
from vlaopt.target import load_target

TARGETS = (
    *("cpu-arm", "cpu-x86", "cpu-x86-vnni"),
    *("jetson-orin", "jetson-orin-nano", "jetson-thor", "x86-gpu", "x86-rtx"),
)
ASKED = {
    "cpu-only": ("cpu-x86", "x86-rtx"),
    "h200-server": ("x86-gpu", "x86-rtx"),
    "orin-jetpack6": ("jetson-orin", "jetson-thor"),
    "orin-jetpack7": ("jetson-orin", "x86-gpu"),
    "thor": ("jetson-thor", "jetson-orin"),
    "x86-rtx4090": ("x86-rtx", "x86-gpu"),
}
"""For each machine a target of its class and one that it is not of."""


def test_every_sample_names_its_sources() -> None:
    assert set(ASKED) == set(NAMES)
    for name in NAMES:
        text = (sample(name).sources.root.parent / "SOURCE.md").read_text(encoding="utf-8")
        assert "github.com/" in text or "proc(5)" in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", NAMES)
def test_what_doctor_tells_of_a_machine(name: str, width: int) -> None:
    taken = sample(name)
    machine = taken.machine
    targets = [load_target(target) for target in TARGETS]
    found = doctor.examine_all(targets, machine, taken.states)
    told = ["$ vlaopt doctor", *doctor.show_machine(machine, taken.states, found, width)]
    for target in ASKED[name]:
        verdict = doctor.judge(load_target(target), machine, taken.states)
        told += ["", f"$ vlaopt doctor --target {target}    # exit code {0 if verdict.will else 3}"]
        told += doctor.show_verdict(verdict, width)
    assert all(len(line) <= width for line in told)
    hold(f"{name}.{width}.txt", "\n".join(told) + "\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_is_ready_for_its_own_target_and_not_for_another(name: str) -> None:
    taken = sample(name)
    ready, other = (doctor.judge(load_target(target), taken.machine, taken.states) for target in ASKED[name])
    assert (ready.will, other.will) == (True, False)
    assert [check for check in ready.checks if check.holds is False] == []
    assert any(check.mend for check in other.checks if check.holds is False)
