"""How far optimised actions are from reference actions, in the units a robot feels. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlaopt.errors import InputError
from vlaopt.tensors import Array, check_finite

JERK_FLOOR = 1e-4
"""Standard deviations. The jerk of a reference that stands still is rounding, and no measure of anything."""


@dataclass(frozen=True)
class ErrorStatistics:
    """Mean, 95th percentile (nearest rank) and maximum of absolute errors."""

    mean: float
    p95: float
    max: float


@dataclass(frozen=True)
class ActionError:
    """Optimised against reference chunks, on the same observations and noise.

    Errors are absolute differences divided by the action's standard deviation in training, so 1.0 is one standard
    deviation. `executed` looks at the first `n_action_steps` of each chunk, `chunk` at all of it.
    """

    samples: int
    executed: ErrorStatistics
    chunk: ErrorStatistics
    per_action: tuple[ErrorStatistics, ...]
    """Over executed steps, one per degree of freedom."""
    gripper_flips: float | None
    """Fraction of executed steps whose gripper command has the other sign; None without a gripper."""
    gripper_bias: float | None
    """Mean signed difference of the executed gripper command, in standard deviations."""
    jerk: float
    """Relative change of the mean absolute third difference along the chunk, never relative to less than JERK_FLOOR:
    0.05 is 5 % more jerk."""
    max_abs: float
    """Largest absolute difference anywhere, in the robot's units."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ActionError:
        """What `to_json` gave."""
        parts = {name: ErrorStatistics(**value[name]) for name in ("executed", "chunk")}
        per_action = tuple(ErrorStatistics(**dof) for dof in value["per_action"])
        return cls(**{**value, **parts, "per_action": per_action})


def compare_actions(
    actions: Array, reference: Array, *, std: Array, n_action_steps: int, gripper: int | None
) -> ActionError:
    """`actions` and `reference`, both float [samples, chunk, action_dim]; `std` [action_dim], the errors' unit.

    Raises InputError for shapes that differ, no samples, and values that are not finite: a NaN among many good numbers
    would not show in a percentile.
    """
    if actions.shape != reference.shape:
        raise InputError(f"actions have shape {list(actions.shape)}, their reference {list(reference.shape)}")
    if actions.size == 0:
        raise InputError("no actions to compare")
    check_finite("actions", actions)
    check_finite("reference actions", reference)
    actions, reference = actions.astype(np.float64), reference.astype(np.float64)
    difference = (actions - reference) / std
    executed = difference[:, :n_action_steps]
    flips = bias = None
    if gripper is not None:
        mine, theirs = actions[:, :n_action_steps, gripper], reference[:, :n_action_steps, gripper]
        flips = float(np.mean(np.sign(mine) != np.sign(theirs)))
        bias = float(np.mean(executed[..., gripper]))
    return ActionError(
        samples=len(actions),
        executed=_statistics(executed),
        chunk=_statistics(difference),
        per_action=tuple(_statistics(executed[..., dof]) for dof in range(actions.shape[-1])),
        gripper_flips=flips,
        gripper_bias=bias,
        jerk=_relative(_jerk(actions / std), _jerk(reference / std)),
        max_abs=float(np.abs(actions - reference).max()),
    )


def executed_errors(actions: Array, reference: Array, *, std: Array, n_action_steps: int) -> Array:
    """The mean absolute error of the executed steps of each chunk, [samples]. Takes what `compare_actions` takes."""
    difference = (actions.astype(np.float64) - reference.astype(np.float64)) / std
    errors: Array = np.abs(difference[:, :n_action_steps]).mean(axis=(1, 2))
    return errors


def _statistics(difference: Array) -> ErrorStatistics:
    errors = np.sort(np.abs(difference), axis=None)
    rank = int(np.ceil(0.95 * errors.size)) - 1
    return ErrorStatistics(mean=float(errors.mean()), p95=float(errors[rank]), max=float(errors[-1]))


def _jerk(chunks: Array) -> float:
    """Mean absolute third difference along time; 0 for chunks shorter than four."""
    return float(np.abs(np.diff(chunks, n=3, axis=1)).mean()) if chunks.shape[1] > 3 else 0.0


def _relative(value: float, reference: float) -> float:
    return (value - reference) / max(reference, JERK_FLOOR)


@dataclass(frozen=True)
class Limit:
    """A gate on one measured value: missed when the value is above `limit`."""

    name: str
    value: float
    limit: float

    @property
    def held(self) -> bool:
        """Whether the value is within the limit; a value that is not a number is not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} (limit {self.limit:.4g})"
