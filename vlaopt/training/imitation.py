"""Training a policy network on an expert's action chunks, and recovering one that was pruned.

Works on any module called as `module(images, state, tokens)`; knows no policy by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError, StageError
from vlaopt.progress import Progress, Silent, track

Report = Callable[[int, float], None]
"""Called with the step and the mean loss since the last call."""


class Statistics(Protocol):
    """Means and standard deviations, float32 [state] and [action]."""

    @property
    def state_mean(self) -> NDArray[np.float32]: ...
    @property
    def state_std(self) -> NDArray[np.float32]: ...
    @property
    def action_mean(self) -> NDArray[np.float32]: ...
    @property
    def action_std(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Examples:
    """A whole training set in memory, one row per sample.

    images uint8 [N, 3, S, S]; state float32 [N, state] and actions float32 [N, chunk, action], both normalised;
    tokens int64 [N, L].
    """

    images: Tensor
    state: Tensor
    tokens: Tensor
    actions: Tensor

    def __len__(self) -> int:
        return int(self.images.shape[0])


@dataclass(frozen=True)
class Batch:
    """What one step sees: images float32 [B, 3, S, S] in 0..1, the rest as in `Examples`."""

    images: Tensor
    state: Tensor
    tokens: Tensor
    actions: Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random changes that must not change the action."""

    shift_px: int = 2
    brightness: float = 0.15
    contrast: float = 0.2
    tint: float = 0.06
    state_noise: float = 0.02
    """Standard deviation, in standard deviations of the state."""
    word_dropout: float = 0.08
    unknown_token: int = 1


@dataclass(frozen=True)
class LossCurve:
    """Mean training loss over consecutive stretches of steps."""

    steps: tuple[int, ...] = field(default_factory=tuple)
    losses: tuple[float, ...] = field(default_factory=tuple)

    @property
    def final(self) -> float:
        return self.losses[-1] if self.losses else math.nan


def batches(examples: Examples, *, size: int, seed: int, augmentation: Augmentation | None = None) -> Iterator[Batch]:
    """Shuffled batches without end, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(examples))
    while True:
        order = torch.randperm(len(examples), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield _batch(examples, order[start : start + size], augmentation, generator)


def fit(
    module: nn.Module,
    data: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.02,
    warmup: int = 200,
    ema_decay: float = 0.999,
    teacher: nn.Module | None = None,
    teacher_weight: float = 1.0,
    progress: Progress | None = None,
    report: Report | None = None,
    report_every: int = 100,
) -> LossCurve:
    """Train `module` in place: AdamW, cosine schedule, L1 on normalised actions, exponentially averaged weights.

    With a `teacher`, the loss is `(1 - teacher_weight) * L1(expert) + teacher_weight * L1(teacher's chunk)`.
    The module ends in evaluation mode with the averaged weights. Raises StageError when the loss is not finite.
    """
    module.train()
    average = WeightAverage(module, ema_decay)
    optimizer = torch.optim.AdamW(_parameter_groups(module, weight_decay), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps, min(warmup, steps // 10)))
    marks: list[int] = []
    losses: list[float] = []
    window: list[float] = []
    for step in track(progress or Silent(), "train", range(1, steps + 1), steps):
        loss = _loss(module, next(data), teacher, teacher_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(module)
        window.append(float(loss.detach()))
        if not math.isfinite(window[-1]):
            raise StageError(f"training loss is {window[-1]} at step {step}", hint="a lower learning rate")
        if step % report_every == 0 or step == steps:
            marks.append(step)
            losses.append(sum(window) / len(window))
            window.clear()
            if report is not None:
                report(step, losses[-1])
    average.copy_to(module)
    module.eval()
    return LossCurve(tuple(marks), tuple(losses))


def recover(
    module: nn.Module,
    teacher: nn.Module,
    calibration_set: CalibrationSet,
    statistics: Statistics,
    tokenize: Callable[[str], Sequence[int]],
    *,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    teacher_weight: float = 0.7,
    progress: Progress | None = None,
) -> LossCurve:
    """Short training of a pruned `module` toward the `teacher` it came from and the expert's actions, in place."""
    examples = examples_of(calibration_set, statistics, tokenize)
    data = batches(examples, size=batch_size, seed=seed, augmentation=Augmentation())
    teacher.eval()
    return fit(
        module,
        data,
        steps=steps,
        lr=lr,
        ema_decay=0.99,
        warmup=max(1, steps // 20),
        teacher=teacher,
        teacher_weight=teacher_weight,
        progress=progress,
    )


def examples_of(
    calibration_set: CalibrationSet, statistics: Statistics, tokenize: Callable[[str], Sequence[int]]
) -> Examples:
    """The observations and expert chunks of a calibration set as training examples.

    Raises InputError when the set holds no actions.
    """
    if calibration_set.card.action is None:
        raise InputError(
            "the calibration set holds no actions to learn from",
            where=str(calibration_set.path),
            hint="record one with expert actions",
        )
    rows = [calibration_set.observation(index) for index in range(len(calibration_set))]
    images = np.stack([row["observation.images.front"] for row in rows])
    state = np.stack([row["observation.state"] for row in rows])
    tokens = np.array([tokenize(str(row["task"])) for row in rows], dtype=np.int64)
    actions = calibration_set.column("action")
    return Examples(
        images=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        state=torch.from_numpy((state - statistics.state_mean) / statistics.state_std),
        tokens=torch.from_numpy(tokens),
        actions=torch.from_numpy((actions - statistics.action_mean) / statistics.action_std),
    )


def joined(parts: Sequence[Examples]) -> Examples:
    """The rows of all parts, one after the other."""
    return Examples(
        images=torch.cat([part.images for part in parts]),
        state=torch.cat([part.state for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        actions=torch.cat([part.actions for part in parts]),
    )


class WeightAverage:
    """Exponential moving average of a module's parameters and floating buffers (Polyak averaging).

    Starts with a short memory and lengthens it, `min(decay, (1 + n) / (10 + n))`, to forget the random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self._state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        self._updates += 1
        weight = 1.0 - min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, value in module.state_dict().items():  # its tensors are detached
            if value.is_floating_point():
                self._state[name].lerp_(value, weight)
            else:
                self._state[name].copy_(value)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(copy.deepcopy(self._state))


def _loss(module: nn.Module, batch: Batch, teacher: nn.Module | None, teacher_weight: float) -> Tensor:
    predicted = module(batch.images, batch.state, batch.tokens)
    loss = (predicted - batch.actions).abs().mean()
    if teacher is None:
        return loss
    with torch.no_grad():
        target = teacher(batch.images, batch.state, batch.tokens)
    return (1.0 - teacher_weight) * loss + teacher_weight * (predicted - target).abs().mean()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _batch(examples: Examples, rows: Tensor, augmentation: Augmentation | None, generator: torch.Generator) -> Batch:
    images = examples.images[rows]
    state, tokens, actions = examples.state[rows], examples.tokens[rows], examples.actions[rows]
    if augmentation is None:
        return Batch(images.float() / 255.0, state, tokens, actions)
    images = _shift(images, augmentation.shift_px, generator)
    return Batch(
        images=_recolour(images.float() / 255.0, augmentation, generator),
        state=state + augmentation.state_noise * torch.randn(state.shape, generator=generator),
        tokens=_drop_words(tokens, augmentation, generator),
        actions=actions,
    )


def _shift(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels, its edge repeated (random shift, Yarats et al., 2021)."""
    if reach == 0:
        return images
    height, width = images.shape[-2:]
    moves = torch.randint(-reach, reach + 1, (len(images), 2), generator=generator)
    rows = (torch.arange(height) + moves[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[:, 1:]).clamp(0, width - 1)
    index = torch.arange(len(images))
    return images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _recolour(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    def draw(*shape: int) -> Tensor:
        return 2.0 * torch.rand(shape, generator=generator) - 1.0

    count = len(images)
    gain = 1.0 + augmentation.contrast * draw(count, 1, 1, 1) + augmentation.tint * draw(count, 3, 1, 1)
    offset = augmentation.brightness * draw(count, 1, 1, 1)
    return ((images - 0.5) * gain + 0.5 + offset).clamp(0.0, 1.0)


def _drop_words(tokens: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    dropped = (torch.rand(tokens.shape, generator=generator) < augmentation.word_dropout) & (tokens != 0)
    return torch.where(dropped, torch.full_like(tokens, augmentation.unknown_token), tokens)
