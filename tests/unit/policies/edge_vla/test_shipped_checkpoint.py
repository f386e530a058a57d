"""The reference checkpoint that ships: small, documented, and close to the expert on observations it has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlaopt.calibration import CalibrationSet
from vlaopt.policies.edge_vla.checkpoint import load_checkpoint
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy
from vlaopt.sim import CAMERA, CONTROL_HZ, TASKS

ROOT = Path(__file__).parents[4]
CHECKPOINT = ROOT / "recipes" / "edge-vla" / "checkpoint"


@pytest.fixture(scope="module")
def shipped() -> EdgeVLAPolicy:
    return load_checkpoint(CHECKPOINT)


def test_is_at_most_eight_megabytes() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8e6


def test_says_how_it_was_made_and_what_it_can_do(shipped: EdgeVLAPolicy) -> None:
    config = shipped.module.config
    assert config.tasks == tuple(task.name for task in TASKS)
    assert config.camera.model_dump() == CAMERA
    assert config.control_hz == CONTROL_HZ
    assert config.provenance is not None
    assert set(config.provenance.success) == {*config.tasks, "total"}


def test_is_close_to_the_expert_on_held_out_observations(shipped: EdgeVLAPolicy) -> None:
    held_out = CalibrationSet.open(ROOT / "calibration" / "metaworld-held-out")
    steps = shipped.module.config.n_action_steps
    errors = [
        np.abs(shipped.predict_chunk(held_out.observation(index))[:steps] - held_out.action(index)[:steps])
        / shipped.statistics.action_std
        for index in range(0, len(held_out), 4)
    ]
    assert float(np.mean(errors)) < 0.25


def test_a_word_changes_where_the_hand_goes(shipped: EdgeVLAPolicy) -> None:
    held_out = CalibrationSet.open(ROOT / "calibration" / "metaworld-held-out")
    index = next(index for index in range(len(held_out)) if "faucet" in held_out.observation(index)["task"])
    observation = held_out.observation(index)
    opened, closed = (
        shipped.predict_chunk({**observation, "task": f"{verb} the faucet"}) for verb in ("open", "close")
    )
    assert np.abs(opened - closed).max() > 0.3
