"""`vlaopt bench`: the figures a person sees, the files a build server reads, the exit code both go by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.unit.cli.conftest import CPU, Cli
from vlaopt.benchmark.environment import read_environment
from vlaopt.benchmark.record import (
    Actions,
    BackToBack,
    BenchRecord,
    BenchSettings,
    Breakdown,
    ColdStart,
    ComponentTime,
    Curve,
    CurvePoint,
    Energy,
    Memory,
    Paced,
    Subject,
    Timeline,
    WakeUp,
)
from vlaopt.benchmark.statistics import Percentile, summarise
from vlaopt.cli import terminal
from vlaopt.cli.record import show_record
from vlaopt.errors import EnvironmentProblem
from vlaopt.runtime.policy import Policy

BENCH = ("--duration", "0.2")


def test_bench_gives_a_verdict_and_keeps_the_record(cli: Cli, artifact: Path, store: Path) -> None:
    told = cli("bench", artifact, *BENCH)
    assert told.code == 0, told.err
    assert told.out.splitlines()[-1].startswith("verdict: ")
    assert len(list((store / "bench").glob("*.json"))) == 1


def test_it_says_what_it_is_doing_on_stderr(cli: Cli, artifact: Path) -> None:
    err = cli("bench", artifact, *BENCH, "--hz", "50").err.splitlines()
    # only where something tells energy, the machine is read at rest
    phases = [line.split(":")[0].split(" for ")[0] for line in err if line != "reading the machine at rest"]
    assert phases == [
        "starting a fresh process",
        "warming up",
        "back-to-back",
        "paced at 50 Hz",
        "taking the chunk apart",
    ]


def test_the_whole_record_is_measured(cli: Cli, artifact: Path) -> None:
    told = cli("bench", artifact, *BENCH, "--with-load", "1", "--sweep", "batch=1,3,3", "--json")
    record = BenchRecord.from_json(json.dumps(told.json["record"]), where="stdout")
    assert record.settings.load == 1
    assert record.cold_start is not None
    assert min(record.cold_start.import_ms, record.cold_start.open_ms, record.cold_start.first_ms) > 0
    assert record.memory.host_mib is None or record.memory.host_mib > 10
    assert record.breakdown is not None
    assert set(record.breakdown.components) == {"policy"}
    assert [(curve.over, [point.value for point in curve.points]) for curve in record.curves] == [("batch", [1, 3])]
    assert record.timeline is not None


def test_bench_tells_what_the_sessions_said_of_how_they_ran(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "told", lambda policy: {"policy": ("as a CUDA graph",)})
    assert "policy ran as a CUDA graph" in cli("bench", artifact, *BENCH).out
    assert cli("bench", artifact, *BENCH, "--json").json["record"]["told"] == {"policy": ["as a CUDA graph"]}


def test_bench_as_json_is_the_record(cli: Cli, artifact: Path) -> None:
    told = cli("bench", artifact, *BENCH, "--hz", "50", "--json", "--assert", "misses>=0")
    assert told.json["record"]["settings"]["hz"] == 50
    assert told.json["assertions"][0]["expression"] == "misses>=0"
    assert told.err.count("\n") <= 1  # whether the assertion held depends on how busy this machine is


def test_a_missed_assertion_is_exit_code_5_and_the_figures_still_come(cli: Cli, artifact: Path) -> None:
    told = cli("bench", artifact, *BENCH, "--assert", "p50_ms<0.000001", "--assert", "verdict!=INVALID")
    assert told.code == 5
    assert "MISSED p50_ms<0.000001" in told.out
    assert "held   verdict!=INVALID" in told.out
    assert told.err.splitlines()[-1].startswith("error: p50_ms<0.000001: measured ")


def test_the_record_is_written_for_other_commands(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "record.json"
    told = cli("bench", artifact, *BENCH, "--record", file, "--json")
    assert told.code == 0, told.err
    record = BenchRecord.from_json(file.read_bytes(), where=str(file))
    assert record.model_dump(mode="json", by_alias=True) == told.json["record"]
    assert file.read_bytes() == record.to_json().encode()


def test_a_build_server_reads_what_failed(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.xml"
    told = cli("bench", artifact, *BENCH, "--junit", file, "--assert", "p50_ms<0.000001", "--assert", "misses>=1e9")
    assert told.code == 5
    suite = ElementTree.parse(file).getroot()[0]
    assert str(suite.get("name")).startswith("linear 1.0.0+")
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed == ["p50_ms<0.000001", "misses>=1e9"]
    assert float(suite.get("time", 0)) > 0.3


def test_an_invalid_run_fails_where_a_build_server_reads_it(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlaopt.stages.bench._worst", lambda artifact: 1e-12)
    rounded = Policy.predict_chunk
    monkeypatch.setattr(Policy, "predict_chunk", lambda policy, *sample: rounded(policy, *sample) + np.float32(1e-3))
    assert cli("bench", artifact, *BENCH).code == 0
    told = cli("bench", artifact, *BENCH, "--junit", tmp_path / "bench.xml")
    assert told.code == 5
    assert told.err.splitlines()[-1].startswith("error: the run is INVALID: actions differ")
    assert ElementTree.parse(tmp_path / "bench.xml").find(".//failure") is not None


def test_clocks_are_locked_only_when_asked_and_only_meanwhile(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    @contextmanager
    def locked() -> Iterator[tuple[str, ...]]:
        happened.append("locked")
        yield ("governor performance",)
        happened.append("restored")

    monkeypatch.setattr("vlaopt.machine.clocks.locked", locked)
    assert cli("bench", artifact, *BENCH).code == 0
    assert happened == []
    told = cli("bench", artifact, *BENCH, "--lock-clocks")
    assert told.err.splitlines()[0] == "locked: governor performance"
    assert happened == ["locked", "restored"]


def test_clocks_that_cannot_be_locked_are_exit_code_3_and_nothing_is_measured(
    cli: Cli, artifact: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked() -> None:
        raise EnvironmentProblem("clocks cannot be locked: Permission denied", hint="run it as root")

    monkeypatch.setattr("vlaopt.machine.clocks.locked", locked)
    told = cli("bench", artifact, *BENCH, "--lock-clocks")
    assert (told.code, told.out) == (3, "")
    assert not (store / "bench").exists()


def test_a_percentile_of_too_few_samples_is_a_dash_with_its_reason(cli: Cli, artifact: Path) -> None:
    told = cli("bench", artifact, *BENCH)
    assert "— paced at " in told.out
    assert "insufficient samples" in told.out
    assert max(map(len, told.out.split("misses:")[0].splitlines())) <= 80


def test_figures_come_even_where_the_store_cannot_be_written(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAOPT_STORE", "/dev/null/store")
    told = cli("bench", artifact, *BENCH)
    assert told.code == 3
    assert "verdict: " in told.out
    assert "cannot be written" in told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--assert", "p99_ms~40"], "is not NAME OPERATOR NUMBER"),
        (["--assert", "p98_ms<40"], "did you mean p9"),
        (["--assert", "component_ms.plicy<40"], "did you mean component_ms.policy?"),
        (["--sweep", "batches=1,2"], "did you mean batch?"),
        (["--sweep", "1,2"], 'write it like "steps=1,2,5"'),
        (["--sweep", "batch=1,0"], "'0' is not a whole number from 1 to 1024"),
        (["--sweep", "batch=1.5"], "'1.5' is not a whole number from 1 to"),
        (["--sweep", "batch=1,1025"], "'1025' is not a whole number from 1 to 1024"),
        (["--sweep", f"batch={'9' * 5000}"], "is not a whole number from 1 to 1024"),
        (["--record", "same.file", "--junit", "./same.file"], "named for the record and for JUnit XML"),
        (["--sweep", "batch="], "'' is not a whole number from 1 to"),
        (["--sweep", "batch=1,,2"], "'' is not a whole number from 1 to"),
        (["--sweep", "batch=²"], "'²' is not a whole number from 1 to"),
        (["--sweep", "batch=1", "--sweep", "batch=2"], "batch is given twice"),
        (["--sweep", "steps=1,2"], "a loop of kind single has no number of steps"),
        (["--with-load", "-1"], "--with-load"),
        (["--with-load", "many"], "--with-load"),
        (["--record", "."], "a folder, not a file to write"),
        (["--set", "bench.hz=50"], "--set: only for a stage that is run by its recipe"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(
    cli: Cli, artifact: Path, arguments: list[str], words: str
) -> None:
    told = cli("bench", artifact, *arguments)
    assert (told.code, told.out) == (2, "")
    assert words in told.err
    assert "paced" not in told.err


@pytest.mark.parametrize("option", ["--record", "--junit"])
def test_nothing_is_written_into_the_artifact(cli: Cli, artifact: Path, option: str) -> None:
    told = cli("bench", artifact, option, artifact / "reports" / "bench.json")
    assert told.code == 2
    assert "lies in the artifact, which never changes once written" in told.err
    assert not (artifact / "reports").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_run(cli: Cli, artifact: Path) -> None:
    told = cli("bench", artifact, "--record", "/dev/null/record.json")
    assert (told.code, told.out) == (3, "")
    assert "cannot be written" in told.err


@pytest.mark.parametrize(
    "option",
    [
        *(["--with-load", "1"], ["--sweep", "steps=1"], ["--record", "r.json"], ["--junit", "j.xml"]),
        *(["--lock-clocks"], ["--assert", "p99_ms<1"], ["--hz", "50"]),
    ],
    ids=lambda option: option[0],
)
def test_options_for_artifacts_are_refused_for_a_recipe(cli: Cli, option: list[str]) -> None:
    told = cli("bench", CPU, *option)
    assert told.code == 2
    assert told.err.startswith(f"error: {option[0]}: for measuring an artifact, not for stage `bench` of a recipe")


def record() -> BenchRecord:
    """Everything known, of a policy in two components with its parts on a GPU."""
    latencies_ms = tuple(10 + index % 7 / 10 for index in range(4700))
    spread = summarise(latencies_ms)
    gpu = {"device_ms": 6.25, "copies_ms": 0.125}
    return BenchRecord(
        subject=Subject(),
        environment=read_environment().model_copy(
            update={"power_mode": "MAXN", "clocks_held": True, "locked": ("governor performance",), "gpu_processes": 2}
        ),
        settings=BenchSettings(hz=50, duration_s=94, load=2),
        verdict="VALID",
        reasons=(),
        warmup_iterations=50,
        paced=Paced(
            latency_ms=spread,
            jitter_ms=0.3,
            deadline_ms=20,
            ticks=4700,
            misses=3,
            miss_rate=3 / 4700,
            dropped=(7,),
            wake_up=WakeUp(p50_us=60, max_us=900),
            samples_ms=latencies_ms,
        ),
        back_to_back=BackToBack(latency_ms=spread, jitter_ms=0.3, throughput_hz=97.1, samples_ms=latencies_ms),
        energy=Energy(joules=0.25, joules_above_idle=0.125, source="ina3221"),
        overhead_us=3.25,
        others_cpu_share=0.01,
        actions=Actions(checked=900, worst_difference=0.25),
        cold_start=ColdStart(import_ms=500, open_ms=300, first_ms=12),
        memory=Memory(host_mib=512, device_mib=None),
        breakdown=Breakdown(
            chunks=200,
            whole_ms=10.0,
            together_ms=9.0,
            components={
                "vision": ComponentTime(calls=1, wall_ms=7.0, **gpu),
                "head": ComponentTime(calls=10, wall_ms=2.5),
            },
            processors_ms=0.4,
            loop_ms=0.1,
        ),
        curves=(
            Curve(
                over="steps",
                points=(
                    CurvePoint(value=1, latency_ms=Percentile(value=2.0, low=1.9, high=2.1), action_error_mean=0.25),
                    CurvePoint(value=10, latency_ms=Percentile(value=None, reason="insufficient samples")),
                ),
            ),
        ),
        timeline=Timeline(
            period_s=0.5,
            seconds=(0.0, 0.5),
            series={
                "clock_mhz.gpu": (1300.5, 1290.0),
                "temperature_c.tj": (None, 71.25),
                **{f"power_w.rail{index}": (5.0, 6.0) for index in range(6)},
            },
            throttling={"over-current": 0.5},
        ),
        told={"vision": ("as a CUDA graph",)},
    )


def test_a_person_sees_all_of_it_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "give_words", terminal.give)
    show_record(record())
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if line.startswith(" ") and ": " not in line]
    assert max(map(len, tables)) <= 80
    said = " ".join(out.split())
    for words in (
        "paced, at 99 % confidence: p50 10.300 … 10.300, p90 10.600 … 10.600",
        "misses: 3 of 4700 ticks past their deadline of 20 ms, 1 dropped; the schedule itself woke 60 µs late at p50",
        "vision 1 7.000 70% 6.250 0.125",
        "head 10 2.500 25% — —",
        "processors 0.400 4% — —",
        "loop 0.100 1% — —",
        "medians of 200 chunks: 10.000 ms part by part, 9.000 ms as the policy normally runs",
        "1 2.000 1.900 … 2.100 0.2500",
        "10 — — —",
        "cold start: 812 ms in a fresh process (library 500, opening 300, first chunk 12)",
        "memory: 512 MiB on the host, not available on the GPU",
        "energy: 250.00 mJ per chunk, 125.00 mJ above the machine at rest (ina3221)",
        "at the start: power mode MAXN, clocks held, locked for this: governor performance, 2 other programs on the",
        "clocks in MHz: gpu 1290–1300",
        "temperature in °C: tj 71.25",
        "power in W: rail0 5–6, rail1 5–6, rail2 5–6, rail3 5–6, 2 more",
        "throttling: over-current (50%)",
        "load: 2 busy beside it",
        "vision ran as a CUDA graph",
        "actions checked: 900, worst difference 0.25 of the tolerance",
        "verdict: VALID",
    ):
        assert words in said


def test_what_is_not_known_is_said_and_never_zero(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {
        "energy": Energy(reason="not available: RAPL counters cannot be read: Permission denied"),
        "cold_start": None,
        "memory": Memory(),
        "breakdown": None,
        "curves": (),
        "timeline": None,
    }
    show_record(record().model_copy(update=unknown))
    out = capsys.readouterr().out
    for words in (
        "cold start: not available",
        "memory: not available on the host, not available on the GPU",
        "energy: not available: RAPL counters cannot be read: Permission denied",
        "clocks, temperature, power: not available",
    ):
        assert words in out
    assert "where a chunk goes" not in out
