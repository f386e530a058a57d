"""`vlaopt compare`: what a person reads, what a script reads, and what is refused in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.cli.conftest import Cli, write_artifact
from vlaopt.benchmark.record import BenchRecord
from vlaopt.runtime import launch as launching
from vlaopt.runtime.launch import Launch

Record = Callable[..., Path]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> BenchRecord:
    """A record as `vlaopt bench` makes it, of the linear policy."""
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.benchmark.record import BenchSettings
    from vlaopt.progress import Silent
    from vlaopt.stages.bench import bench_artifact

    artifact = Artifact.open(write_artifact(tmp_path_factory.mktemp("made") / "artifact").path)
    settings = BenchSettings(hz=500, duration_s=0.3, back_to_back_s=0.1)
    record = bench_artifact(artifact, settings, Silent())
    return record.model_copy(update={"verdict": "INCONCLUSIVE", "reasons": ("busy machine",)})


@pytest.fixture
def record(measured: BenchRecord, tmp_path: Path) -> Record:
    """Writes a record of a policy that takes so many milliseconds, a hundredth more or less from call to call."""

    def write(name: str, milliseconds: float = 1.0, **parts: Any) -> Path:
        noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(150)
        samples_ms = tuple(np.round(milliseconds * noise, 6).tolist())
        samples = {
            part: getattr(measured, part).model_copy(update={"samples_ms": samples_ms})
            for part in ("paced", "back_to_back")
        }
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(measured.model_copy(update={**samples, **parts}).to_json())
        return path

    return write


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Launches that take what this says, by the artifact's folder; no process is started."""
    latencies: dict[str, float] = {}

    def launch(path: Path, *, calls: int, warmup: int, seed: int = 0, **how: Any) -> Launch:
        latency_ms = latencies.get(path.name, 1.0) * (1 + 0.002 * (seed % 7))
        return Launch(100.0, 50.0, latency_ms, (latency_ms,) * calls, 200.0, None)

    monkeypatch.setattr(launching, "launch", launch)
    return latencies


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_artifact(tmp_path / "before").path, write_artifact(tmp_path / "after").path


def test_an_artifact_against_itself_in_real_processes(cli: Cli, artifact: Path) -> None:
    told = cli("compare", artifact, artifact, "--runs", "10", "--json")
    assert told.code == 0, told.err
    a, b = (told.json["sides"][name] for name in "AB")
    assert len(a["latencies_ms"]["back_to_back"]) == len(b["latencies_ms"]["back_to_back"]) == 10
    assert a["figures"]["host_mib"] > 20
    assert told.json["comparisons"]["B"]["back_to_back"]["ratio"] == pytest.approx(1, abs=0.5)


def test_a_faster_artifact_is_said_to_be(cli: Cli, pair: tuple[Path, Path], launched: dict[str, float]) -> None:
    launched["after"] = 0.5
    told = cli("compare", *pair)
    assert told.code == 0, told.err
    assert told.out.startswith(f"A: {pair[0]}\nB: {pair[1]}\n")
    assert "B is FASTER than A, back-to-back: 2.00 times A's speed; ratio 0.500" in told.out
    assert "compared: 20 launches of each, in turns, each a fresh process" in told.out
    assert "20 launches of each in turns: about" in told.err


def test_what_a_paced_run_knew_stands_beside_the_launches(
    cli: Cli, pair: tuple[Path, Path], launched: dict[str, float]
) -> None:
    before = cli("compare", *pair)
    assert "miss rate" not in before.out
    for artifact in pair:
        assert cli("bench", artifact, "--duration", "0.2").code == 0
    told = cli("compare", *pair)
    assert "miss rate, paced" in told.out
    assert "paced figures and energy: as `vlaopt bench` measured them before" in told.out
    assert "miss rate" not in cli("compare", *pair, "--backend", "onnxruntime").out


def test_each_of_several_is_held_against_the_first(
    cli: Cli, pair: tuple[Path, Path], launched: dict[str, float]
) -> None:
    launched["after"] = 2.0
    told = cli("compare", *pair, pair[0], "--runs", "12")
    assert "B is SLOWER than A" in told.out
    assert "C is the SAME as A within 2 %" in told.out
    assert "B / A" in told.out
    assert "C / A" in told.out


def test_fewer_launches_than_asked_are_said(cli: Cli, pair: tuple[Path, Path], launched: dict[str, float]) -> None:
    launched |= {"before": 2000.0, "after": 2000.0}
    told = cli("compare", *pair, "--seconds", "100")
    assert "10 launches of each (20 would have taken more than 100 s), in turns" in told.out


def test_a_missed_assertion_ends_with_5_and_is_named(
    cli: Cli, pair: tuple[Path, Path], launched: dict[str, float]
) -> None:
    launched["after"] = 1.2
    told = cli("compare", *pair, "--assert", "answer!=SLOWER", "--assert", "ratio<1.5")
    assert told.code == 5
    assert "MISSED B: answer!=SLOWER (measured SLOWER)" in told.out
    assert "held   B: ratio<1.5" in told.out
    assert told.err.splitlines()[-1] == "error: B: answer!=SLOWER: measured SLOWER"


def test_records_are_compared_by_blocks_and_that_is_said(cli: Cli, record: Record) -> None:
    told = cli("compare", record("a.json"), record("b.json", 0.5), "--json")
    assert told.code == 0, told.err
    assert told.json["sides"]["A"]["unit"] == "blocks of one launch"
    assert told.json["comparisons"]["B"]["paced"]["ratio"] == pytest.approx(0.5)
    assert told.json["comparisons"]["B"]["back_to_back"]["ratio"] == pytest.approx(0.5)
    words = cli("compare", record("a.json"), record("b.json"))
    assert "A: one record, by the medians of blocks of its calls" in words.out
    assert (
        "one launch does not tell how launches differ: 1 % is allowed for that, 20 % where it may be wrong" in words.out
    )
    assert "A may be wrong: busy machine" in words.out


def test_folders_of_records_are_launches(cli: Cli, record: Record) -> None:
    for n in range(10):
        record(f"before/{n}.json", 1 + n / 1000)
        record(f"after/{n}.json", 2 + n / 1000)
    folder = record("before/0.json").parent
    told = cli("compare", folder, folder.parent / "after")
    assert told.code == 0, told.err
    assert "B is SLOWER than A, paced" in told.out
    assert "B: records, each a launch, by the medians of their calls" in told.out


def refused(told: Any, code: int = 2) -> str:
    """The one line that says what is wrong; there is never a traceback, and at most a hint beside it."""
    lines: list[str] = told.err.splitlines()
    assert told.code == code, told.err
    assert told.out == ""
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return "\n".join(lines)


def test_wrong_inputs_are_refused_in_one_line(
    cli: Cli, pair: tuple[Path, Path], record: Record, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("[]")
    one = record("a.json")
    record("two/1.json"), record("two/2.json")
    assert "1 given, 2 to 26 can be compared" in refused(cli("compare", pair[0]))
    assert "no such artifact or record" in refused(cli("compare", pair[0], tmp_path / "nowhere"))
    assert "an artifact, and" in refused(cli("compare", pair[0], one))
    assert "neither an artifact nor a folder of records" in refused(cli("compare", one, tmp_path / "empty"))
    assert "not a vlaopt.bench/2 record" in refused(cli("compare", one, tmp_path / "text.json"))
    assert "2 records, 10 are needed" in refused(cli("compare", one, tmp_path / "two"))
    assert "--runs: for launching artifacts" in refused(cli("compare", one, one, "--runs", "10"))
    assert "did you mean ratio?" in refused(cli("compare", *pair, "--assert", "ration<1"))
    assert "answer is not == WORSE" in refused(cli("compare", *pair, "--assert", "answer==WORSE"))
    assert "--runs" in refused(cli("compare", *pair, "--runs", "9"))
    assert "--seconds" in refused(cli("compare", *pair, "--seconds", "nan"))
    assert "unknown backend 'fast'" in refused(cli("compare", *pair, "--backend", "fast"))


def test_one_launch_is_held_against_many(cli: Cli, record: Record) -> None:
    for n in range(10):
        record(f"many/{n}.json", 1 + n / 1000)
    new = record("new.json", 5.0)
    told = cli("compare", new.parent / "many", new, "--assert", "answer!=SLOWER")
    assert told.code == 5
    assert "A: records, each a launch" in told.out
    assert "B: one record, by the medians of blocks" in told.out


def test_unlike_records_are_refused_by_what_differs(cli: Cli, record: Record, measured: BenchRecord) -> None:
    one = record("a.json")
    other = measured.environment.model_copy(update={"cpu_model": "another"})
    assert "different environments: cpu_model" in refused(cli("compare", one, record("b.json", environment=other)))
    invalid = record("c.json", verdict="INVALID", reasons=("the CPU throttled 3 times",))
    assert "INVALID: the CPU throttled 3 times" in refused(cli("compare", one, invalid))


def test_artifacts_of_different_policies_are_refused(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    other = write_artifact(tmp_path / "other", off_by=1.0).path
    assert "different policies: their golden actions differ" in refused(cli("compare", artifact, other))


def test_a_terminal_of_80_columns_shows_whole_words(
    cli: Cli, pair: tuple[Path, Path], launched: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    cli("compare", *pair, pair[1], "--runs", "10")
    shown = [line for line in screen.getvalue().splitlines() if not line.startswith(("A: ", "B: ", "C: "))]
    assert max(len(line) for line in shown) <= 80
    assert "peak memory, MiB" in screen.getvalue()


def test_json_is_json_whatever_is_not_known(cli: Cli, pair: tuple[Path, Path], launched: dict[str, float]) -> None:
    told = cli("compare", *pair, "--json", "--assert", "ratio.device_mib<2")
    assert told.code == 5
    assert json.loads(told.out)["assertions"]["B"][0] == {
        "expression": "ratio.device_mib<2",
        "measured": None,
        "ok": False,
        "reason": "not available",
    }
