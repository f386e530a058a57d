"""Run the eager policy on real observations: its components' calls go to a capture, and are held against the runtime.

Everything the runtime will do around the components is checked here on what the policy really did: its processors, its
loop, which tensor goes where. The components themselves are compared in `vlaopt.policies.portable`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.backends import Port, Value
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import StageError
from vlaopt.policies import EagerPolicy
from vlaopt.progress import Progress, track
from vlaopt.runtime.capture import INDEX, Call, Calls, CaptureIndex, Recorder, pack_sample, sample_path
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.loop import draw_noise, run_loop
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array

NOISE_SEED = 0
FAR = 1e9
"""The difference of what cannot be compared: other shapes, a value that is not a number on one side only."""


@dataclass(frozen=True)
class Captured:
    """What is kept in memory of a capture: golden data, the processors' tensors for it, differences by name.

    `inputs[i]` are what the policy's own processing gives for golden observation i, by name. `differences` are between
    what the runtime gives a component and what the policy gave it, the largest over all observations.
    """

    golden: Golden
    inputs: tuple[dict[str, Array], ...]
    differences: dict[str, float]


def capture(
    eager: EagerPolicy,
    observations: CalibrationSet,
    index: CaptureIndex,
    write: Callable[[str, bytes], None],
    progress: Progress,
) -> Captured:
    """Capture `eager` on the rows of `index`; `write` gets every file by its path. One sample is in memory at a time.

    Raises StageError, naming the component, when it was not called or takes or gives other than its spec says.
    """
    spec, assets = eager.spec, eager.assets()
    processors = Processors(spec, assets.__getitem__)
    noises = draw_noises(spec, len(index.rows))
    write(INDEX, index.model_dump_json(by_alias=True).encode())
    samples, actions, inputs, differences = [], [], [], dict[str, float]()
    for position, row in enumerate(track(progress, "capturing the eager policy", index.rows, len(index.rows))):
        observation, noise = observations.observation(row), noises[position]
        recorder = Recorder(spec)
        chunk = eager.predict_chunk(observation, noise, tap=recorder.tap)
        calls = recorder.calls()
        write(sample_path(position), pack_sample(spec, calls, noise))
        own, ours = preprocessed(eager, observation), processors.prepare(observation)
        for name, value in _differences(spec, calls, own, ours, noise):
            differences[name] = max(value, differences.get(name, 0.0))
        if position in index.golden:
            samples.append(observation)
            actions.append(chunk)
            inputs.append(own)
    drawn = [noise for noise in (noises[position] for position in index.golden) if noise is not None]
    golden = Golden(tuple(samples), np.stack(actions), np.stack(drawn) if drawn else None)
    return Captured(golden, tuple(inputs), differences)


def draw_noises(spec: PolicySpec, count: int) -> list[Array | None]:
    """The noise of `count` recorded predictions, equal for equal arguments; None each for a policy without."""
    generator = np.random.default_rng(NOISE_SEED)
    return [draw_noise(spec, generator) for _ in range(count)]


def preprocessed(eager: EagerPolicy, observation: Mapping[str, Any]) -> dict[str, Array]:
    """What the policy's own processing gives for an observation, as arrays by name."""
    return {name: value.detach().cpu().numpy() for name, value in eager.preprocess(observation).items()}


def difference(mine: Array, reference: Array) -> float:
    """max |mine − reference| / max(1, max |reference|): keys, logits and the like are not of unit size.

    Integers and booleans are equal (0) or not (1). FAR for other shapes and for values that are not finite on one side.
    """
    if mine.shape != reference.shape:
        return FAR
    if reference.dtype.kind != "f":
        return float(not np.array_equal(mine, reference))
    left, right = mine.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(left == right, 0.0, np.abs(left - right))
    finite = np.abs(right[np.isfinite(right)])
    largest = float(apart.max(initial=0.0)) / max(1.0, float(finite.max(initial=0.0)))
    return largest if np.isfinite(largest) else FAR


def _differences(
    spec: PolicySpec, calls: Calls, own: Mapping[str, Array], ours: Mapping[str, Array], noise: Array | None
) -> Iterator[tuple[str, float]]:
    """How far what the runtime gives each component is from what the policy gave it, by input and component.

    The runtime runs its loop over components that give what the policy's gave. What comes from the processors (`ours`)
    is also held against the policy's own processing (`own`).
    """
    replayed = _replay(spec, calls, ours, noise)
    for name, recorded in calls.items():
        if name == spec.step():
            yield f"number of calls of {name}", float(abs(len(recorded) - len(replayed[name])))
        for tensor in (tensor.name for tensor in spec.components[name].inputs):
            pairs = zip(replayed[name], recorded, strict=False)
            found = [difference(given[tensor], call.inputs[tensor]) for given, call in pairs]
            if tensor in ours:
                if tensor not in own:
                    raise StageError(f"component {name}: the policy's own processing gives no {tensor}")
                found.append(difference(ours[tensor], own[tensor]))
            yield f"input {tensor} of {name}", max(found)


def _replay(
    spec: PolicySpec, calls: Calls, tensors: Mapping[str, Array], noise: Array | None
) -> dict[str, list[dict[str, Array]]]:
    """What the runtime feeds to each component, call by call, when they give what was recorded."""
    fed: dict[str, list[dict[str, Array]]] = {name: [] for name in calls}

    def tap(name: str, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        fed[name].append(inputs)

    run_loop(spec, {name: _Recorded(made) for name, made in calls.items()}, tensors, noise, tap)
    return fed


class _Recorded:
    """A session that gives what was recorded, call by call; when asked more often, the last again."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._made = 0

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        call = self._calls[min(self._made, len(self._calls) - 1)]
        self._made += 1
        return dict(call.outputs)
