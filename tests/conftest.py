"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from vlaopt.isolated import leave_real_time

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("shared machines", deadline=None)
settings.load_profile("shared machines")


@pytest.fixture(autouse=True, scope="module")
def usual_scheduling() -> Iterator[None]:
    """The encoder of LeRobot's videos (SVT-AV1) makes a process of root a real-time one, for all tests after it."""
    yield
    leave_real_time()
