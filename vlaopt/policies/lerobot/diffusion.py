"""LeRobot's Diffusion Policy (Chi et al., 2023): `vision` once for the conditioning, then the U-Net as `step`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaopt.artifact.policy_spec import Chunk, Component, DiffusionLoop, Noise, PolicySpec, TensorSpec
from vlaopt.policies.lerobot.checkpoint import build_policy, check_hub_fields, lerobot, open_checkpoint
from vlaopt.policies.lerobot.eager import (
    ENVIRONMENT,
    IMAGES,
    STATE,
    EagerLeRobot,
    arrays,
    given,
    images,
    patched,
    vectors,
)
from vlaopt.policies.lerobot.processing import STATISTICS, VECTORS, open_processing
from vlaopt.runtime.loop import Tap

DIFFUSION, VISION, STEP = "diffusion", "vision", "step"


class Vision(nn.Module):
    """The observation encoder: cameras, state, environment's state, each with its history → conditioning [1, width]."""

    def __init__(self, diffusion: nn.Module, cameras: int, history: int) -> None:
        super().__init__()
        self.diffusion = diffusion
        self._cameras = cameras
        self._history = history

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self._history == 1:
            tensors = tuple(tensor[:, None] for tensor in tensors)
        batch = dict(zip((STATE, ENVIRONMENT), tensors[self._cameras :], strict=False))
        if self._cameras:
            batch[IMAGES] = torch.stack(tensors[: self._cameras], dim=2)
        conditioning: torch.Tensor = self.diffusion._prepare_global_conditioning(batch)
        return conditioning


class Step(nn.Module):
    """The U-Net: sample [1, horizon, action], timestep int64 [1], conditioning → prediction like the sample."""

    def __init__(self, diffusion: nn.Module) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.diffusion.unet(sample, timestep, global_cond=conditioning)
        return prediction


class EagerDiffusion(EagerLeRobot):
    """The Diffusion Policy in eager PyTorch."""

    def describe(self) -> PolicySpec:
        config, processing = self.processing.config, self.processing
        steps = [*images(processing, config.image_features), *vectors(processing)]
        history, width = config.n_obs_steps, config.action_feature.shape[0]
        sample = TensorSpec(name="sample", dtype="float32", shape=(1, config.horizon, width))
        timestep = TensorSpec(name="timestep", dtype="int64", shape=(1,))
        conditioning = TensorSpec(name="conditioning", dtype="float32", shape=(1, self._conditioning_width()))
        prediction = TensorSpec(name="prediction", dtype="float32", shape=sample.shape)
        return PolicySpec(
            schema="vlaopt.policy/1",
            type="diffusion",
            action_dim=width,
            control_hz=self.checkpoint.control_hz,
            history=history,
            components={
                VISION: Component(kind="vision", inputs=given(steps, history), outputs=(conditioning,)),
                STEP: Component(kind="step", inputs=(sample, timestep, conditioning), outputs=(prediction,)),
            },
            loop=self._loop(),
            noise=Noise(law="normal", shape=(1, config.horizon, width)),
            # The first rows are of the past, from the oldest observation on.
            chunk=Chunk(start=history - 1, size=config.horizon - history + 1, n_action_steps=config.n_action_steps),
            preprocess=tuple(steps),
            postprocess=processing.unnormalise("sample"),
            statistics=STATISTICS,
        )

    def components(self) -> dict[str, nn.Module]:
        config, diffusion = self.processing.config, self.policy.diffusion
        return {VISION: Vision(diffusion, len(config.image_features), config.n_obs_steps), STEP: Step(diffusion)}

    def predict(self, batches: list[dict[str, Any]], noise: torch.Tensor | None, tap: Tap | None) -> torch.Tensor:
        config, diffusion = self.processing.config, self.policy.diffusion
        self._remember(batches)
        start = noise if noise is None or self._loop().kind == "ddim" else noise[:1]
        with contextlib.ExitStack() as stack:
            if tap:
                stack.enter_context(patched(diffusion, "_prepare_global_conditioning", self._seen(tap)))
                stack.enter_context(_stepped(diffusion.unet, tap))
            if noise is not None and self._loop().kind == "ddpm":
                stack.enter_context(_drawing(noise[1:]))
            # LeRobot cuts the chunk to the steps that it executes; here it is wanted whole.
            stack.enter_context(_set(config, "n_action_steps", self.spec.chunk.size))
            chunk: torch.Tensor = self.policy.predict_action_chunk(batches[-1], noise=start)
        return chunk

    def _remember(self, batches: list[dict[str, Any]]) -> None:
        """Fill LeRobot's queues with the observations, as its `select_action` does."""
        populate = lerobot("policies.utils").populate_queues
        self.policy.reset()
        for batch in batches:
            if cameras := self.processing.config.image_features:
                batch[IMAGES] = torch.stack([batch[name] for name in cameras], dim=-4)
            self.policy._queues = populate(self.policy._queues, batch)

    def _seen(self, tap: Tap) -> Any:
        names = [tensor.name for tensor in self.spec.components[VISION].inputs]
        single = self.spec.history == 1

        def wrap(prepare: Any) -> Any:
            def seen(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
                conditioning: torch.Tensor = prepare(batch)
                frames = batch[IMAGES].unbind(2) if IMAGES in batch else ()
                tensors = [*frames, *(batch[name] for name in (STATE, ENVIRONMENT) if name in batch)]
                inputs = [tensor[:, 0] for tensor in tensors] if single else tensors
                tap(VISION, arrays(dict(zip(names, inputs, strict=True))), arrays({"conditioning": conditioning}))
                return conditioning

            return seen

        return wrap

    def _loop(self) -> DiffusionLoop:
        diffusion = self.policy.diffusion
        scheduler = diffusion.noise_scheduler.config
        return DiffusionLoop(
            kind="ddim" if self.processing.config.noise_scheduler_type == "DDIM" else "ddpm",
            steps=diffusion.num_inference_steps,
            step=STEP,
            state_input="sample",
            time_input="timestep",
            prediction_output="prediction",
            prediction=scheduler.prediction_type,
            alphas_cumprod=tuple(diffusion.noise_scheduler.alphas_cumprod.tolist()),
            clip=scheduler.clip_sample_range if scheduler.clip_sample else None,
        )

    def _conditioning_width(self) -> int:
        """Of the vector that the U-Net is made for, besides its embedding of the timestep."""
        unet = self.policy.diffusion.unet
        block = unet.mid_modules[0]
        return int(block.cond_encoder[1].in_features - self.processing.config.diffusion_step_embed_dim)


class DiffusionAdapter:
    """See `vlaopt.policies.PolicyAdapter`."""

    def load(
        self, checkpoint: Path, hub_overrides: Mapping[str, Path], config_overrides: Mapping[str, Any]
    ) -> EagerDiffusion:
        check_hub_fields(hub_overrides, (), DIFFUSION)
        policy_class = lerobot("policies.diffusion.modeling_diffusion").DiffusionPolicy
        opened = open_checkpoint(checkpoint, policy_class.config_class, config_overrides, {})
        processing = open_processing(opened, VECTORS)
        return EagerDiffusion(opened, processing, build_policy(policy_class, opened))


@contextlib.contextmanager
def _stepped(unet: nn.Module, tap: Tap) -> Iterator[None]:
    """Within, `tap` sees every call of the U-Net."""

    def seen(_: nn.Module, arguments: Any, named: Mapping[str, Any], prediction: torch.Tensor) -> None:
        sample, timestep = arguments
        inputs = {"sample": sample, "timestep": timestep, "conditioning": named["global_cond"]}
        tap(STEP, arrays(inputs), arrays({"prediction": prediction}))

    handle = unet.register_forward_hook(seen, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _drawing(draws: torch.Tensor) -> Iterator[None]:
    """Within, diffusers' DDPM scheduler draws the rows of `draws` [n, horizon, action] instead of random numbers."""
    rows = iter(draws)
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    with patched(module, "randn_tensor", lambda _: lambda *arguments, **named: next(rows)[None]):
        yield


@contextlib.contextmanager
def _set(config: Any, field: str, value: Any) -> Iterator[None]:
    """Within, a field of a config has another value."""
    with patched(config, field, lambda _: value):
        yield


ADAPTER = DiffusionAdapter()
