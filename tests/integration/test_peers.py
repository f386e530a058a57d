"""`scripts/peers.py` runs every row it is asked for, and a row that fails is told and stops no other."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NO_RECOVERY, ROOT, settings

SCRIPTS = ROOT / "scripts"
ROWS = ("torch", "ort", "ort-static", "openvino", "nncf")
PLANTED = "planted: no such library here"
NAMES = {"torch": "torch eager", "ort": "ONNX Runtime FP32", "openvino": "OpenVINO FP32"}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parts of the script, also for the processes that it starts."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS), str(ROOT)]))
    from peer import report, worker

    return {"report": report, "worker": worker}


def fails() -> None:
    raise ValueError("\nException from a.cpp:1:\nthe reason\nin two lines")


def ends() -> None:
    os._exit(7)


def sleeps() -> None:
    import time

    time.sleep(60)


def gives() -> int:
    return 3


def test_a_process_that_fails_ends_or_hangs_is_told_with_its_reason(peer: Any, tmp_path: Path) -> None:
    worker, log = peer["worker"], tmp_path / "log"
    assert worker.run_once(gives, log=log) == 3
    with pytest.raises(worker.Failed, match=r"^ValueError: the reason in two lines$"):
        worker.run_once(fails, log=log)
    with pytest.raises(worker.Failed, match="ended with exit code 7"):
        worker.run_once(ends, log=log)
    with pytest.raises(worker.Failed, match="no answer within 2 s"):
        worker.run_once(sleeps, log=log, limit_s=2)
    assert "Traceback" in log.read_text()


def test_a_policy_that_vlaopt_cannot_build_is_told_and_left_out(tmp_path: Path) -> None:
    command = [SCRIPTS / "peers.py", "--work", tmp_path, "--json", tmp_path / "measured.json", "--set", "prune.amont=1"]
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "edge-vla is left out: " in done.stderr and "unknown key `amont`" in done.stderr
    assert json.loads((tmp_path / "measured.json").read_text())["subjects"] == []


@pytest.mark.slow
def test_every_row_is_measured_and_a_failing_one_is_told(peer: Any, tmp_path: Path) -> None:
    """With a library that cannot be imported, as on a machine without it."""
    shadow = tmp_path / "shadow/nncf.py"
    shadow.parent.mkdir()
    shadow.write_text(f"raise ImportError({PLANTED!r})")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(shadow.parent), str(ROOT)])}
    written = tmp_path / "measured.json"
    command = [SCRIPTS / "peers.py", "--rows", ",".join(ROWS), "--rounds", "1", "--work", tmp_path, "--json", written]
    arguments = [sys.executable, *map(str, command), *settings(NO_RECOVERY)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(written.read_text())
    assert result["machine"]["cpu"]
    assert result["machine"]["versions"]["onnxruntime"]
    (subject,) = result["subjects"]
    rows = {row["row"]: row for row in subject["rows"]}
    assert set(rows) == {"vlaopt", *ROWS}
    for name, row in rows.items():
        if name == "nncf":
            assert row["failed"] == f"ImportError: {PLANTED}"
            assert f"n/a: ImportError: {PLANTED}" in done.stdout
            continue
        assert row["failed"] is None
        numbers = [*row["rounds_ms"], row["error"]["mean"], row["bytes"], row["peak_mib"], row["build_s"]]
        assert len(row["rounds_ms"]) == len(row["ratios"]) == 1
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        assert row["rounds_ms"][0] > 0 and row["bytes"] > 0
        # Rows of FP32 are the policy itself, and quantized ones are not.
        assert (row["error"]["mean"] < 1e-4) == (name in NAMES)
    assert rows["vlaopt"]["ratios"] == [1.0]
    assert subject["limit"]["gmacs_per_s"] > 1
    for label in NAMES.values():
        assert re.search(rf"^\| {label} \| [\d.]+ \|", done.stdout, re.MULTILINE)

    readme = tmp_path / "README.md"
    report = peer["report"]
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme(result, readme, tmp_path / "peers.svg")
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n![") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text and report.table(subject) in text
    assert "vlaopt" in (tmp_path / "peers.svg").read_text()
