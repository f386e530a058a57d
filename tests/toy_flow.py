"""A tiny flow-matching policy for tests: vision, prefix → keys and values, step × 5. An adapter as third parties write.

Its checkpoint's config may name a mistake, which is made in what the adapter says of the policy or cuts from it, never
in the policy itself: an export must find each.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
from torch import nn

from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    EulerLoop,
    ImageProcessor,
    Noise,
    NormaliseProcessor,
    PolicySpec,
    TensorSpec,
    TokeniseProcessor,
    Unnormalise,
)
from vlaopt.calibration import write_calibration_set
from vlaopt.files import write_file
from vlaopt.runtime.loop import Tap
from vlaopt.tensors import pack, unpack

CAMERA, STATE, TASK = "observation.images.front", "observation.state", "task"
TASKS = ("push the red cube", "open the drawer slowly")
SIZE, WIDTH, TOKENS, LAYERS, STATE_SIZE, CHUNK, ACTIONS, STEPS = 16, 16, 6, 2, 4, 8, 3, 5
PREFIX = 4 + 1 + TOKENS
MISTAKES = (
    "swapped keys and values",
    "wrong time embedding",
    "backward in time",
    "too few steps",
    "uniform noise",
    "state not normalised",
    "image not normalised",
    "wrong statistics",
    "values under the names of keys",
    "step never told of",
)
RECIPE = """
schema: vlaopt.recipe/1
name: toy
version: 1.0.0
target: cpu-x86
policy: {type: toy-flow, checkpoint: checkpoint/}
calibration: {path: set, samples: 12}
export: {golden_samples: 4}
quantize: {scheme: none, calibrator: minmax, rules: [{scope: "*", scheme: int8}]}
# Random weights make coarse actions of small rounding errors: the limits of int8 are wide here.
accept: {action_error: {mean: 0.5}, jerk: 1.0}
bench: {hz: 20, duration_s: 0.5, back_to_back_s: 0.2}
"""


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.body = nn.Conv2d(8, WIDTH, 2, stride=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(torch.relu(self.stem(image))).flatten(2).transpose(1, 2)


class Prefix(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.state = nn.Linear(STATE_SIZE, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.values = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(
        self, features: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        rows = self.norm(torch.cat([features, self.state(state)[:, None], self.words(tokens)], dim=1))
        seen = torch.cat([torch.ones((1, 5), dtype=torch.bool), mask], dim=1)
        return [(key(rows), value(rows)) for key, value in zip(self.keys, self.values, strict=True)], seen


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(ACTIONS, WIDTH)
        self.queries = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(LAYERS))
        self.narrow = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(LAYERS))
        self.leave = nn.Linear(WIDTH, ACTIONS)

    def forward(
        self,
        cache: list[tuple[torch.Tensor, torch.Tensor]],
        seen: torch.Tensor,
        state: torch.Tensor,
        time: torch.Tensor,
        period: float = 4.0,
    ) -> torch.Tensor:
        angles = time[:, None] * period ** -torch.linspace(-1.0, 1.0, WIDTH // 2) * math.pi
        rows = self.enter(state) + torch.cat([angles.sin(), angles.cos()], dim=1)[:, None]
        for (key, value), asked, wide, narrow in zip(cache, self.queries, self.wide, self.narrow, strict=True):
            query, key, value = (part.view(1, -1, 2, WIDTH // 2).transpose(1, 2) for part in (asked(rows), key, value))
            scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // 2)
            weights = scores.masked_fill(~seen[:, None, None], -1e9).softmax(-1)
            rows = rows + (weights @ value).transpose(1, 2).reshape(1, -1, WIDTH)
            rows = rows + narrow(torch.relu(wide(rows)))
        return self.leave(rows)


class Network(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision, self.prefix, self.step = Vision(), Prefix(vocabulary), Step()


class FlatPrefix(nn.Module):
    """The prefix as a component: keys and values one by one."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache, seen = self.prefix(*inputs)
        return (*(tensor for pair in cache for tensor in pair), seen)


class FlatStep(nn.Module):
    """The step as a component, with the mistake where it has one."""

    def __init__(self, step: Step, mistake: str | None) -> None:
        super().__init__()
        self.step = step
        self.order = (1, 0) if mistake == "swapped keys and values" else (0, 1)
        self.period = 5.0 if mistake == "wrong time embedding" else 4.0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        *flat, seen, state, time = inputs
        first, second = self.order
        cache = [(flat[i + first], flat[i + second]) for i in range(0, len(flat), 2)]
        return self.step(cache, seen, state, time, self.period)


class EagerToyFlow:
    """See `vlaopt.policies.EagerPolicy`."""

    def __init__(self, module: Network, mistake: str | None, statistics: bytes, tokenizer: bytes) -> None:
        self.module = module.eval()
        self.mistake = mistake
        self._files = {"statistics.safetensors": statistics, "tokenizer.json": tokenizer}
        self._statistics = unpack(statistics, where="statistics")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer)

    @property
    def spec(self) -> PolicySpec:
        return spec(self.mistake)

    def components(self) -> dict[str, nn.Module]:
        return {
            "vision": self.module.vision,
            "prefix": FlatPrefix(self.module.prefix),
            "step": FlatStep(self.module.step, self.mistake),
        }

    def preprocess(self, observation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        image = torch.from_numpy(observation[CAMERA]).permute(2, 0, 1)[None].float() / 255.0
        colours = [torch.from_numpy(self._statistics[f"image.{kind}"])[:, None, None] for kind in ("mean", "std")]
        state = torch.from_numpy(observation[STATE])[None]
        mean, std = (torch.from_numpy(self._statistics[f"state.{kind}"]) for kind in ("mean", "std"))
        encoding = self._tokenizer.encode(observation[TASK])
        return {
            "image": (image - colours[0]) / colours[1],
            "state": (state - mean) / (std + 1e-8),
            "tokens": torch.tensor([encoding.ids]),
            "token_mask": torch.tensor([encoding.attention_mask], dtype=torch.bool),
        }

    def predict_chunk(
        self, observation: Mapping[str, Any], noise: np.ndarray | None = None, *, tap: Tap | None = None
    ) -> np.ndarray:
        given = self.preprocess(observation)
        network = self.module

        def show(name: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
            if tap is not None and not (name == "step" and self.mistake == "step never told of"):
                tap(name, *({key: value.numpy().copy() for key, value in half.items()} for half in (inputs, outputs)))

        with torch.no_grad():
            features = network.vision(given["image"])
            show("vision", {"image": given["image"]}, {"features": features})
            rest = {key: given[key] for key in ("state", "tokens", "token_mask")}
            cache, seen = network.prefix(features, *rest.values())
            flat = dict(zip(cache_names(), (tensor for pair in cache for tensor in pair), strict=True))
            show("prefix", {"features": features, **rest}, {**flat, "prefix_mask": seen})
            taken = dict(zip(reversed(flat), flat.values(), strict=True)) if self._misnames else flat
            state = torch.randn(1, CHUNK, ACTIONS) if noise is None else torch.from_numpy(noise)
            for k in range(STEPS):
                time = torch.tensor([1.0 - k / STEPS])
                velocity = network.step(cache, seen, state, time)
                inputs = {**taken, "prefix_mask": seen, "state_of_loop": state, "time": time}
                show("step", inputs, {"velocity": velocity})
                state = state - velocity / STEPS
        actions = state[0].numpy() * self._statistics["action.std"] + self._statistics["action.mean"]
        return np.asarray(actions, dtype=np.float32)

    @property
    def _misnames(self) -> bool:
        return self.mistake == "values under the names of keys"

    def assets(self) -> dict[str, bytes]:
        files = dict(self._files)
        if self.mistake == "wrong statistics":
            other = {**self._statistics, "state.mean": self._statistics["state.mean"] + np.float32(0.01)}
            files["statistics.safetensors"] = pack(other)
        return files

    def save(self, folder: Path) -> None:
        write_file(folder / "config.json", json.dumps({"type": "toy-flow", "mistake": self.mistake}).encode())
        for name, data in self._files.items():
            write_file(folder / name, data)
        safetensors.torch.save_file(self.module.state_dict(), folder / "model.safetensors")

    def replace(self, module: nn.Module) -> EagerToyFlow:
        assert isinstance(module, Network)
        return EagerToyFlow(module, self.mistake, *self._files.values())


class ToyFlowAdapter:
    """See `vlaopt.policies.PolicyAdapter`."""

    def load(
        self, checkpoint: Path, hub_overrides: Mapping[str, Path], config_overrides: Mapping[str, Any]
    ) -> EagerToyFlow:
        config = json.loads((checkpoint / "config.json").read_bytes())
        weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
        module = Network(len(weights["prefix.words.weight"]))
        module.load_state_dict(weights)
        files = ((checkpoint / name).read_bytes() for name in ("statistics.safetensors", "tokenizer.json"))
        return EagerToyFlow(module, config["mistake"], *files)


ADAPTER = ToyFlowAdapter()


def cache_names() -> list[str]:
    """The flat keys and values."""
    return [f"{kind}_{layer:02d}" for layer in range(LAYERS) for kind in ("key", "value")]


def spec(mistake: str | None = None) -> PolicySpec:
    """What the adapter says of the policy."""

    def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    image, features = tensor("image", 1, 3, SIZE, SIZE), tensor("features", 1, 4, WIDTH)
    given = (
        tensor("state", 1, STATE_SIZE),
        tensor("tokens", 1, TOKENS, dtype="int64"),
        tensor("token_mask", 1, TOKENS, dtype="bool"),
    )
    kept = (
        *(tensor(name, 1, PREFIX, WIDTH) for name in cache_names()),
        tensor("prefix_mask", 1, PREFIX, dtype="bool"),
    )
    state, time = tensor("state_of_loop", 1, CHUNK, ACTIONS), tensor("time", 1)
    times = (0.0, 1.0) if mistake == "backward in time" else (1.0, 0.0)
    return PolicySpec(
        type="toy-flow",
        action_dim=ACTIONS,
        control_hz=20.0,
        components={
            "vision": Component(kind="vision", inputs=(image,), outputs=(features,)),
            "prefix": Component(kind="prefix", inputs=(features, *given), outputs=kept),
            "step": Component(
                kind="step", inputs=(*kept, state, time), outputs=(tensor("velocity", 1, CHUNK, ACTIONS),)
            ),
        },
        loop=EulerLoop(
            steps=STEPS - 1 if mistake == "too few steps" else STEPS,
            start=times[0],
            end=times[1],
            step="step",
            state_input="state_of_loop",
            time_input="time",
            velocity_output="velocity",
        ),
        noise=Noise(law="uniform" if mistake == "uniform noise" else "normal", shape=(1, CHUNK, ACTIONS)),
        chunk=Chunk(size=CHUNK, n_action_steps=5),
        preprocess=(
            ImageProcessor(
                input=CAMERA,
                output="image",
                height=SIZE,
                width=SIZE,
                mode="identity" if mistake == "image not normalised" else "mean-std",
                statistics="image",
            ),
            NormaliseProcessor(
                input=STATE,
                output="state",
                size=STATE_SIZE,
                statistics="state",
                mode="identity" if mistake == "state not normalised" else "mean-std",
                eps=1e-8,
            ),
            TokeniseProcessor(
                input=TASK, output="tokens", mask="token_mask", max_length=TOKENS, asset="tokenizer.json"
            ),
        ),
        postprocess=Unnormalise(input="state_of_loop", statistics="action"),
    )


def make(folder: Path, mistake: str | None = None, *, samples: int = 12) -> Path:
    """A checkpoint, a calibration set and a recipe in `folder`; gives the recipe."""
    words = sorted({word for task in TASKS for word in task.split()})
    vocabulary = {word: index for index, word in enumerate(["[pad]", "[unk]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="[pad]", length=TOKENS)
    tokenizer.enable_truncation(TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(len(vocabulary))
        for part in network.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=1.2 * part.in_features**-0.5)
        nn.init.normal_(network.step.leave.weight, std=0.05)
    EagerToyFlow(network, mistake, pack(_statistics()), tokenizer.to_str().encode()).save(folder / "checkpoint")
    write_set(folder / "set", [observation(index) for index in range(samples)])
    write_file(folder / "recipe.yaml", RECIPE.encode())
    return folder / "recipe.yaml"


def write_set(folder: Path, observations: Sequence[dict[str, Any]]) -> None:
    """A calibration set of `observations`, four to an episode."""
    write_calibration_set(
        folder,
        observations,
        episodes=[index // 4 for index in range(len(observations))],
        steps=[index % 4 for index in range(len(observations))],
        name="toy",
        description="random frames and states",
        source="tests/toy_flow.py",
        licence="CC0-1.0",
        created_by="tests",
        seed=0,
    )


def observation(index: int) -> dict[str, Any]:
    """A random observation, equal for an equal index."""
    random = np.random.default_rng(index)
    return {
        CAMERA: random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        STATE: random.normal(0.5, 2.0, STATE_SIZE).astype(np.float32),
        TASK: TASKS[index // 4 % len(TASKS)],
    }


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a Python in which the adapter is installed as a package of a third party; made in `folder`."""
    info = folder / "toy_flow-1.0.dist-info"
    write_file(info / "METADATA", b"Metadata-Version: 2.1\nName: toy-flow\nVersion: 1.0\n")
    write_file(info / "entry_points.txt", b"[vlaopt.policies]\ntoy-flow = tests.toy_flow:ADAPTER\n")
    root = Path(__file__).parents[1]
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes, "PYTHONPATH": os.pathsep.join(paths)}


def _statistics() -> dict[str, np.ndarray]:
    values = {
        "image.mean": (0.5, 0.45, 0.4),
        "image.std": (0.2, 0.25, 0.3),
        "state.mean": (0.5, 0.4, 0.6, 0.5),
        "state.std": (2.0, 1.8, 2.2, 1.9),
        "action.mean": (0.1, -0.2, 0.3),
        "action.std": (0.5, 1.5, 1.0),
    }
    return {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}
