"""The loop over a policy's components. Tensors meet by name; loop state is accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from vlaopt.artifact.policy_spec import EulerLoop, PolicySpec
from vlaopt.backends import Session
from vlaopt.errors import InputError
from vlaopt.tensors import Array, check

Tap = Callable[[str, dict[str, Array], dict[str, Array]], None]


def run_loop(
    spec: PolicySpec,
    sessions: Mapping[str, Session],
    tensors: dict[str, Array],
    noise: Array | None,
    tap: Tap | None = None,
) -> dict[str, Array]:
    """All tensors after the loop: `tensors` (the components' inputs) and every component's outputs, by name.

    `sessions` are called in their order, which is that of `spec.order()`. `noise` has the spec's noise shape, None
    where its law is none. `tap(component, inputs, outputs)` sees every call. After an euler loop its state, float32, is
    the tensor called `state_input`.
    """
    tensors = dict(tensors)
    if not isinstance(spec.loop, EulerLoop):
        for name in sessions:
            _call(spec, sessions, name, tensors, tap)
        return tensors
    loop = spec.loop
    for name in sessions:
        if name != loop.step:
            _call(spec, sessions, name, tensors, tap)
    if noise is None:
        raise InputError("an euler loop starts from noise, and none was given")
    state = noise.astype(np.float32)
    dt = (loop.end - loop.start) / loop.steps
    for k in range(loop.steps):
        tensors[loop.state_input] = state
        # In Python's doubles, then rounded: NumPy 1 and 2 round a float32 scalar times an int differently.
        tensors[loop.time_input] = np.asarray([loop.start + k * dt], dtype=np.float32)
        _call(spec, sessions, loop.step, tensors, tap)
        state = state + np.float32(dt) * tensors[loop.velocity_output].astype(np.float32)
    return {**tensors, loop.state_input: state}


def draw_noise(spec: PolicySpec, generator: np.random.Generator) -> Array | None:
    """Fresh noise by the spec's law, float32; None where the policy takes none."""
    if spec.noise.law == "none":
        return None
    if spec.noise.law == "normal":
        return generator.standard_normal(spec.noise.shape, dtype=np.float32)
    return generator.random(spec.noise.shape, dtype=np.float32)


def check_noise(spec: PolicySpec, noise: Array) -> Array:
    """`noise` when it is finite float32 of the spec's shape, else InputError."""
    if spec.noise.law == "none":
        raise InputError("noise was given, and this policy takes none")
    return check("noise", noise, dtype="float32", shape=spec.noise.shape)


def _call(
    spec: PolicySpec, sessions: Mapping[str, Session], name: str, tensors: dict[str, Array], tap: Tap | None
) -> None:
    feeds = {tensor.name: tensors[tensor.name] for tensor in spec.components[name].inputs}
    outputs = sessions[name].run(feeds)
    if tap:
        tap(name, feeds, outputs)
    tensors.update(outputs)
