"""What doctor tells of every sampled machine reads well: kept as golden files, at the widths of two terminals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.doctor.golden_files import FOLDER, hold
from tests.unit.doctor.test_doctor import engine, judged, manifest
from tests.unit.machine.sampled import NAMES, sample
from vlaopt import doctor
from vlaopt.artifact.manifest import Finish
from vlaopt.doctor.artifacts import Wanted
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


@pytest.mark.parametrize("width", [80, 120])
def test_what_doctor_tells_of_an_artifact(width: int) -> None:
    left = manifest(finish=Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="no GPU"))
    told = []
    for name, made in (("orin-jetpack6", manifest(engine=engine(weights_bytes=40 << 20))), ("orin-jetpack7", left)):
        for machine in (name, "thor", "x86-rtx4090"):
            verdict = judged(made, machine, Wanted(precisions=("int8",), memory_mib=3500))
            what = "ARTIFACT" if made.engine is None else "FINISHED"
            told += [f"$ vlaopt doctor {what}    # on {machine}; exit code {0 if verdict.will else 3}"]
            told += [*doctor.show_verdict(verdict, width), ""]
    assert all(len(line) <= width for line in told)
    hold(f"artifacts.{width}.txt", "\n".join(told))


def test_the_output_in_the_readme_is_a_golden_file() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("$ vlaopt doctor --target jetson-thor\n")[2].partition("\n```")[0]
    golden = (FOLDER / "orin-jetpack6.80.txt").read_text(encoding="utf-8")
    assert shown.count("\n") > 5
    assert shown in golden
