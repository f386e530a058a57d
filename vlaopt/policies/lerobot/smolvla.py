"""LeRobot's SmolVLA (Shukor et al., 2025): `vision`, `prefix` to keys and values, then flow matching by `step`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaopt.artifact.policy_spec import Chunk, Component, Noise, PolicySpec, TensorSpec
from vlaopt.errors import InputError
from vlaopt.policies.checkpoints import CONFIG, read_json
from vlaopt.policies.lerobot import flow
from vlaopt.policies.lerobot.checkpoint import (
    build_policy,
    check_hub_fields,
    lerobot,
    local_folder,
    open_checkpoint,
)
from vlaopt.policies.lerobot.eager import STATE, EagerLeRobot, arrays, given, images, patched, vectors
from vlaopt.policies.lerobot.flow import PREFIX, PREFIX_MASK, STATE_INPUT, STEP, TIME_INPUT, VELOCITY, VISION
from vlaopt.policies.lerobot.processing import LANGUAGE, STATISTICS, open_processing
from vlaopt.policies.lerobot.smolvla_parts import Prefix, Step, Vision, cameras_of, layers_of
from vlaopt.runtime.loop import Tap

SMOLVLA, VLM = "smolvla", "vlm_model_name"
FEATURES = "image_features"


class EagerSmolVLA(EagerLeRobot):
    """SmolVLA in eager PyTorch."""

    def describe(self) -> PolicySpec:
        config, processing = self.processing.config, self.processing
        frames = images(processing, cameras_of(config))
        sentence, state = processing.sentence("tokens", "token_mask"), vectors(processing)[0]
        chunk = (1, config.chunk_size, config.max_action_dim)
        features = TensorSpec(name=FEATURES, dtype="float32", shape=self._features_shape())
        prefix, mask = self._prefix()
        return PolicySpec(
            schema="vlaopt.policy/1",
            type=SMOLVLA,
            action_dim=config.action_feature.shape[0],
            control_hz=self.checkpoint.control_hz,
            components={
                VISION: Component(kind="vision", inputs=given(frames), outputs=(features,)),
                PREFIX: Component(kind="prefix", inputs=(features, *given([state, sentence])), outputs=(mask, *prefix)),
                STEP: Component(
                    kind="step",
                    inputs=(
                        TensorSpec(name=STATE_INPUT, dtype="float32", shape=chunk),
                        TensorSpec(name=TIME_INPUT, dtype="float32", shape=(1,)),
                        mask,
                        *prefix,
                    ),
                    outputs=(TensorSpec(name=VELOCITY, dtype="float32", shape=chunk),),
                ),
            },
            loop=flow.euler(config.num_steps),
            noise=Noise(law="normal", shape=chunk),
            guidance=flow.guidance(config.rtc_config),
            chunk=Chunk(size=config.chunk_size, n_action_steps=config.n_action_steps),
            preprocess=(*frames, state, sentence),
            postprocess=processing.unnormalise(STATE_INPUT),
            statistics=STATISTICS,
        )

    def components(self) -> dict[str, nn.Module]:
        return {VISION: Vision(self.policy), PREFIX: Prefix(self.policy), STEP: Step(self.policy)}

    def predict(self, batches: list[dict[str, Any]], noise: torch.Tensor | None, tap: Tap | None) -> torch.Tensor:
        self.policy.reset()
        with contextlib.ExitStack() as stack:
            if tap:
                _Watch(self.policy, self.spec, tap).enter(stack)
            chunk: torch.Tensor = self.policy.predict_action_chunk(batches[0], noise=noise)
        return chunk

    def _features_shape(self) -> tuple[int, ...]:
        """Cameras, tokens for each, and their width."""
        config, network = self.processing.config, self.policy.model.vlm_with_expert
        vlm = network.config
        width, height = config.resize_imgs_with_padding
        patch = vlm.vision_config.patch_size
        tokens = (height // patch) * (width // patch) // vlm.scale_factor**2
        return len(cameras_of(config)) + config.empty_cameras, tokens, vlm.text_config.hidden_size

    def _prefix(self) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
        """The tensors of the cache, and which of its places are no padding."""
        config, text = self.processing.config, self.policy.model.vlm_with_expert.config.text_config
        cameras, tokens, _ = self._features_shape()
        marks = 3 if config.add_image_special_tokens else 0
        sentence = self.processing.sentence("tokens", "token_mask").max_length
        length = max(cameras * (tokens + marks) + sentence + 1, config.prefix_length)
        shape = (1, length, text.num_key_value_heads, text.head_dim)
        cache = flow.cache_tensors(layers_of(self.policy), shape)
        return cache, TensorSpec(name=PREFIX_MASK, dtype="bool", shape=(1, length))


class _Watch:
    """Sees what SmolVLA's own forward pass computes where the components are cut, through its own methods."""

    def __init__(self, policy: Any, spec: PolicySpec, tap: Tap) -> None:
        self._policy = policy
        self._frames = [tensor.name for tensor in spec.components[VISION].inputs]
        self._layers = layers_of(policy)
        self._tap = tap
        self._features: list[torch.Tensor] = []
        self._given: dict[str, torch.Tensor] = {}

    def enter(self, stack: contextlib.ExitStack) -> None:
        """Watch until `stack` is left."""
        policy, model = self._policy, self._policy.model
        watched: list[tuple[Any, str, Any]] = [
            (policy, "prepare_images", self._images),
            (policy, "prepare_state", self._state),
            (model.vlm_with_expert, "embed_image", self._image),
            (model, "embed_prefix", self._prefix),
            (model.vlm_with_expert, "forward", self._cache),
            (model, "denoise_step", self._step),
        ]
        for owner, name, wrap in watched:
            stack.enter_context(patched(owner, name, wrap))

    def _images(self, prepare: Any) -> Any:
        def seen(batch: Mapping[str, torch.Tensor]) -> Any:
            cameras = cameras_of(self._policy.config)
            self._given = {name: batch[camera] for name, camera in zip(self._frames, cameras, strict=True)}
            return prepare(batch)

        return seen

    def _state(self, prepare: Any) -> Any:
        def seen(batch: Mapping[str, torch.Tensor]) -> Any:
            self._given["state"] = batch[STATE]
            return prepare(batch)

        return seen

    def _image(self, embed: Any) -> Any:
        def seen(image: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = embed(image)
            self._features.append(features)
            return features

        return seen

    def _prefix(self, embed: Any) -> Any:
        def seen(frames: Any, masks: Any, tokens: Any, token_mask: Any, state: Any = None) -> Any:
            embedded = embed(frames, masks, tokens, token_mask, state=state)
            features = {FEATURES: torch.cat(self._features)}
            self._tap(VISION, arrays({name: self._given[name] for name in self._frames}), arrays(features))
            self._given = {**features, "state": self._given["state"], "tokens": tokens, "token_mask": token_mask}
            self._mask = embedded[1]
            return embedded

        return seen

    def _cache(self, forward: Any) -> Any:
        def seen(*arguments: Any, **named: Any) -> Any:
            result = forward(*arguments, **named)
            if named.get("fill_kv_cache"):
                self._tap(PREFIX, arrays(self._given), arrays({PREFIX_MASK: self._mask, **self._flat(result[1])}))
            return result

        return seen

    def _step(self, denoise: Any) -> Any:
        def seen(*, x_t: Any, prefix_pad_masks: Any, past_key_values: Any, timestep: Any) -> torch.Tensor:
            velocity: torch.Tensor = denoise(
                x_t=x_t, prefix_pad_masks=prefix_pad_masks, past_key_values=past_key_values, timestep=timestep
            )
            inputs = {STATE_INPUT: x_t, TIME_INPUT: timestep, PREFIX_MASK: prefix_pad_masks}
            self._tap(STEP, arrays({**inputs, **self._flat(past_key_values)}), arrays({VELOCITY: velocity}))
            return velocity

        return seen

    def _flat(self, cache: flow.Cache) -> dict[str, torch.Tensor]:
        return dict(zip(flow.cache_names(self._layers), flow.flat(cache, self._layers), strict=True))


class SmolVLAAdapter:
    """See `vlaopt.policies.PolicyAdapter`."""

    def load(
        self, checkpoint: Path, hub_overrides: Mapping[str, Path], config_overrides: Mapping[str, Any]
    ) -> EagerSmolVLA:
        """Needs a folder for what `vlm_model_name` names: config and tokenizer of the VLM, no weights."""
        check_hub_fields(hub_overrides, (VLM,), SMOLVLA)
        policy_class = lerobot("policies.smolvla.modeling_smolvla").SmolVLAPolicy
        value = read_json(checkpoint / CONFIG) if (checkpoint / CONFIG).is_file() else {}
        fixed = {"pad_language_to": "max_length"}
        opened = open_checkpoint(checkpoint, policy_class.config_class, config_overrides, fixed)
        vlm = local_folder(VLM, value, hub_overrides, checkpoint / CONFIG)
        _check_vlm(vlm)
        _check_config(opened.config, checkpoint / CONFIG)
        opened.config.vlm_model_name = str(vlm)
        processing = open_processing(opened, LANGUAGE, vlm)
        return EagerSmolVLA(opened, processing, build_policy(policy_class, opened))


def _check_config(config: Any, path: Path) -> None:
    """Raises InputError for what a SmolVLA may ask for and is not carried."""
    if config.adapt_to_pi_aloha:
        raise InputError(
            "the conversion to and from Aloha's joints is not carried",
            where=f"{path}:adapt_to_pi_aloha",
            hint="use a checkpoint that was trained without it",
        )
    if not config.use_cache:
        raise InputError("LeRobot cannot denoise without a cache", where=f"{path}:use_cache")
    if not cameras_of(config):
        raise InputError("has no camera", where=f"{path}:input_features")


def _check_vlm(folder: Path) -> None:
    """Raises InputError unless `folder` is that of a SmolVLM, and when it asks for code of its own."""
    config = read_json(folder / CONFIG)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "smolvlm":
        raise InputError(f"model_type is {kind!r}, needed is 'smolvlm'", where=str(folder / CONFIG))
    for file in sorted(folder.glob("*.json")):
        value = config if file.name == CONFIG else read_json(file)
        if isinstance(value, dict) and "auto_map" in value:
            raise InputError("auto_map names code to run", where=str(file), hint="remove it: LeRobot needs none")


ADAPTER = SmolVLAAdapter()
