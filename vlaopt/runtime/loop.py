"""The loop over a policy's components. Tensors meet by name; loop state is accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlaopt.artifact.policy_spec import AutoregressiveLoop, DiffusionLoop, EulerLoop, PolicySpec, SingleLoop, TensorSpec
from vlaopt.backends import Chaining, Euler, Link, Session
from vlaopt.errors import InputError
from vlaopt.runtime.diffusion import denoised, timesteps
from vlaopt.tensors import Array, check, check_finite

Tap = Callable[[str, dict[str, Array], dict[str, Array]], None]
Steer = Callable[[Array, Array, float], Array]
"""From (state, velocity, time) of an euler step to the velocity that is taken instead."""


def run_loop(
    spec: PolicySpec,
    sessions: Mapping[str, Session],
    tensors: Mapping[str, Array],
    noise: Array | None,
    tap: Tap | None = None,
    *,
    steer: Steer | None = None,
) -> dict[str, Array]:
    """The tensors after the loop by name: `tensors` (the components' inputs) and what components and loop gave.

    `sessions` are called in their order, which is that of `spec.order()`. `noise` is of `noise_shape(spec)`, None where
    its law is none. `tap(component, inputs, outputs)` sees every call; without one, what only components take stays in
    the backend's memory and is not among the result. After an euler, ddim or ddpm loop its state, float32, is the
    tensor called `state_input`; after an autoregressive one its tokens are `tokens_output`. `steer` is for euler loops.
    """
    run = _Run(spec, sessions, tensors, tap)
    loop, late = spec.loop, spec.after_loop()
    early = [name for name in sessions if name != spec.step() and name not in late]
    whole = [*early, *filter(None, [spec.step()]), *late]
    if steer is None and isinstance(loop, SingleLoop | EulerLoop) and run.chain(whole, noise):
        return run.arrays()
    for name in early:
        run.call(name)
    if isinstance(loop, EulerLoop):
        run.tensors[loop.state_input] = _integrate(run, loop, _given(loop, noise), steer)
    elif isinstance(loop, DiffusionLoop):
        run.tensors[loop.state_input] = _denoise(run, loop, _given(loop, noise))
    elif isinstance(loop, AutoregressiveLoop):
        run.tensors[loop.tokens_output] = _decode(run, loop)
    for name in sessions:
        if name in late:
            run.call(name)
    return run.arrays()


def noise_shape(spec: PolicySpec) -> tuple[int, ...]:
    """The shape of the noise that one prediction takes: the spec's, or a ddpm loop's draws stacked (see `Noise`)."""
    if isinstance(spec.loop, DiffusionLoop) and spec.loop.kind == "ddpm":
        return (spec.loop.steps, *spec.noise.shape[1:])
    return spec.noise.shape


def draw_noise(spec: PolicySpec, generator: np.random.Generator) -> Array | None:
    """Fresh noise for one prediction by the spec's law, float32; None where the policy takes none."""
    if spec.noise.law == "none":
        return None
    if spec.noise.law == "normal":
        return generator.standard_normal(noise_shape(spec), dtype=np.float32)
    low, high = np.float32(spec.noise.low), np.float32(spec.noise.high)
    return np.asarray(low + (high - low) * generator.random(noise_shape(spec), dtype=np.float32))


def check_noise(spec: PolicySpec, noise: Array) -> Array:
    """`noise` when it is finite float32 of `noise_shape(spec)`, else InputError."""
    if spec.noise.law == "none":
        raise InputError("noise was given, and this policy takes none")
    return check("noise", noise, dtype="float32", shape=noise_shape(spec))


class _Run:
    """One prediction: the tensors so far, and the components called on them."""

    def __init__(
        self, spec: PolicySpec, sessions: Mapping[str, Session], tensors: Mapping[str, Array], tap: Tap | None
    ) -> None:
        self.tensors: dict[str, Any] = dict(tensors)
        self._loop = spec.loop
        self._components = spec.components
        self._sessions = sessions
        self._tap = tap
        self._resident = {} if tap else _resident(spec, sessions)

    def call(self, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The outputs of component `name`; what the loop has `given` is brought to the dtype and shape it takes."""
        inputs = self._components[name].inputs
        if given:
            self.tensors |= {tensor.name: _as(tensor, given[tensor.name]) for tensor in inputs if tensor.name in given}
        feeds = {tensor.name: self.tensors[tensor.name] for tensor in inputs}
        outputs = self._sessions[name].run(feeds, self._resident.get(name, ()))
        if self._tap:
            self._tap(name, feeds, outputs)
        self.tensors |= outputs
        return outputs

    def chain(self, names: list[str], noise: Array | None) -> bool:
        """Run these components at once, where their sessions can and no tap must see them; whether it was done."""
        first = self._sessions[names[0]]
        alike = all(type(self._sessions[name]) is type(first) for name in names)
        if self._tap or not alike or not isinstance(first, Chaining):
            return False
        given = first.chain(tuple(map(self._link, names)), self.tensors, noise)
        self.tensors |= given or {}
        return given is not None

    def arrays(self) -> dict[str, Array]:
        """The tensors that are on the host."""
        return {name: value for name, value in self.tensors.items() if isinstance(value, np.ndarray)}

    def _link(self, name: str) -> Link:
        loop = self._loop
        euler = _euler(loop) if isinstance(loop, EulerLoop) and name == loop.step else None
        return Link(name, self._sessions[name], frozenset(self._resident.get(name, ())), euler)


def _euler(loop: EulerLoop) -> Euler:
    dt = (loop.end - loop.start) / loop.steps
    # In Python's doubles, then rounded: NumPy 1 and 2 round a float32 scalar times an int differently.
    times = tuple(loop.start + k * dt for k in range(loop.steps))
    return Euler(loop.state_input, loop.time_input, loop.velocity_output, times, dt)


def _integrate(run: _Run, loop: EulerLoop, noise: Array, steer: Steer | None) -> Array:
    state, euler = noise.astype(np.float32), _euler(loop)
    if steer is None and run.chain([loop.step], state):
        integrated: Array = run.tensors[loop.state_input]
        return integrated
    for time in euler.times:
        outputs = run.call(loop.step, {loop.state_input: state, loop.time_input: time})
        velocity: Array = outputs[loop.velocity_output].astype(np.float32, copy=False)
        if steer:
            velocity = steer(state, velocity, time)
        state = state + np.float32(euler.dt) * velocity
    return state


def _denoise(run: _Run, loop: DiffusionLoop, noise: Array) -> Array:
    draws = noise.astype(np.float32)
    state = draws[:1] if loop.kind == "ddpm" else draws
    for k, time in enumerate(timesteps(loop)):
        outputs = run.call(loop.step, {loop.state_input: state, loop.time_input: time})
        prediction = outputs[loop.prediction_output].astype(np.float32, copy=False)
        state = denoised(loop, k, state, prediction, draws[k + 1 : k + 2])
    return state


def _decode(run: _Run, loop: AutoregressiveLoop) -> Array:
    tokens = np.full((1, loop.max_length), loop.end_token, dtype=np.int64)
    token = loop.start_token
    for position in range(loop.max_length):
        outputs = run.call(loop.step, {loop.token_input: token, loop.position_input: position})
        logits: Array = outputs[loop.logits_output]
        check_finite(loop.logits_output, logits)  # the largest of what is not a number would be a token like any other
        token = int(logits.argmax())
        if token == loop.end_token:
            break
        tokens[0, position] = token
        run.tensors |= {taken: outputs[given] for given, taken in loop.cache.items()}
    return tokens


def _as(tensor: TensorSpec, value: Any) -> Array:
    """`value`, an array or one number for all elements, as `tensor` says; a dynamic dimension is 1."""
    if isinstance(value, np.ndarray):
        return value.astype(tensor.dtype, copy=False)
    return np.full([size if isinstance(size, int) else 1 for size in tensor.shape], value, dtype=tensor.dtype)


def _given(loop: EulerLoop | DiffusionLoop, noise: Array | None) -> Array:
    if noise is None:
        raise InputError(f"a loop of kind {loop.kind} starts from noise, and none was given")
    return noise


def _resident(spec: PolicySpec, sessions: Mapping[str, Session]) -> dict[str, list[str]]:
    """Per component, the outputs that only components take, and only such as have the same kind of session."""
    takers: dict[str, set[str]] = {}
    for name, component in spec.components.items():
        for tensor in component.inputs:
            takers.setdefault(tensor.name, set()).add(name)
    if isinstance(spec.loop, AutoregressiveLoop):
        for given, taken in spec.loop.cache.items():
            takers.setdefault(given, set()).update(takers[taken])
    seen = {spec.postprocess.input, *spec.read_by_loop()}
    return {
        name: [
            tensor.name
            for tensor in component.outputs
            if tensor.name in takers
            and tensor.name not in seen
            and all(type(sessions[taker]) is type(sessions[name]) for taker in takers[tensor.name])
        ]
        for name, component in spec.components.items()
    }
