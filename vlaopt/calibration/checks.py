"""What makes a calibration set useless for a policy, found before a calibrator turns it into wrong scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.images import is_image
from vlaopt.errors import InputError
from vlaopt.hashing import digest_bytes
from vlaopt.tensors import Array

if TYPE_CHECKING:
    from vlaopt.calibration.reading import CalibrationSet

MINIMUM_SAMPLES = 8
OUTLIER_ABSOLUTE = 1e6
"""No position, angle, force or pixel of a robot in SI units comes near this."""
OUTLIER_RATIO = 1e4
"""A value this many times the feature's 99th percentile of |x| would leave an 8-bit scale nothing for the others."""
Expected = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a policy needs: feature name to dtype name and shape of one sample; `("string", ())` for text."""


def check(samples: CalibrationSet, expected: Expected, minimum_samples: int = MINIMUM_SAMPLES) -> None:
    """Refuse a set that a calibrator could not use for the policy that needs `expected`.

    Raises InputError, by feature and sample, for: a feature missing or of another dtype, shape or layout; fewer
    than `minimum_samples`; values that are NaN, infinite, above `OUTLIER_ABSOLUTE` or above `OUTLIER_RATIO` times
    the feature's 99th percentile of |x|; float images beyond 0..1; a feature that never changes; damaged images.
    """
    for problem in find_problems(samples, expected, minimum_samples):
        raise problem


def find_problems(
    samples: CalibrationSet, expected: Expected, minimum_samples: int = MINIMUM_SAMPLES
) -> Iterator[InputError]:
    """Everything that `check` would refuse, one by one, at most one of each kind for a feature."""
    fitting = []
    for name, (dtype, shape) in expected.items():
        if problem := _found(partial(_check_feature, samples, name, dtype, shape)):
            yield problem
        elif name != TASK:
            fitting.append(name)
    if len(samples) < minimum_samples:
        yield _problem(samples, f"{len(samples)} samples, at least {minimum_samples} are needed", "record more")
    for name in fitting:
        if problem := _found(partial(_check_values, samples, name, picture=is_image(*expected[name]))):
            yield problem
    if samples.card.action is not None:
        actions = samples.column("action")
        if problem := _found(partial(_check_finite, samples, "action", actions)):
            yield problem


def _found(check: Callable[[], None]) -> InputError | None:
    try:
        check()
    except InputError as problem:
        return problem
    return None


def _check_feature(samples: CalibrationSet, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    had = samples.card.observation.get(name)
    if had is None:
        raise _problem(
            samples,
            f"has no {name!r}, which the policy needs; it has {', '.join(sorted(samples.card.observation))}",
            "it was recorded for another policy or other cameras",
        )
    accepted = [(dtype, shape)]
    if is_image(dtype, shape):
        accepted.append(("float32", (*shape[:-3], 3, *shape[-3:-1])))
    if (had.dtype, had.shape) in accepted:
        return
    needed = " or ".join(f"{kind} {list(sizes)}" for kind, sizes in accepted)
    hint = "record it as the policy sees it"
    if had.dtype == "float64":
        hint = "convert it to float32"
    elif had.shape == shape[1:] or shape == had.shape[1:]:
        hint = "the policy looks back another number of steps: vlaopt calibration make --history"
    elif sorted(had.shape) == sorted(shape) and len(shape) in (3, 4):
        hint = "the channels are on the wrong side: uint8 images are height, width, 3; float32 ones 3, height, width"
    raise _problem(samples, f"{name} is {had.dtype} {list(had.shape)}, the policy needs {needed}", hint)


def _check_values(samples: CalibrationSet, name: str, *, picture: bool) -> None:
    feature = samples.card.observation[name]
    if feature.encoding == "png":
        frames = [digest_bytes(samples.observation(index)[name].tobytes()) for index in range(len(samples))]
        constant = len(set(frames)) == 1
    else:
        values = samples.column(name)
        _check_finite(samples, name, values)
        _check_outliers(samples, name, values)
        if picture and values.dtype.kind == "f":
            _check_unit_range(samples, name, values)
        constant = bool((values == values[0]).all())
    if constant and len(samples) > 1:
        raise _problem(
            samples,
            f"{name} is the same in all {len(samples)} samples",
            "record while the robot moves, or leave it out",
        )


def _check_finite(samples: CalibrationSet, name: str, values: Array) -> None:
    if values.dtype.kind != "f":
        return
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        index = int(np.argmax(bad))
        kind = "NaN" if np.isnan(values[index]).any() else "infinity"
        raise _problem(samples, f"{name} holds {kind} at sample {index}", "drop that sample or record it again")


def _check_outliers(samples: CalibrationSet, name: str, values: Array) -> None:
    peaks = np.abs(values.reshape(len(values), -1).astype(np.float64)).max(axis=1)
    usual = float(np.percentile(np.abs(values.astype(np.float64)), 99, method="lower"))
    limit = min(OUTLIER_ABSOLUTE, OUTLIER_RATIO * usual) if usual > 0 else OUTLIER_ABSOLUTE
    if (peaks > limit).any():
        index = int(np.argmax(peaks > limit))
        raise _problem(
            samples,
            f"{name} reaches {peaks[index]:.3g} at sample {index}, 99 % of it stays below {usual:.3g}",
            "one such value ruins every scale: drop that sample or record it again",
        )


def _check_unit_range(samples: CalibrationSet, name: str, values: Array) -> None:
    low, high = values.reshape(len(values), -1).min(axis=1), values.reshape(len(values), -1).max(axis=1)
    bad = (low < -1e-3) | (high > 1 + 1e-3)
    if bad.any():
        index = int(np.argmax(bad))
        raise _problem(
            samples,
            f"{name} spans {low[index]:.3g} to {high[index]:.3g} at sample {index}, float images are 0 to 1",
            "divide by 255, or record uint8",
        )


def _problem(samples: CalibrationSet, message: str, hint: str) -> InputError:
    return InputError(message, where=str(samples.path), hint=hint)
