"""Facts made by hand, with the machine that their record was measured on."""

from __future__ import annotations

from typing import Any

from tests.unit.report.figures import made
from vlaopt.benchmark.environment import read_environment
from vlaopt.benchmark.record import BenchRecord
from vlaopt.report.facts import Facts

ENVIRONMENT = read_environment(libraries={"onnxruntime": "1.20"}).model_copy(
    update={"cpu_model": "a CPU", "gpu": None, "governor": None}
)


def record(**changes: Any) -> BenchRecord:
    """A measurement of 600 ticks at 50 Hz with `changes`."""
    whole = made.facts().record
    assert whole is not None
    return whole.model_copy(update={"environment": ENVIRONMENT, **changes})


def facts(**changes: Any) -> Facts:
    """Facts that hold everything, with `changes`."""
    return made.facts(**{"record": record(), "inputs": {"policy.checkpoint": "c" * 64}, **changes})


MISSING = {
    name: f"the reason of {name}"
    for name in ("gates", "error", "record", "forms_how", "examples", "trials", "fits", "inputs")
}


def bare() -> Facts:
    """Facts of an artifact that was exported and no more."""
    return facts(
        record=None,
        record_from=None,
        forms=(),
        forms_how=None,
        gates=(),
        verified_on=None,
        error=None,
        examples=(),
        trials=(),
        fits=(),
        inputs={},
        missing=MISSING,
    )
