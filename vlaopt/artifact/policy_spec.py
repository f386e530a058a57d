"""PolicySpec: a policy as data. Components, the loop over them, noise, chunk and processors; no code, no weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Spec(BaseModel):
    """Common rules: unknown keys refused, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorSpec(Spec):
    """A named tensor: numpy dtype name and shape; a string in the shape is a named dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Component(Spec):
    """A separately compiled piece of the policy. Tensors meet by name: an output feeds every input called the same."""

    kind: Literal["single", "vision", "prefix", "step", "state", "head", "decode"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class SingleLoop(Spec):
    """Every component once, in order."""

    kind: Literal["single"] = "single"


class EulerLoop(Spec):
    """Flow matching: the other components once, then `step` `steps` times from time `start` to `end`.

    x ← x + dt · velocity with x accumulated in float32, dt = (end − start) / steps, t = start + k · dt for step k.
    """

    kind: Literal["euler"] = "euler"
    steps: int = Field(ge=1)
    start: float
    end: float
    step: str
    state_input: str
    time_input: str
    velocity_output: str


Loop = Annotated[SingleLoop | EulerLoop, Field(discriminator="kind")]


class Noise(Spec):
    """The noise a policy was trained to start from. The wrong law ruins a policy, so it is part of the artifact."""

    law: Literal["none", "normal", "uniform"] = "none"
    shape: tuple[int, ...] = ()
    seed: Literal["fixed", "per-call"] = "per-call"


class Chunk(Spec):
    """Actions given by one prediction, and how many of them are executed before the next."""

    size: int = Field(ge=1)
    n_action_steps: int = Field(ge=1)

    @model_validator(mode="after")
    def _executes_no_more_than_it_has(self) -> Chunk:
        if self.n_action_steps > self.size:
            raise ValueError(f"n_action_steps {self.n_action_steps} is more than the chunk's {self.size}")
        return self


class ImageProcessor(Spec):
    """A camera frame, uint8 HWC or float32 CHW in 0–1, to `output`: float32 [1, 3, height, width] in 0–1."""

    kind: Literal["image"] = "image"
    input: str
    output: str
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class NormaliseProcessor(Spec):
    """A float32 vector to `output` [1, size]: (x − mean) / std, by `<statistics>.mean` and `.std` of the statistics."""

    kind: Literal["normalise"] = "normalise"
    input: str
    output: str
    size: int = Field(ge=1)
    statistics: str


class TokeniseProcessor(Spec):
    """A sentence to `output`: int64 [1, max_length] token ids, by the tokenizer file named `asset`."""

    kind: Literal["tokenise"] = "tokenise"
    input: str
    output: str
    max_length: int = Field(ge=1)
    asset: str


Processor = Annotated[ImageProcessor | NormaliseProcessor | TokeniseProcessor, Field(discriminator="kind")]


class Unnormalise(Spec):
    """The policy's output `input` [1, chunk, action] to the robot's units: x · std + mean, clipped to low … high."""

    kind: Literal["unnormalise"] = "unnormalise"
    input: str
    statistics: str
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _limits_in_order(self) -> Unnormalise:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class PolicySpec(Spec):
    """A whole policy. `gripper` is the index of the action that opens and closes the gripper, None without one."""

    schema_: Literal["vlaopt.policy/1"] = Field(default="vlaopt.policy/1", alias="schema")
    type: str
    action_dim: int = Field(ge=1)
    gripper: int | None = Field(default=None, ge=0)
    control_hz: float = Field(gt=0)
    components: dict[str, Component]
    loop: Loop
    noise: Noise = Noise()
    chunk: Chunk
    preprocess: tuple[Processor, ...]
    postprocess: Unnormalise
    statistics: str = "statistics.safetensors"

    @model_validator(mode="after")
    def _tensors_meet(self) -> PolicySpec:
        if isinstance(self.loop, EulerLoop):
            self._loop_closes(self.loop)
        given = [*self._given(), *(tensor.name for name in self.order() for tensor in self.components[name].outputs)]
        twice = [name for name in given if given.count(name) > 1]
        if twice:
            raise ValueError(f"tensor {min(twice)!r} is given twice")
        if self.postprocess.input not in given:
            raise ValueError(f"nothing gives {self.postprocess.input!r}, which the actions are made from")
        return self

    @model_validator(mode="after")
    def _gripper_is_an_action(self) -> PolicySpec:
        if self.gripper is not None and self.gripper >= self.action_dim:
            raise ValueError(f"gripper {self.gripper} is not one of the {self.action_dim} actions")
        return self

    def _loop_closes(self, loop: EulerLoop) -> None:
        """Raises ValueError unless the loop starts from noise, its step gives the velocity and no other waits."""
        if loop.step not in self.components:
            raise ValueError(f"the loop's step {loop.step!r} is not a component")
        step = self.components[loop.step]
        if loop.velocity_output not in (tensor.name for tensor in step.outputs):
            raise ValueError(f"the loop's step {loop.step!r} does not give {loop.velocity_output!r}")
        if self.noise.law == "none":
            raise ValueError("an euler loop starts from noise, and the noise law is none")
        inside = {loop.state_input, loop.time_input, *(tensor.name for tensor in step.outputs)}
        for name, component in self.components.items():
            late = [tensor.name for tensor in component.inputs if tensor.name in inside]
            if name != loop.step and late:
                raise ValueError(f"component {name!r} takes {late[0]!r}, which only the loop has")

    def order(self) -> list[str]:
        """The components in the order they run: each after those that give its inputs, by name where that is open.

        Raises ValueError when nothing gives an input.
        """
        known, ordered, waiting = set(self._given()), list[str](), sorted(self.components)
        while waiting:
            ready = [name for name in waiting if all(tensor.name in known for tensor in self.components[name].inputs)]
            if not ready:
                missing = [t.name for t in self.components[waiting[0]].inputs if t.name not in known]
                raise ValueError(f"component {waiting[0]!r}: nothing gives its input {missing[0]!r}")
            ordered.append(ready[0])
            waiting.remove(ready[0])
            known |= {tensor.name for tensor in self.components[ready[0]].outputs}
        return ordered

    def _given(self) -> list[str]:
        """The tensors that are there before any component runs."""
        loop = [self.loop.state_input, self.loop.time_input] if isinstance(self.loop, EulerLoop) else []
        return [*(processor.output for processor in self.preprocess), *loop]

    def observation_names(self) -> list[str]:
        """The names an observation must have, in the order of the processors."""
        return list(dict.fromkeys(processor.input for processor in self.preprocess))
