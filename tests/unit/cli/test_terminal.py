"""What a person at a terminal sees: what is at work, how far it is, what is done."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from vlaopt.cli import bars, terminal
from vlaopt.cli.bars import drawn
from vlaopt.cli.summary import show_summary
from vlaopt.summary import Row, Summary


def shown(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=width, color_system=None), stream


def test_whole_work_leaves_a_line_and_its_pieces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SLOW_S", -1.0)
    console, stream = shown()
    with drawn(console) as progress, progress.task("2/7 prune"), progress.task("train", 200):
        pass
    assert "2/7 prune: 0.0 s" in stream.getvalue()
    assert "train: " not in stream.getvalue()
    assert "0/200" in stream.getvalue()


def test_work_that_failed_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SLOW_S", -1.0)
    console, stream = shown()
    with pytest.raises(ValueError, match="broken"), drawn(console) as progress, progress.task("prune"):
        raise ValueError("broken")
    assert "prune: " not in stream.getvalue()


def test_nothing_is_drawn_while_something_is_measured() -> None:
    console, stream = shown()
    with drawn(console) as progress, progress.task("bench"), progress.still() as say:
        say("paced at [20] Hz")
        drawn_before = stream.getvalue()
        time.sleep(0.3)  # bars are drawn ten times a second
        assert stream.getvalue() == drawn_before
        assert drawn_before.rstrip().endswith("paced at [20] Hz")
    assert stream.getvalue() != drawn_before


def test_a_task_of_unknown_length_counts_nothing() -> None:
    console, stream = shown()
    with drawn(console) as progress, progress.task("[pruning]"):
        pass
    assert "[pruning]" in stream.getvalue()
    assert "/?" not in stream.getvalue()


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_sentences_end_their_lines_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Tty()
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.give_words("action error: " + "standard deviations " * 6)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 60 for line in lines)
    assert stream.getvalue().split() == ("action error: " + "standard deviations " * 6).split()


def test_a_table_in_a_file_has_no_blanks_at_the_ends_of_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table = terminal.table("name", "value")
    table.add_row("a", "1")
    terminal.give_table(table)
    assert all(line == line.rstrip() for line in capsys.readouterr().out.splitlines())


def summary(path: Path, **changes: object) -> Summary:
    """A build whose every cell is as wide as cells get."""
    forms = ("eager", "FP32 ONNX", "pruned", "quantized", "engine")
    names = ("torch", "onnxruntime", "onnxruntime", "onnxruntime", "tensorrt-rtx")
    rows = tuple(
        Row(
            form=form,
            backend=name,
            bytes=473_000_000,
            latency_ms=None if form == "engine" else 12.34,
            action_error_mean=0.0238,
            action_error_max=0.2679,
        )
        for form, name in zip(forms, names, strict=True)
    )
    fields = dict.fromkeys(Summary.model_fields)
    known = {
        "name": "edge-vla",
        "version": "1.0.0+910601976b2d",
        "target": "x86-rtx",
        "path": str(path),
        "rows": rows,
        "components": {},
        "candidates_ms": {},
        "refused": {},
        "precisions": {},
        "gates": [],
        "verified_on": "verified",
        "ran": (),
        "seconds": 0.0,
        "how": "p50",
    }
    return Summary.model_validate({**fields, **known, **changes})


def test_the_table_of_a_build_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary(tmp_path), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines[: lines.index("latency: p50")]) <= 80
    assert lines[-1] == str(tmp_path)


def test_a_busy_machine_is_told_beside_its_latencies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary(tmp_path, busy="others took 43% of the CPU time"), as_json=False)
    assert "busy machine: others took 43% of the CPU time" in capsys.readouterr().out


def test_a_build_says_how_long_it_took_and_how_much_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary(tmp_path, ran=("onnx", "engine"), seconds=83.4, peak_memory_mib=2560.0), as_json=False)
    show_summary(summary(tmp_path, seconds=2.2), as_json=False)
    told = capsys.readouterr().out.splitlines()
    assert told[told.index("ran onnx, engine") + 1] == "the build took 83 s; peak memory 2.50 GiB"
    assert (
        told[told.index("nothing to do, all stages were stored") + 1]
        == "the build took 2 s; peak memory not known here"
    )
