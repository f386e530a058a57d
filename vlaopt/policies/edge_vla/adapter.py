"""edge-vla as vlaopt sees it: three components, a single pass, the processors its checkpoint describes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    ImageProcessor,
    NormaliseProcessor,
    PolicySpec,
    SingleLoop,
    TensorSpec,
    TokeniseProcessor,
    Unnormalise,
)
from vlaopt.errors import InputError
from vlaopt.policies import hooked
from vlaopt.policies.edge_vla.checkpoint import STATISTICS, TOKENIZER, load_checkpoint, save_checkpoint
from vlaopt.policies.edge_vla.config import EdgeVLAConfig
from vlaopt.policies.edge_vla.model import EdgeVLA, config_of
from vlaopt.policies.edge_vla.policy import IMAGE, STATE, TASK, EdgeVLAPolicy, Statistics
from vlaopt.runtime.loop import Tap

GRIPPER = 3


class EagerEdgeVLA:
    """See `vlaopt.policies.EagerPolicy`."""

    def __init__(self, policy: EdgeVLAPolicy) -> None:
        self._policy = policy

    @property
    def spec(self) -> PolicySpec:
        return spec_of(config_of(self._policy.module))

    @property
    def module(self) -> EdgeVLA:
        module: EdgeVLA = self._policy.module
        return module

    def components(self) -> dict[str, nn.Module]:
        return {"vision": self.module.vision, "language": self.module.language, "head": self.module.head}

    def preprocess(self, observation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        images, state, tokens = self._policy.preprocess(observation)
        return {"images": images, "state": state, "tokens": tokens}

    def predict_chunk(
        self, observation: Mapping[str, Any], noise: np.ndarray | None = None, *, tap: Tap | None = None
    ) -> np.ndarray:
        if noise is not None:
            raise InputError("edge-vla takes no noise")
        with hooked(self.spec, self.components(), tap):
            return self._policy.predict_chunk(observation)

    @property
    def statistics(self) -> Statistics:
        """What training normalises with; see `vlaopt.training`."""
        return self._policy.statistics

    def tokenize(self, instruction: str) -> list[int]:
        """Token ids of an instruction, for training."""
        return self._policy.tokenize(instruction)

    def assets(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "checkpoint")
            return {name: (Path(folder) / "checkpoint" / name).read_bytes() for name in (STATISTICS, TOKENIZER)}

    def save(self, folder: Path) -> None:
        save_checkpoint(self._policy, folder)

    def replace(self, module: nn.Module) -> EagerEdgeVLA:
        if not isinstance(module, EdgeVLA):
            raise TypeError(f"an EdgeVLA is needed, {type(module).__name__} given")
        return EagerEdgeVLA(EdgeVLAPolicy(module, self._policy.statistics, self._policy.tokenizer))


class EdgeVLAAdapter:
    """See `vlaopt.policies.PolicyAdapter`."""

    def load(
        self, checkpoint: Path, hub_overrides: Mapping[str, Path], config_overrides: Mapping[str, Any]
    ) -> EagerEdgeVLA:
        """Raises InputError for a damaged checkpoint, and for overrides: an edge-vla has no use for them."""
        if hub_overrides or config_overrides:
            raise InputError("edge-vla takes neither hub_overrides nor config_overrides")
        return EagerEdgeVLA(load_checkpoint(checkpoint))


def spec_of(config: EdgeVLAConfig) -> PolicySpec:
    """The PolicySpec of a network of these sizes."""
    images = TensorSpec(name="images", dtype="float32", shape=(1, 3, config.image_size, config.image_size))
    tokens = TensorSpec(name="tokens", dtype="int64", shape=(1, config.max_length))
    state = TensorSpec(name="state", dtype="float32", shape=(1, config.state_size))
    vision = TensorSpec(name="vision_features", dtype="float32", shape=(1, config.vision.features))
    language = TensorSpec(name="language_features", dtype="float32", shape=(1, config.language.hidden))
    actions = TensorSpec(name="actions", dtype="float32", shape=(1, config.chunk_size, config.action_size))
    return PolicySpec(
        schema="vlaopt.policy/1",
        type="edge-vla",
        action_dim=config.action_size,
        gripper=GRIPPER,
        control_hz=config.control_hz,
        components={
            "vision": Component(kind="vision", inputs=(images,), outputs=(vision,)),
            "language": Component(kind="prefix", inputs=(tokens,), outputs=(language,)),
            "head": Component(kind="head", inputs=(vision, language, state), outputs=(actions,)),
        },
        loop=SingleLoop(),
        chunk=Chunk(size=config.chunk_size, n_action_steps=config.n_action_steps),
        preprocess=(
            ImageProcessor(input=IMAGE, output="images", height=config.image_size, width=config.image_size),
            NormaliseProcessor(input=STATE, output="state", size=config.state_size, statistics="observation.state"),
            TokeniseProcessor(input=TASK, output="tokens", max_length=config.max_length, asset=TOKENIZER),
        ),
        postprocess=Unnormalise(input="actions", statistics="action", low=-1.0, high=1.0),
        statistics=STATISTICS,
    )


ADAPTER = EdgeVLAAdapter()
