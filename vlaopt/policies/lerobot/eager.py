"""What the eager policies of LeRobot have in common: loading, processing, saving. See `vlaopt.policies.EagerPolicy`."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from vlaopt.artifact.policy_spec import (
    ImageProcessor,
    NormaliseProcessor,
    PolicySpec,
    Processor,
    TensorSpec,
    TokeniseProcessor,
)
from vlaopt.errors import InputError
from vlaopt.files import write_file
from vlaopt.policies.checkpoints import CONFIG, WEIGHTS, words
from vlaopt.policies.lerobot.checkpoint import Checkpoint
from vlaopt.policies.lerobot.processing import Processing
from vlaopt.runtime.loop import Tap, check_noise
from vlaopt.runtime.observations import check_names, check_part, with_history

STATE, ENVIRONMENT, IMAGES = "observation.state", "observation.environment_state", "observation.images"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


class EagerLeRobot(ABC):
    """One of LeRobot's policies with its processors; what differs from policy to policy is below."""

    def __init__(self, checkpoint: Checkpoint, processing: Processing, policy: Any) -> None:
        self.checkpoint = checkpoint
        self.processing = processing
        self.policy = policy
        try:
            self._spec = self.describe()
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(problem, where=str(checkpoint.path / CONFIG)) from error
        self._shapes = {name: tensor.shape for name, tensor in policy.state_dict().items()}

    @abstractmethod
    def describe(self) -> PolicySpec:
        """The policy as data."""

    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """The modules behind the spec's components."""

    @abstractmethod
    def predict(self, batches: list[dict[str, Any]], noise: torch.Tensor | None, tap: Tap | None) -> torch.Tensor:
        """LeRobot's own chunk [1, rows, action], normalised, all rows that the spec's chunk has.

        `batches`: what LeRobot's preprocessing gives for each time step of the history.
        """

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    @property
    def module(self) -> nn.Module:
        network: nn.Module = self.policy
        return network

    def preprocess(self, observation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        batches, tensors = self._batches(observation), dict[str, torch.Tensor]()
        for step in self.spec.preprocess:
            if isinstance(step, TokeniseProcessor):
                tensors[step.output], tensors[step.mask or ""] = batches[-1][TOKENS], batches[-1][TOKEN_MASK]
            elif self.spec.history > 1:
                tensors[step.output] = torch.stack([batch[step.statistics] for batch in batches], dim=1)
            else:
                tensors[step.output] = batches[0][step.statistics]
        return tensors

    def predict_chunk(
        self, observation: Mapping[str, Any], noise: np.ndarray | None = None, *, tap: Tap | None = None
    ) -> np.ndarray:
        start = None if noise is None else torch.from_numpy(check_noise(self.spec, noise).copy())
        with torch.no_grad():
            return self.processing.actions(self.predict(self._batches(observation), start, tap))

    def assets(self) -> dict[str, bytes]:
        return self.processing.assets()

    def save(self, folder: Path) -> None:
        """As it was loaded, with the weights of now: configs and processors as they were, so that it loads as before.

        Raises InputError when layers have other sizes: LeRobot's configs have no words for them.
        """
        state = self.policy.state_dict()
        for name, tensor in state.items():
            if tensor.shape != self._shapes.get(name):
                raise InputError(
                    f"{name} is now {words(tensor)}, and LeRobot's config cannot say so",
                    where=str(self.checkpoint.path / CONFIG),
                    hint="prune single weights instead of channels",
                )
        for name, data in self.checkpoint.files.items():
            write_file(folder / name, data)
        safetensors.torch.save_file(_alone({**state, **self.checkpoint.buffers}), folder / WEIGHTS, {"format": "pt"})

    def replace(self, module: nn.Module) -> EagerLeRobot:
        if type(module) is not type(self.policy):
            raise TypeError(f"a {type(self.policy).__name__} is needed, {type(module).__name__} given")
        replaced = type(self)(self.checkpoint, self.processing, module.eval())
        replaced._shapes = self._shapes
        return replaced

    def _batches(self, observation: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What LeRobot's preprocessing gives for each time step. Raises InputError naming what is wrong."""
        times = (self.spec.history,) if self.spec.history > 1 else ()
        check_names(self.spec, observation)
        observation = with_history(self.spec, observation)
        for step in self.spec.preprocess:
            check_part(step, observation[step.input], times)
        if not times:
            return [self.processing.batch(observation)]
        rows = [
            {name: value if isinstance(value, str) else value[time] for name, value in observation.items()}
            for time in range(self.spec.history)
        ]
        return [self.processing.batch(row) for row in rows]


def vectors(processing: Processing) -> list[Processor]:
    """The processors of the state, and of the environment's state where the policy has one."""
    steps: list[Processor] = [processing.vector(STATE, "state")]
    if processing.config.env_state_feature is not None:
        steps.append(processing.vector(ENVIRONMENT, "environment_state"))
    return steps


def images(processing: Processing, cameras: Iterable[str]) -> list[Processor]:
    """The processors of cameras, which give `image_front` and so on."""
    steps: list[Processor] = []
    for feature in cameras:
        last = re.sub(r"^observation\.(images?\.?)?", "", feature)
        letters = re.sub(r"\W", "_", last)
        steps.append(processing.image(feature, f"image_{letters}" if letters else "image"))
    return steps


def given(steps: Iterable[Processor], history: int = 1) -> tuple[TensorSpec, ...]:
    """The tensors that processors give, in their order."""
    times = (history,) if history > 1 else ()
    tensors = []
    for step in steps:
        if isinstance(step, ImageProcessor):
            tensors.append(TensorSpec(name=step.output, dtype="float32", shape=(1, *times, 3, step.height, step.width)))
        elif isinstance(step, NormaliseProcessor):
            tensors.append(TensorSpec(name=step.output, dtype="float32", shape=(1, *times, step.size)))
        else:
            names = zip(step.outputs(), ("int64", "bool"), strict=False)
            tensors += [TensorSpec(name=name, dtype=dtype, shape=(1, step.max_length)) for name, dtype in names]
    return tuple(tensors)


@contextlib.contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within, the method `name` of the one object `owner` is what `wrap` makes of it."""
    original = getattr(owner, name)
    had = name in vars(owner)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Copies for a tap."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def _alone(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once: of those that share their memory the first by name, as LeRobot saves them."""
    seen: dict[int, str] = {}
    kept = {}
    for name in sorted(state):
        tensor = state[name].contiguous()
        if tensor.numel() and seen.setdefault(tensor.data_ptr(), name) != name:
            continue
        kept[name] = tensor
    return kept
