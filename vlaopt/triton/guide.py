"""The README of a model repository: how a client makes tensors of observations, runs the loop, and gets actions."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill

import numpy as np

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import EngineEntry
from vlaopt.artifact.policy_spec import (
    AutoregressiveLoop,
    DiffusionLoop,
    EulerLoop,
    ImageProcessor,
    NormaliseProcessor,
    PolicySpec,
    Processor,
    TensorSpec,
    TokeniseProcessor,
    Unnormalise,
)
from vlaopt.runtime.diffusion import timesteps
from vlaopt.runtime.golden import ACTIONS, INPUTS
from vlaopt.triton.models import DATATYPES, Model, Pipeline, computing_in, dims

_ENDS = {"min-max": ("min", "max"), "quantiles": ("q01", "q99"), "quantiles-10": ("q10", "q90")}


def guide(
    head: str,
    artifact: Artifact,
    engine: EngineEntry,
    spec: PolicySpec,
    models: Mapping[str, Model],
    whole: Pipeline | None,
) -> str:
    """The README, in Markdown. `head` names the artifact."""
    sections = [
        [f"# {head}", f"A model repository for Triton Inference Server, made of the artifact {artifact.id}."],
        _serving(engine, models),
        _models(models, whole),
        ["## From an observation to tensors", *_history(spec), *(_prepared(step, spec) for step in spec.preprocess)],
        ["## Running it", *_running(spec, models, whole)],
        ["## From the tensor to actions", *_actions(spec)],
        *([_checking(whole)] if artifact.has(ACTIONS) else []),
    ]
    return "\n\n".join(_wrapped(part) for section in sections for part in section) + "\n"


def _wrapped(part: str) -> str:
    if part.startswith(("#", "|", "    ")):
        return part
    return fill(part, 120, subsequent_indent="  " if part.startswith("* ") else "", break_on_hyphens=False)


def _serving(engine: EngineEntry, models: Mapping[str, Model]) -> list[str]:
    version_compatible = bool(engine.settings.get("version_compatible"))
    option = " --backend-config=tensorrt,version-compatible=true" if version_compatible else ""
    server = next(iter(models.values())).server
    parts = ["## Serving it", f"    tritonserver --model-repository=models{option}"]
    built = f"The engines were built by {engine.backend} {engine.backend_version} for {engine.machine}"
    needs = sorted({f"{what} {value}" for part in engine.components.values() for what, value in part.needs.items()})
    if server.backend == "tensorrt":
        parts.append(
            f"{built}. Triton must bring "
            + ("a TensorRT that reads them" if version_compatible else "that very TensorRT")
            + (f"; they load where there is {', '.join(needs)}." if needs else ".")
            + " A plan is native code: serve only what you built or trust."
        )
    else:
        parts.append(f"{built}; Triton's {server.backend} backend should be of the same or a newer version.")
        if engine.backend == "onnxruntime":
            parts.append("The graphs are optimised for the class of CPU that made them; serve them on such a one.")
    if server.backend == "openvino" and "fp32" in computing_in(engine):
        parts.append(
            "Triton's OpenVINO backend cannot be told to compute in FP32: on a CPU with BF16 it takes BF16 for what is "
            "not quantized. Compare with the golden actions there."
        )
    return parts


def _models(models: Mapping[str, Model], whole: Pipeline | None) -> list[str]:
    rows = ["| model | inputs | outputs |", "|---|---|---|"]
    served: list[Model | Pipeline] = [*models.values(), *([whole] if whole else [])]
    rows += [f"| `{model.name}` | {_ports(model.inputs)} | {_ports(model.outputs)} |" for model in served]
    return ["## Models", "Every tensor has its whole shape; Triton's batching is off.", "\n".join(rows)]


def _ports(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"`{tensor.name}` {DATATYPES[tensor.dtype][5:]} {dims(tensor)}" for tensor in tensors)


def _history(spec: PolicySpec) -> list[str]:
    if spec.history == 1:
        return ["Names are those of `policy/spec.json`; statistics are tensors of `policy/" + spec.statistics + "`."]
    return [
        f"Names are those of `policy/spec.json`; statistics are tensors of `policy/{spec.statistics}`. The policy sees "
        f"the last {spec.history} time steps, the newest last, as a second dimension of images and vectors; before "
        "there are so many, the first one stands for those that are missing."
    ]


def _prepared(step: Processor, spec: PolicySpec) -> str:
    if isinstance(step, ImageProcessor):
        times = f"{spec.history}, " if spec.history > 1 else ""
        law = _normalised(step, "for each channel, ")
        return (
            f"* `{step.output}` is the frame `{step.input}`, RGB, {step.height} × {step.width} pixels, as float32 "
            f"[1, {times}3, {step.height}, {step.width}] in 0–1 (8-bit values / 255){law}."
        )
    if isinstance(step, NormaliseProcessor):
        times = f"{spec.history}, " if spec.history > 1 else ""
        law = _normalised(step, "")
        return f"* `{step.output}` is the vector `{step.input}` as float32 [1, {times}{step.size}]{law}."
    return _tokens(step)


def _tokens(step: TokeniseProcessor) -> str:
    suffix = f", with {step.suffix!r} put behind it where it does not end so" if step.suffix else ""
    mask = f" `{step.mask}` is its attention mask, bool [1, {step.max_length}]." if step.mask else ""
    return (
        f"* `{step.output}` is the sentence `{step.input}`{suffix}, as int64 [1, {step.max_length}] ids of the "
        f"tokenizer `policy/{step.asset}` (Hugging Face tokenizers; it pads by itself).{mask}"
    )


def _normalised(step: ImageProcessor | NormaliseProcessor, each: str) -> str:
    """What is done to values, by the modes of `vlaopt.artifact.policy_spec.Mode`."""
    if step.mode == "identity":
        return ", not normalised"
    name, eps = step.statistics, f"{step.eps:g}"
    if step.mode == "mean-std":
        return f", then {each}(x − `{name}.mean`) / (`{name}.std` + {eps})"
    low, high = (f"`{name}.{end}`" for end in _ENDS[step.mode])
    return f", then {each}2 (x − {low}) / ({high} − {low}) − 1, dividing by {eps} where both are equal"


def _running(spec: PolicySpec, models: Mapping[str, Model], whole: Pipeline | None) -> list[str]:
    if whole:
        return [
            f"One request to `{whole.name}` runs all components and gives `{spec.postprocess.input}`; the tensors "
            "between them stay in the server."
        ]
    late = spec.after_loop()
    first = [models[name].name for name in models if name != spec.step() and name not in late]
    step = models[str(spec.step())].name
    before = f"First call {_listed(first)}, once, in this order. " if first else ""
    parts = [
        before + "An output goes to every input of the same name. Then the loop, in the client, in float32; what the "
        "loop does not change goes to every call as it is, best through Triton's shared memory:"
    ]
    loop = spec.loop
    if isinstance(loop, EulerLoop):
        parts += _euler(loop, spec, step)
    elif isinstance(loop, DiffusionLoop):
        parts += _diffusion(loop, spec, step)
    elif isinstance(loop, AutoregressiveLoop):
        parts += _autoregressive(loop, step)
        if late:
            parts.append(f"At last call {_listed([models[name].name for name in late])}, once, in this order.")
    return parts


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _noise(spec: PolicySpec) -> str:
    shape = list(spec.noise.shape)
    law = (
        "a standard normal law (mean 0, deviation 1)"
        if spec.noise.law == "normal"
        else f"a uniform law from {spec.noise.low:g} to {spec.noise.high:g}"
    )
    seed = "drawn anew for every chunk" if spec.noise.seed == "per-call" else "the same for every chunk"
    return f"noise of shape {shape} by {law}, {seed}. Another law ruins the policy"


def _euler(loop: EulerLoop, spec: PolicySpec, step: str) -> list[str]:
    dt = (loop.end - loop.start) / loop.steps
    return [
        f"* `{loop.state_input}` starts as {_noise(spec)}.",
        f"* {loop.steps} times, k = 0 … {loop.steps - 1}: call `{step}` with `{loop.state_input}` and with "
        f"`{loop.time_input}` = {loop.start:g} + k · ({dt:g}) in all its elements; then `{loop.state_input}` ← "
        f"`{loop.state_input}` + ({dt:g}) · `{loop.velocity_output}`, accumulated in float32.",
        f"* The last `{loop.state_input}` goes on. The number of steps may be changed: dt = "
        f"({loop.end:g} − {loop.start:g}) / steps.",
    ]


def _diffusion(loop: DiffusionLoop, spec: PolicySpec, step: str) -> list[str]:
    x, out = f"`{loop.state_input}`", f"`{loop.prediction_output}`"
    clip = f" Then clip it to −{loop.clip:g} … {loop.clip:g}." if loop.clip is not None else ""
    clean = f"({x} − √(1 − a) · {out}) / √a" if loop.prediction == "epsilon" else out
    noise = out if loop.prediction == "epsilon" else f"({x} − √a · {out}) / √(1 − a)"
    parts = [
        f"* {x} starts as {_noise(spec)}.",
        f"* For every row of the table: call `{step}` with {x} and with `{loop.time_input}` = t in all its elements.",
        f"* The clean actions it means are c = {clean}.{clip}",
    ]
    if loop.kind == "ddim":
        parts.append(f"* {x} ← √b · c + √(1 − b) · e, where e = {noise}.")
    else:
        parts.append(
            f"* With r = a / b and s = 1 − r: {x} ← √b · s / (1 − a) · c + √r · (1 − b) / (1 − a) · {x}, and in every "
            f"row but the last + √(max((1 − b) / (1 − a) · s, 1e-20)) · n, where n is fresh noise of the same law."
        )
    rows = ["| row | t | a | b |", "|---|---|---|---|"]
    times = timesteps(loop)
    for k, t in enumerate(times):
        after = 1.0 if k == loop.steps - 1 else loop.alphas_cumprod[times[k + 1]]
        rows.append(f"| {k} | {t} | {np.float32(loop.alphas_cumprod[t])} | {np.float32(after)} |")
    return [*parts, f"* The last {x} goes on.", "\n".join(rows)]


def _autoregressive(loop: AutoregressiveLoop, step: str) -> list[str]:
    cache = "".join(f" Its `{given}` is what it takes as `{taken}` next." for given, taken in loop.cache.items())
    return [
        f"* Start with the token {loop.start_token}. For k = 0 … {loop.max_length - 1}: call `{step}` with "
        f"`{loop.token_input}` = the token and `{loop.position_input}` = k. The next token is the index of the largest "
        f"of `{loop.logits_output}`; it is element k of `{loop.tokens_output}`.{cache}",
        f"* Stop at token {loop.end_token}. `{loop.tokens_output}` is int64 [1, {loop.max_length}], "
        f"{loop.end_token} from the end on.",
    ]


def _actions(spec: PolicySpec) -> list[str]:
    post, chunk = spec.postprocess, spec.chunk
    parts = [
        f"* Of `{post.input}`, without its first dimension, take rows {chunk.start} … {chunk.start + chunk.size - 1} "
        f"and the first {spec.action_dim} columns: y, a chunk of {chunk.size} actions.",
        f"* In the robot's units: {_unnormalised(post)}{_limits(post)}.",
    ]
    if chunk.ensemble is not None:
        parts.append(
            "* Ask for a chunk at every time step. Execute the mean of all that were predicted for this time step, the "
            f"oldest first, weighted by exp(−{chunk.ensemble:g} · i), i = 0, 1, ….",
        )
    else:
        rate = f" at {spec.control_hz:g} Hz" if spec.control_hz else ""
        parts.append(f"* Execute the first {chunk.n_action_steps}{rate}, then ask for the next chunk.")
    return parts


def _unnormalised(post: Unnormalise) -> str:
    if post.mode == "identity":
        return "y as it is"
    if post.mode == "mean-std":
        return f"y · `{post.statistics}.std` + `{post.statistics}.mean`"
    low, high = (f"`{post.statistics}.{end}`" for end in _ENDS[post.mode])
    return f"(y + 1) / 2 · ({high} − {low}) + {low}, with {post.eps:g} for the difference where both are equal"


def _limits(post: Unnormalise) -> str:
    if post.low is None and post.high is None:
        return ""
    low, high = (("−∞" if post.low is None else f"{post.low:g}"), ("∞" if post.high is None else f"{post.high:g}"))
    return f", clipped to {low} … {high}"


def _checking(whole: Pipeline | None) -> list[str]:
    noise = "" if whole else " and, where it has them, `noise`"
    return [
        "## Seeing that it is right",
        f"`{INPUTS}` holds the input tensors of recorded observations, one row each without the dimension of one in "
        f"front; `{ACTIONS}` the `actions`{noise} of the unoptimised policy, in the robot's units. What the server "
        "gives differs by what the artifact's verification found.",
    ]
