"""The modes of normalisation: what the robot measures to what a policy was trained on, and back. All in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlaopt.artifact.policy_spec import Mode
from vlaopt.errors import InputError
from vlaopt.tensors import Array, check

_ONE = np.float32(1)
_ENDS = {"min-max": ("min", "max"), "quantiles": ("q01", "q99"), "quantiles-10": ("q10", "q90")}


@dataclass(frozen=True)
class Normalisation:
    """(x − origin) / divisor · gain − shift, and back (y + shift) / gain · span + origin.

    `divisor` and `span` are the same but for eps: LeRobot adds it to a deviation only where it divides.
    """

    origin: Array
    divisor: Array
    span: Array
    gain: np.float32
    shift: np.float32

    def apply(self, values: Array) -> Array:
        """`values`, float32 […, size], in the policy's units; changed in place."""
        values -= self.origin
        values /= self.divisor
        if self.gain != 1:
            values *= self.gain
            values -= self.shift
        return values

    def undo(self, values: Array) -> Array:
        """`values`, float32 […, size], in the robot's units; a new array."""
        return (values + self.shift) / self.gain * self.span + self.origin


class Statistics:
    """The tensors of a statistics file: `<name>.mean`, `.std`, `.min`, `.max`, `.q01` …, each float32 [size]."""

    def __init__(self, tensors: Mapping[str, Array], *, where: str) -> None:
        self._tensors = tensors
        self._where = where

    def input(self, name: str, mode: Mode, eps: float, size: int) -> Normalisation | None:
        """How the input called `name` is normalised; None for mode `identity`.

        Raises InputError for statistics that are missing, misshapen, not finite, out of order, or divide by 0.
        """
        law = self._law(name, mode, eps, size)
        if law is not None and not (law.divisor > 0).all():
            key = f"{name}.std" if mode == "mean-std" else f"{name}.{_ENDS[mode][1]}"
            raise InputError(f"{key}: nothing to divide by at {_first(law.divisor <= 0)}", where=self._where)
        return law

    def action(self, name: str, mode: Mode, eps: float, size: int) -> Normalisation | None:
        """As `input`, for actions: `apply` is the opposite of `undo`, without eps.

        Actions are multiplied, so a span of 0 stands: an action that never changes, and has one value only.
        """
        law = self._law(name, mode, eps, size)
        if law is None:
            return None
        return Normalisation(law.origin, np.where(law.span > 0, law.span, _ONE), law.span, law.gain, law.shift)

    def deviation(self, name: str, size: int) -> Array:
        """`<name>.std`, not negative, float32 [size]."""
        std = self._get(f"{name}.std", size)
        if (std < 0).any():
            raise InputError(f"{name}.std: negative at {_first(std < 0)}", where=self._where)
        return std

    def _law(self, name: str, mode: Mode, eps: float, size: int) -> Normalisation | None:
        if mode == "identity":
            return None
        if mode == "mean-std":
            mean, std = self._get(f"{name}.mean", size), self.deviation(name, size)
            return Normalisation(mean, std + np.float32(eps), std, gain=_ONE, shift=np.float32(0))
        low_key, high_key = (f"{name}.{end}" for end in _ENDS[mode])
        low, high = self._get(low_key, size), self._get(high_key, size)
        if (high < low).any():
            raise InputError(f"{high_key}: below {low_key} at {_first(high < low)}", where=self._where)
        span = np.where(high == low, np.float32(eps), high - low)
        return Normalisation(low, span, span, gain=np.float32(2), shift=_ONE)

    def _get(self, key: str, size: int) -> Array:
        if key not in self._tensors:
            raise InputError(f"no {key} among the statistics", where=self._where)
        return check(key, self._tensors[key], dtype="float32", shape=(size,))


def _first(places: Array) -> int:
    return int(np.argmax(places))
