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


class DiffusionLoop(Spec):
    """Denoising: the other components once, then `step` at `steps` timesteps, evenly spaced from noise to none.

    `alphas_cumprod` has one value per timestep of the training, T in all; with r = T // steps the timesteps are
    (steps − 1) · r, …, r, 0 (spacing "leading"). `ddim` is deterministic (Song et al., 2020, eta 0), `ddpm` draws fresh
    noise by the policy's law at every step but the last (Ho et al., 2020, variance "fixed_small"). Both in float32.
    `prediction` says what the step gives: the noise (`epsilon`) or the clean actions (`sample`); `clip` bounds the
    predicted clean actions.
    """

    kind: Literal["ddim", "ddpm"]
    steps: int = Field(ge=1)
    step: str
    state_input: str
    time_input: str
    prediction_output: str
    prediction: Literal["epsilon", "sample"]
    alphas_cumprod: tuple[float, ...] = Field(min_length=1)
    clip: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_timesteps(self) -> DiffusionLoop:
        if self.steps > len(self.alphas_cumprod):
            raise ValueError(f"{self.steps} steps are more than the {len(self.alphas_cumprod)} of the training")
        return self


class AutoregressiveLoop(Spec):
    """Token by token: the components that need no token once, then `step` until `end_token` or `max_length` tokens.

    `step` takes the latest token (int64 [1, 1], first `start_token`) and its position (int64 [1], from 0) and gives
    logits [1, vocabulary], of which the largest is taken; each cache tensor `given: taken` of `cache` that it gives is
    what it takes next, the first time from the components before it. Then the components that take `tokens_output`
    (int64 [1, max_length], `end_token` from the end on) run once.
    """

    kind: Literal["autoregressive"] = "autoregressive"
    max_length: int = Field(ge=1)
    step: str
    token_input: str
    position_input: str
    logits_output: str
    tokens_output: str
    start_token: int
    end_token: int
    cache: dict[str, str] = {}


Loop = Annotated[SingleLoop | EulerLoop | DiffusionLoop | AutoregressiveLoop, Field(discriminator="kind")]


class Noise(Spec):
    """The noise a policy was trained to start from. The wrong law ruins a policy, so it is part of the artifact.

    `normal` has mean 0 and deviation 1, `uniform` goes from `low` to `high`. With the seed `fixed` every prediction
    starts from the same noise, with `per-call` drawing goes on. `shape` is that of the loop's first state.

    One prediction takes noise of this shape; with a `ddpm` loop of n steps it takes [n, …] for a shape [1, …]: row 0 is
    the first state, row k what is drawn after step k.
    """

    law: Literal["none", "normal", "uniform"] = "none"
    shape: tuple[int, ...] = ()
    seed: Literal["fixed", "per-call"] = "per-call"
    low: float = 0.0
    high: float = 1.0


class Chunk(Spec):
    """Actions given by one prediction, and how many of them are executed before the next.

    The chunk is `size` rows of the policy's output from row `start` on; rows before it are of the past. With
    `ensemble`, a chunk is predicted at every step and the action is the mean of all that were predicted for it, the
    oldest first, weighted by exp(−ensemble · i) (temporal ensembling: Zhao et al., 2023, algorithm 2).
    """

    size: int = Field(ge=1)
    n_action_steps: int = Field(ge=1)
    start: int = Field(default=0, ge=0)
    ensemble: float | None = None

    @model_validator(mode="after")
    def _executes_no_more_than_it_has(self) -> Chunk:
        if self.n_action_steps > self.size:
            raise ValueError(f"n_action_steps {self.n_action_steps} is more than the chunk's {self.size}")
        if self.ensemble is not None and self.n_action_steps != 1:
            raise ValueError(f"temporal ensembling predicts at every step, n_action_steps is {self.n_action_steps}")
        return self


Mode = Literal["identity", "mean-std", "min-max", "quantiles", "quantiles-10"]
"""How values are normalised, by tensors of the statistics file; `eps` is the spec's.

`mean-std`: (x − mean) / (std + eps), back x · std + mean. The others are 2 (x − low) / d − 1 and back (x + 1) / 2 · d +
low with d = high − low, or eps where that is 0; low and high are `min` and `max`, `q01` and `q99`, `q10` and `q90`.
"""


class ImageProcessor(Spec):
    """A camera frame, uint8 HWC or float32 CHW in 0–1, to `output`: float32 [1, 3, height, width], normalised.

    The statistics are of shape [3], one per channel. With a history: [1, history, 3, height, width].
    """

    kind: Literal["image"] = "image"
    input: str
    output: str
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    mode: Mode = "identity"
    statistics: str = ""
    eps: float = Field(default=0.0, ge=0)


class NormaliseProcessor(Spec):
    """A float32 vector to `output` [1, size], normalised by `<statistics>.mean` and so on.

    With a history: [1, history, size].
    """

    kind: Literal["normalise"] = "normalise"
    input: str
    output: str
    size: int = Field(ge=1)
    statistics: str = ""
    mode: Mode = "mean-std"
    eps: float = Field(default=0.0, ge=0)


class TokeniseProcessor(Spec):
    """A sentence to `output`: int64 [1, max_length] token ids, by the tokenizer file named `asset`, which pads.

    `suffix` is put behind a sentence that does not end with it. `mask`, where named, is bool [1, max_length]: false for
    padding.
    """

    kind: Literal["tokenise"] = "tokenise"
    input: str
    output: str
    max_length: int = Field(ge=1)
    asset: str
    suffix: str = ""
    mask: str | None = None

    def outputs(self) -> tuple[str, ...]:
        """The tensors it gives."""
        return (self.output,) if self.mask is None else (self.output, self.mask)


Processor = Annotated[ImageProcessor | NormaliseProcessor | TokeniseProcessor, Field(discriminator="kind")]


class Unnormalise(Spec):
    """The policy's output `input` [1, ≥ start + size, ≥ action] to the robot's units, clipped to low … high.

    Columns beyond the actions are padding. Deviations, which action errors are measured in, are `<statistics>.std`.
    """

    kind: Literal["unnormalise"] = "unnormalise"
    input: str
    statistics: str
    mode: Mode = "mean-std"
    eps: float = Field(default=0.0, ge=0)
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _limits_in_order(self) -> Unnormalise:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class Guidance(Spec):
    """Defaults of real-time chunking (Black et al., 2025): a new chunk drawn towards what is left of the one before.

    See `vlaopt.runtime.guidance`, which takes what changes from call to call.
    """

    execution_horizon: int = Field(default=10, ge=1)
    max_weight: float = Field(default=10.0, gt=0)
    schedule: Literal["zeros", "ones", "linear", "exp"] = "linear"


class PolicySpec(Spec):
    """A whole policy. `gripper` is the index of the action that opens and closes the gripper, None without one.

    `history` is the number of time steps an observation holds, the newest last; `control_hz` None where the checkpoint
    does not say it.
    """

    schema_: Literal["vlaopt.policy/1"] = Field(default="vlaopt.policy/1", alias="schema")
    type: str
    action_dim: int = Field(ge=1)
    gripper: int | None = Field(default=None, ge=0)
    control_hz: float | None = Field(default=None, gt=0)
    history: int = Field(default=1, ge=1)
    components: dict[str, Component]
    loop: Loop
    noise: Noise = Noise()
    guidance: Guidance = Guidance()
    chunk: Chunk
    preprocess: tuple[Processor, ...]
    postprocess: Unnormalise
    statistics: str = "statistics.safetensors"

    @model_validator(mode="after")
    def _tensors_meet(self) -> PolicySpec:
        if not isinstance(self.loop, SingleLoop):
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

    def _loop_closes(self, loop: EulerLoop | DiffusionLoop | AutoregressiveLoop) -> None:
        """Raises ValueError unless the step gives what the loop needs, starts from noise, and no other waits for it."""
        if loop.step not in self.components:
            raise ValueError(f"the loop's step {loop.step!r} is not a component")
        outputs = {tensor.name for tensor in self.components[loop.step].outputs}
        for needed in [*self.read_by_loop(), *(loop.cache if isinstance(loop, AutoregressiveLoop) else ())]:
            if needed not in outputs:
                raise ValueError(f"the loop's step {loop.step!r} does not give {needed!r}")
        if not isinstance(loop, AutoregressiveLoop) and self.noise.law == "none":
            raise ValueError(f"a loop of kind {loop.kind} starts from noise, and the noise law is none")
        if loop.kind == "ddpm" and self.noise.shape[:1] != (1,):
            raise ValueError(f"a ddpm loop's noise has a shape [1, …], not {list(self.noise.shape)}")
        inside = outputs | set(_given_by(loop))
        if isinstance(loop, AutoregressiveLoop):
            inside.remove(loop.tokens_output)
            inputs = {tensor.name for tensor in self.components[loop.step].inputs}
            if lost := [taken for taken in loop.cache.values() if taken not in inputs]:
                raise ValueError(f"the loop's step {loop.step!r} does not take {lost[0]!r} of its cache")
        for name, component in self.components.items():
            late = [tensor.name for tensor in component.inputs if tensor.name in inside]
            if name != loop.step and late:
                raise ValueError(f"component {name!r} takes {late[0]!r}, which only the loop has")

    def order(self) -> list[str]:
        """The components in the order they run: each after those that give its inputs, by name where that is open.

        A loop's step stands after all that run before the loop, and before those that run after it. Raises ValueError
        when nothing gives an input.
        """
        after = self.after_loop()
        known, ordered, waiting = set(self._given()), list[str](), sorted(self.components)
        last = [name for name in waiting if name == self.step() or name in after]
        while waiting:
            ready = [name for name in waiting if all(tensor.name in known for tensor in self.components[name].inputs)]
            if not ready:
                missing = [t.name for t in self.components[waiting[0]].inputs if t.name not in known]
                raise ValueError(f"component {waiting[0]!r}: nothing gives its input {missing[0]!r}")
            chosen = min(ready, key=lambda name: (name in last, name in after))
            ordered.append(chosen)
            waiting.remove(chosen)
            known |= {tensor.name for tensor in self.components[chosen].outputs}
        return ordered

    def step(self) -> str | None:
        """The component that the loop repeats, None without one."""
        return None if isinstance(self.loop, SingleLoop) else self.loop.step

    def read_by_loop(self) -> list[str]:
        """The outputs of the step that the loop itself reads."""
        match self.loop:
            case SingleLoop():
                return []
            case EulerLoop():
                return [self.loop.velocity_output]
            case DiffusionLoop():
                return [self.loop.prediction_output]
            case AutoregressiveLoop():
                return [self.loop.logits_output]

    def after_loop(self) -> list[str]:
        """The components that wait for the loop's tokens."""
        if not isinstance(self.loop, AutoregressiveLoop):
            return []
        late = {self.loop.tokens_output}
        found: list[str] = []
        while more := [
            name
            for name, component in self.components.items()
            if name not in found and any(tensor.name in late for tensor in component.inputs)
        ]:
            found += more
            late |= {tensor.name for name in more for tensor in self.components[name].outputs}
        return found

    def _given(self) -> list[str]:
        """The tensors that no component gives: they come from the observation or the loop."""
        loop = [] if isinstance(self.loop, SingleLoop) else _given_by(self.loop)
        outputs = [
            step.outputs() if isinstance(step, TokeniseProcessor) else (step.output,) for step in self.preprocess
        ]
        return [*(name for names in outputs for name in names), *loop]

    def observation_names(self) -> list[str]:
        """The names an observation must have, in the order of the processors."""
        return list(dict.fromkeys(processor.input for processor in self.preprocess))

    def observation_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every part of an observation as a calibration set holds it; text is `("string", ())`.

        With a history, arrays have its time steps as their first dimension.
        """
        steps = (self.history,) if self.history > 1 else ()
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for processor in self.preprocess:
            if isinstance(processor, ImageProcessor):
                layout[processor.input] = ("uint8", (*steps, processor.height, processor.width, 3))
            elif isinstance(processor, NormaliseProcessor):
                layout[processor.input] = ("float32", (*steps, processor.size))
            else:
                layout[processor.input] = ("string", ())
        return layout


def _given_by(loop: EulerLoop | DiffusionLoop | AutoregressiveLoop) -> list[str]:
    """The tensors that the loop itself gives."""
    if isinstance(loop, AutoregressiveLoop):
        return [loop.token_input, loop.position_input, loop.tokens_output]
    return [loop.state_input, loop.time_input]
