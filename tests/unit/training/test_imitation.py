"""Training learns, repeats, stops on nonsense, and can follow a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlaopt.calibration import CalibrationSet, write_calibration_set
from vlaopt.errors import InputError, StageError
from vlaopt.training.imitation import (
    Augmentation,
    Examples,
    WeightAverage,
    batches,
    examples_of,
    fit,
    joined,
    recover,
)


class Linear(nn.Module):
    """The least a policy network can be: two actions of four numbers, linear in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, images: Tensor, state: Tensor, tokens: Tensor) -> Tensor:
        chunk: Tensor = self.layer(state)
        return chunk.reshape(-1, 2, 4)


class Stats:
    state_mean = np.full(4, 0.5, np.float32)
    state_std = np.full(4, 2.0, np.float32)
    action_mean = np.zeros(4, np.float32)
    action_std = np.full(4, 0.5, np.float32)


def examples(count: int = 64) -> Examples:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(count, 4, generator=generator)
    return Examples(
        images=torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator),
        state=state,
        tokens=torch.randint(2, 9, (count, 5), generator=generator),
        actions=torch.stack([state, -state], dim=1),
    )


def trained(seed: int = 0, **options: Any) -> tuple[Linear, float]:
    torch.manual_seed(seed)
    module = Linear()
    curve = fit(module, batches(examples(), size=16, seed=seed), steps=120, lr=5e-2, ema_decay=0.9, **options)
    return module, curve.final


def set_with_actions(path: Path, *, actions: bool = True) -> CalibrationSet:
    rng = np.random.default_rng(0)
    rows = [
        {
            "observation.images.front": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
            "observation.state": rng.normal(size=4).astype(np.float32),
            "task": "go",
        }
        for _ in range(10)
    ]
    return write_calibration_set(
        path,
        rows,
        [rng.normal(size=(2, 4)).astype(np.float32) for _ in rows] if actions else None,
        episodes=[0] * 10,
        steps=list(range(10)),
        name="test",
        description="",
        source="",
        licence="Apache-2.0",
        created_by="",
        seed=0,
    )


def test_training_learns() -> None:
    module, loss = trained()
    assert loss < 0.1
    assert not module.training


def test_the_same_seed_trains_the_same_weights() -> None:
    torch.testing.assert_close(trained()[0].state_dict(), trained()[0].state_dict(), rtol=0, atol=0)


def test_the_loss_is_reported_as_it_falls() -> None:
    marks: list[tuple[int, float]] = []
    trained(report=lambda step, loss: marks.append((step, loss)), report_every=50)
    assert [step for step, _ in marks] == [50, 100, 120]
    assert marks[-1][1] < marks[0][1]


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    data = examples()
    data.actions[:] = float("nan")
    with pytest.raises(StageError, match="training loss is nan at step 1"):
        fit(Linear(), batches(data, size=8, seed=0), steps=3, lr=1e-3)


def test_a_student_follows_its_teacher_rather_than_the_expert() -> None:
    teacher, student = Linear().eval(), Linear()
    fit(student, batches(examples(), size=16, seed=0), steps=300, lr=3e-2, ema_decay=0.9, teacher=teacher)
    data = examples()
    with torch.inference_mode():
        gap = student(data.images, data.state, data.tokens) - teacher(data.images, data.state, data.tokens)
    assert gap.abs().mean() < 0.05


def test_recovery_brings_a_damaged_network_closer_to_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recorded = set_with_actions(tmp_path / "set")
    teacher, student = Linear(), Linear()
    data = examples_of(recorded, Stats(), lambda text: [2, 3])

    def gap() -> float:
        with torch.inference_mode():
            pair = [module(data.images, data.state, data.tokens) for module in (student, teacher)]
        return float((pair[0] - pair[1]).abs().mean())

    before = gap()
    curve = recover(
        student, teacher, recorded, Stats(), lambda text: [2, 3], steps=150, lr=2e-2, seed=0, teacher_weight=1.0
    )
    assert gap() < 0.5 * before
    assert curve.steps == (100, 150)


def test_recovery_needs_actions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no actions to learn from"):
        examples_of(set_with_actions(tmp_path / "set", actions=False), Stats(), lambda text: [2])


def test_examples_are_normalised(tmp_path: Path) -> None:
    recorded = set_with_actions(tmp_path / "set")
    data = examples_of(recorded, Stats(), lambda text: [2, 3])
    np.testing.assert_allclose(data.state[3], (recorded.observation(3)["observation.state"] - 0.5) / 2.0, rtol=1e-6)
    np.testing.assert_allclose(data.actions[3], recorded.action(3) / 0.5, rtol=1e-6)
    np.testing.assert_array_equal(data.images[3].permute(1, 2, 0), recorded.observation(3)["observation.images.front"])
    assert len(joined([data, data])) == 20


def test_every_sample_is_seen_once_before_any_is_seen_twice() -> None:
    data = examples(24)
    stream = batches(data, size=8, seed=4)
    seen = torch.cat([next(stream).state for _ in range(3)])
    assert len({tuple(row.tolist()) for row in seen}) == 24


def test_augmentation_keeps_shapes_ranges_and_actions() -> None:
    data = examples(16)
    batch = next(batches(data, size=16, seed=1, augmentation=Augmentation(word_dropout=0.5)))
    assert batch.images.shape == (16, 3, 8, 8) and batch.images.dtype == torch.float32
    assert float(batch.images.min()) >= 0 and float(batch.images.max()) <= 1
    assert set(map(tuple, batch.actions.reshape(16, -1).tolist())) == set(
        map(tuple, data.actions.reshape(16, -1).tolist())
    )
    assert (batch.tokens == 1).any()


def test_a_shift_moves_the_whole_image() -> None:
    data = examples(16)
    still = Augmentation(brightness=0, contrast=0, tint=0, state_noise=0, word_dropout=0)
    batch = next(batches(data, size=16, seed=1, augmentation=still))
    plain = next(batches(data, size=16, seed=1))
    for moved, image in zip(batch.images, plain.images, strict=True):
        windows = [
            torch.allclose(moved[:, 2:6, 2:6], image[:, 2 + y : 6 + y, 2 + x : 6 + x], atol=1e-6)
            for y in range(-2, 3)
            for x in range(-2, 3)
        ]
        assert any(windows)


def test_averaged_weights_lie_between_the_old_and_the_new() -> None:
    module = Linear()
    average = WeightAverage(module, decay=0.5)
    before = module.layer.weight.detach().clone()
    with torch.no_grad():
        module.layer.weight += 1.0
    average.update(module)
    average.copy_to(module)
    assert ((module.layer.weight > before) & (module.layer.weight < before + 1.0)).all()
