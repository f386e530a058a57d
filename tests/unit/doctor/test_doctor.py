"""What doctor concludes: which tasks a fault stops, what mends it, and that no question makes it fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import Files, Publish
from tests.unit.machine.sampled import sample
from vlaopt import backends, isolated
from vlaopt.artifact.manifest import EngineComponent, EngineEntry, Finish, Manifest
from vlaopt.backends import Backend
from vlaopt.doctor import State, Verdict, examine_all, judge
from vlaopt.doctor import artifacts as of_artifacts
from vlaopt.doctor.artifacts import Wanted
from vlaopt.doctor.checks import Check
from vlaopt.doctor.probe import probe, probe_all
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.machine import Machine
from vlaopt.target import Target, load_target

NOTHING = Wanted()
PLAN = {"tensorrt": "10.3.0", "sm": "8.7", "gpu": "Orin", "os": "linux-aarch64"}


def check(verdict: Verdict, what: str) -> Check:
    return next(found for found in verdict.checks if found.what == what)


def target(name: str = "jetson-orin", **changed: Any) -> Target:
    return load_target(name).model_copy(update=changed)


def manifest(**fields: Any) -> Manifest:
    given: dict[str, Any] = {"name": "edge-vla", "version": "1.0.0", "target": "jetson-orin", "stage": "engine"}
    empty: dict[str, Any] = {"recipe": {}, "lineage": (), "tools": {}, "metrics": {}, "files": ()}
    return Manifest(**{**given, **empty, **fields})


def engine(backend: str = "tensorrt", needs: dict[str, str] | None = None, **facts: Any) -> EngineEntry:
    component = EngineComponent(
        variant="plain", reason="a test", files=(), precisions={}, needs=PLAN if needs is None else needs, facts=facts
    )
    return EngineEntry(
        machine="here",
        backend=backend,
        backend_version="10.3.0",
        threads=0,
        settings={},
        components={"head": component, "vision": component},
    )


def judged(made: Manifest, name: str = "orin-jetpack6", wanted: Wanted = NOTHING, **changed: Any) -> Verdict:
    taken = sample(name)
    machine = taken.machine.model_copy(update=changed)
    return of_artifacts.judge(made, target(made.target), wanted, machine, taken.states)


def test_an_engine_that_was_built_here_loads() -> None:
    verdict = judged(manifest(engine=engine()))
    assert (verdict.will, verdict.sentence) == (True, "its engine loads here")
    assert {found.what for found in verdict.checks} >= {f"engine: {what}" for what in PLAN}


@pytest.mark.parametrize(
    ("what", "needed"),
    [("tensorrt", "10.16.2.10"), ("sm", "11.0"), ("gpu", "NVIDIA Thor"), ("os", "linux-x86_64"), ("zlib", "1.3")],
)
def test_an_engine_of_another_machine_is_told_by_its_need(what: str, needed: str) -> None:
    verdict = judged(manifest(engine=engine(needs={**PLAN, what: needed})))
    found = check(verdict, f"engine: {what}")
    assert (verdict.will, found.holds, found.need, found.have) == (False, False, needed, PLAN.get(what, "not known"))
    assert found.mend == "vlaopt build RECIPE"


def test_any_of_several_values_of_a_need_is_enough() -> None:
    needs = {"tensorrt-rtx": "1.7.1.116", "sm": "8.6 | 8.9 | 12.0", "os": "linux-x86_64"}
    made = manifest(target="x86-rtx", engine=engine("tensorrt-rtx", needs))
    assert judged(made, "x86-rtx4090").will
    assert not judged(made, "h200-server").will


def test_an_engine_that_loads_nowhere_here_but_can_be_built_again_says_so() -> None:
    verdict = judged(manifest(engine=engine(needs={**PLAN, "tensorrt": "10.16.2.10"})))
    assert verdict.sentence.endswith("one for this machine can be built: vlaopt build RECIPE")
    derived = judged(manifest(engine=engine(needs={**PLAN, "tensorrt": "10.16.2.10"}), parent="0123456789abcdef"))
    assert (check(derived, "engine: tensorrt").mend or "").startswith("vlaopt engine on the artifact 0123456789ab")
    elsewhere = judged(manifest(engine=engine()), "cpu-only")
    assert elsewhere.sentence == "its engine does not load here"
    assert check(elsewhere, "architecture").holds is False


def test_an_engine_whose_weights_do_not_fit_into_memory_does_not_load() -> None:
    made = manifest(engine=engine(weights_bytes=2 << 30, activation_bytes=1 << 30))
    found = check(judged(made, available_mib=6000), "free memory")
    assert (found.holds, found.have, found.need) == (False, "6000 MiB", "6144 MiB for weights and activations")
    assert judged(made, available_mib=6144).will
    assert check(judged(made, available_mib=None), "free memory").holds is None


def test_an_engine_of_another_vlaopt_is_judged_by_its_needs_alone() -> None:
    taken = sample("orin-jetpack6")
    made = manifest(engine=engine())
    assert of_artifacts.judge(made, None, Wanted(), taken.machine, taken.states).will
    thor = sample("thor")
    refused = of_artifacts.judge(made, None, Wanted(), thor.machine, thor.states)
    assert [found.what for found in refused.checks if found.holds is False] == [
        "engine: tensorrt",
        "engine: sm",
        "engine: gpu",
    ]
    unknown = of_artifacts.judge(manifest(engine=engine("from-a-plug-in", {})), None, Wanted(), taken.machine, {})
    assert check(unknown, "runs").have == "not in this vlaopt"


def test_an_artifact_to_be_finished_is_built_on_its_target_only() -> None:
    left = manifest(finish=Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="no GPU"))
    assert judged(left).sentence == "its engine can be built here: vlaopt engine ARTIFACT"
    refused = judged(left, "thor")
    assert (refused.will, check(refused, "GPU").holds) == (False, False)


def test_memory_to_build_in_is_asked_before() -> None:
    left = manifest(finish=Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="no GPU"))
    found = check(judged(left, "orin-jetpack7", Wanted(memory_mib=4000)), "free memory")
    assert (found.holds, found.have) == (False, "3192 MiB")
    assert judged(left, "orin-jetpack7", Wanted(memory_mib=3000)).will
    card = manifest(target="x86-rtx", finish=Finish(backend="tensorrt-rtx", command="vlaopt engine", reason="no GPU"))
    small = judged(card, "x86-rtx4090", Wanted(backends=("tensorrt-rtx",), memory_mib=30000))
    assert [found.what for found in small.checks if found.holds is False] == ["free on the GPU"]


def test_native_code_of_another_machine_is_told_and_needs_trust() -> None:
    taken = sample("orin-jetpack6")
    made = manifest(engine=engine())
    verdict = of_artifacts.judge(made, target(), Wanted(), taken.machine, taken.states, trusted=False)
    assert verdict.will
    assert (check(verdict, "built by").holds, check(verdict, "built by").need) == (None, "this machine")


def test_a_precision_that_the_gpu_lacks_is_named() -> None:
    left = manifest(finish=Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="no GPU"))
    found = check(judged(left, wanted=Wanted(precisions=("fp8", "int8"))), "precisions")
    assert (found.holds, found.have, found.need) == (False, "SM 8.7, without fp8", "int8, fp8")
    assert check(judged(left, wanted=Wanted(precisions=("int8",))), "precisions").holds


def test_a_tensorrt_outside_the_targets_range_is_mended_by_jetpack() -> None:
    taken = sample("orin-jetpack7")
    verdict = judge(target("jetson-orin", tensorrt=">=11,<12", jetpack="7.2.2"), taken.machine, taken.states)
    found = check(verdict, "TensorRT")
    assert (found.holds, found.have, found.mend) == (False, "10.16.2.10", "install JetPack 7.2.2, which brings it")
    assert verdict.sentence == "this machine neither builds its engines nor runs them"


def test_the_range_of_tensorrt_binds_no_other_backend() -> None:
    taken = sample("h200-server")
    both = target("x86-gpu", backends=("tensorrt", "onnxruntime-cuda"), tensorrt=">=12")
    alone = {"tensorrt": taken.states["tensorrt"]}
    assert check(judge(both, taken.machine, alone), "TensorRT").holds is False
    assert check(judge(both, taken.machine, taken.states), "TensorRT").holds is None
    assert judge(both, taken.machine, taken.states).will


def test_any_backend_whose_tensorrt_fits_is_enough() -> None:
    taken = sample("orin-jetpack7")
    old = State(name="tensorrt", version="10.3.0", machine={"tensorrt": "10.3.0", "sm": "8.7"})
    verdict = judge(target(tensorrt=">=10.16"), taken.machine, {**taken.states, "tensorrt": old})
    assert (verdict.will, check(verdict, "TensorRT").have) == (True, "10.16.2")


def test_a_machine_that_only_has_trtexec_is_ready_but_not_for_measuring() -> None:
    taken = sample("orin-jetpack7")
    verdict = judge(target(), taken.machine, {"trtexec": taken.states["trtexec"]})
    assert verdict.will
    assert verdict.notes[0].startswith("trtexec gives actions alone")
    assert judge(target(), taken.machine, taken.states).notes == ()


def test_a_cpu_backend_that_does_not_run_is_not_there() -> None:
    taken = sample("cpu-only")
    broken = {"onnxruntime": State(name="onnxruntime", version="1.29.0", problem="OSError: no libgomp")}
    verdict = judge(target("cpu-x86"), taken.machine, broken)
    assert (verdict.will, check(verdict, "backend").have) == (False, "OSError: no libgomp; no openvino either")


def test_tensorrt_in_the_system_alone_is_reached_by_a_virtual_environment() -> None:
    taken = sample("orin-jetpack6", installed={})
    absent = State(name="tensorrt", missing="tensorrt is not installed", problem="tensorrt is not installed")
    verdict = judge(target(backends=("tensorrt",)), taken.machine, {"tensorrt": absent})
    mend = check(verdict, "backend").mend or ""
    assert "--system-site-packages" in mend
    assert check(verdict, "TensorRT").have == "10.3.0.30"


def test_a_driver_that_does_not_answer_is_told_with_its_reason() -> None:
    taken = sample("x86-rtx4090")
    dead = taken.states["tensorrt-rtx"].model_copy(update={"problem": "no usable NVIDIA driver: error 35"})
    verdict = judge(target("x86-rtx"), taken.machine, {**taken.states, "tensorrt-rtx": dead})
    found = check(verdict, "driver")
    assert (found.holds, found.have) == (False, "580.142: no usable NVIDIA driver: error 35")
    assert verdict.sentence == "this machine builds its engines, and does not run them"


def test_a_target_that_asks_for_a_newer_driver() -> None:
    taken = sample("x86-rtx4090")
    assert judge(target("x86-rtx", driver="580"), taken.machine, taken.states).will
    found = check(judge(target("x86-rtx", driver="595.10"), taken.machine, taken.states), "driver")
    assert (found.holds, found.need) == (False, "NVIDIA's, 595.10 or newer")


def test_memory_that_the_system_keeps_is_no_fault() -> None:
    taken = sample("orin-jetpack6")
    nano = taken.machine.model_copy(update={"memory_mib": 7620})
    assert check(judge(target("jetson-orin-nano"), nano, taken.states), "memory").holds
    small = taken.machine.model_copy(update={"memory_mib": 3620})
    assert check(judge(target("jetson-orin-nano"), small, taken.states), "memory").holds is False


def test_a_machine_that_tells_nothing_is_ready_for_nothing_and_no_error() -> None:
    nothing = Machine(system="Linux", architecture="riscv64", python="3.12.3")
    found = examine_all([target(), target("x86-rtx"), target("cpu-x86")], nothing, {})
    assert [(state.finishes, state.runs) for state in found] == [(False, False)] * 3
    assert not judge(target(), nothing, {}).will


class Failing:
    """A backend that fails at every question."""

    name = "failing"

    def missing(self) -> str | None:
        return None

    def runnable(self) -> str | None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    def version(self) -> str:
        raise EnvironmentProblem("no version")

    def machine(self) -> dict[str, str]:
        raise RuntimeError("CUDA error 35")


def test_a_backend_that_fails_at_a_question_is_one_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failing: Any = Failing()

    def get(name: str) -> Backend:
        backend: Backend = failing
        return backend

    monkeypatch.setattr(backends, "get", get)
    state = probe("failing")
    assert state.problem == "OSError: libnvinfer.so.10: cannot open shared object file"
    assert (state.missing, state.version, state.machine) == (None, None, {})


def test_a_backend_that_cannot_be_imported_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BUILT_IN, "broken", "vlaopt.backends.that_nobody_wrote")
    assert "that_nobody_wrote" in (probe("broken").missing or "")


def test_a_library_that_ends_its_process_is_one_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    states = probe_all()
    assert set(states) == set(backends.names())
    assert states["tensorrt"].problem == "asking it crashed (SIGABRT)"
    assert (states["onnxruntime"].problem, states["reference"].problem) == (None, None)


def test_where_no_process_can_be_started_backends_are_asked_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **more: Any) -> None:
        raise EnvironmentProblem("no temporary folder can be made")

    monkeypatch.setattr(isolated, "run", run)
    assert probe_all(["onnxruntime"])["onnxruntime"].problem is None


def test_an_engine_on_the_disk_is_judged_without_its_recipe(
    publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files], tmp_path: Path
) -> None:
    entry, files = tiny_engine
    made = publish(tmp_path / "here", {**tiny_files, **files}, stage="engine", engine=entry)
    taken = sample("cpu-only")
    assert of_artifacts.judge_artifact(made, taken.machine, taken.states).sentence == "its engine loads here"


def test_native_code_on_the_disk_that_was_not_built_here_is_not_read_and_told(
    publish: Publish,
    tiny_files: Files,
    tiny_engine: tuple[EngineEntry, Files],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "store"))
    entry, files = tiny_engine
    native = entry.model_copy(update={"backend": "tensorrt"})
    made = publish(tmp_path / "there", {**tiny_files, **files}, stage="engine", engine=native)
    taken = sample("orin-jetpack6")
    verdict = of_artifacts.judge_artifact(made, taken.machine, taken.states)
    assert verdict.will
    assert check(verdict, "built by").have == "another machine, as native code"


def test_an_artifact_to_be_finished_without_a_sound_recipe_is_refused(
    publish: Publish, tiny_files: Files, tmp_path: Path
) -> None:
    left = Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="no GPU")
    made = publish(tmp_path / "left", tiny_files, stage="engine", unfinished=left)
    taken = sample("orin-jetpack6")
    with pytest.raises(InputError, match="recipe"):
        of_artifacts.judge_artifact(made, taken.machine, taken.states)
