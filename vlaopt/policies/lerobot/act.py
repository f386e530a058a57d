"""LeRobot's ACT (Zhao et al., 2023): one component. Its VAE encoder is for training only and not part of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaopt.artifact.policy_spec import Chunk, Component, PolicySpec, SingleLoop, TensorSpec
from vlaopt.policies.lerobot.checkpoint import build_policy, check_hub_fields, lerobot, open_checkpoint
from vlaopt.policies.lerobot.eager import ENVIRONMENT, IMAGES, STATE, EagerLeRobot, arrays, given, images, vectors
from vlaopt.policies.lerobot.processing import STATISTICS, VECTORS, open_processing
from vlaopt.runtime.loop import Tap

ACT = "act"


class Network(nn.Module):
    """ACT's network with its inputs one by one: cameras, state, environment's state → chunk [1, chunk, action]."""

    def __init__(self, model: nn.Module, cameras: int) -> None:
        super().__init__()
        self.model = model
        self._cameras = cameras

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        batch: dict[str, Any] = dict(zip((STATE, ENVIRONMENT), tensors[self._cameras :], strict=False))
        if self._cameras:
            batch[IMAGES] = list(tensors[: self._cameras])
        actions: torch.Tensor = self.model(batch)[0]
        return actions


class EagerACT(EagerLeRobot):
    """ACT in eager PyTorch."""

    def describe(self) -> PolicySpec:
        config, processing = self.processing.config, self.processing
        steps = [*images(processing, config.image_features), *vectors(processing)]
        size, width = config.chunk_size, config.action_feature.shape[0]
        actions = TensorSpec(name="actions", dtype="float32", shape=(1, size, width))
        return PolicySpec(
            schema="vlaopt.policy/1",
            type="act",
            action_dim=width,
            control_hz=self.checkpoint.control_hz,
            components={ACT: Component(kind="single", inputs=given(steps), outputs=(actions,))},
            loop=SingleLoop(),
            chunk=Chunk(size=size, n_action_steps=config.n_action_steps, ensemble=config.temporal_ensemble_coeff),
            preprocess=tuple(steps),
            postprocess=processing.unnormalise("actions"),
            statistics=STATISTICS,
        )

    def components(self) -> dict[str, nn.Module]:
        return {ACT: Network(self.policy.model, len(self.processing.config.image_features))}

    def predict(self, batches: list[dict[str, Any]], noise: torch.Tensor | None, tap: Tap | None) -> torch.Tensor:
        def seen(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            batch = arguments[0]
            tensors = [*batch.get(IMAGES, []), *(batch[name] for name in (STATE, ENVIRONMENT) if name in batch)]
            names = [tensor.name for tensor in self.spec.components[ACT].inputs]
            assert tap is not None
            tap(ACT, arrays(dict(zip(names, tensors, strict=True))), arrays({"actions": result[0]}))

        handle = self.policy.model.register_forward_hook(seen) if tap else None
        try:
            chunk: torch.Tensor = self.policy.predict_action_chunk(batches[0])
        finally:
            if handle:
                handle.remove()
        return chunk


class ACTAdapter:
    """See `vlaopt.policies.PolicyAdapter`."""

    def load(
        self, checkpoint: Path, hub_overrides: Mapping[str, Path], config_overrides: Mapping[str, Any]
    ) -> EagerACT:
        check_hub_fields(hub_overrides, (), ACT)
        policy_class = lerobot("policies.act.modeling_act").ACTPolicy
        opened = open_checkpoint(checkpoint, policy_class.config_class, config_overrides, {})
        processing = open_processing(opened, VECTORS)
        return EagerACT(opened, processing, build_policy(policy_class, opened))


ADAPTER = ACTAdapter()
