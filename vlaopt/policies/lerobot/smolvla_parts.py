"""SmolVLA's components: its own modules, called one part at a time instead of by its `sample_actions`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlaopt.policies.lerobot import flow
from vlaopt.policies.lerobot.checkpoint import lerobot
from vlaopt.policies.lerobot.eager import STATE, patched


def cameras_of(config: Any) -> list[str]:
    """The features of real cameras, in the config's order; LeRobot adds empty ones to the config itself."""
    empty = {f"observation.images.empty_camera_{index}" for index in range(config.empty_cameras)}
    return [name for name in config.image_features if name not in empty]


def layers_of(policy: Any) -> list[int]:
    """The layers whose keys and values the action expert attends to: those beside which it has a layer of its own."""
    network = policy.model.vlm_with_expert
    experts = network.get_model_layers([network.get_vlm_model().text_model, network.lm_expert])[1]
    return [index for index, layer in enumerate(experts) if layer is not None]


class Vision(nn.Module):
    """Frames float32 [1, 3, H, W] in 0–1, one by one → features [cameras, tokens, width].

    Resizing, padding and the empty cameras are SmolVLA's own; the encoder takes all frames at once.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.model = policy.model
        # Not a submodule: layers have one path, the one they have in the policy.
        self._prepare = policy.prepare_images
        self._cameras = cameras_of(policy.config)

    def forward(self, *frames: torch.Tensor) -> torch.Tensor:
        prepared, _ = self._prepare(dict(zip(self._cameras, frames, strict=True)))
        features: torch.Tensor = self.model.vlm_with_expert.embed_image(torch.cat(prepared))
        return features


class Prefix(nn.Module):
    """Features [cameras, tokens, width], state [1, size], tokens and their mask → prefix mask, keys and values."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.model = policy.model
        self._prepare_state = policy.prepare_state
        self._real = len(cameras_of(policy.config))
        self._layers = layers_of(policy)

    def forward(
        self, features: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor, token_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        network, smolvla = self.model.vlm_with_expert, lerobot("policies.smolvla.modeling_smolvla")
        frames = list(features.split(1))
        seen = [torch.full((1,), index < self._real, dtype=torch.bool) for index in range(len(frames))]
        with patched(network, "embed_image", lambda _: lambda embedded: embedded):
            embeddings, mask, blocks = self.model.embed_prefix(
                frames, seen, tokens, token_mask, state=self._prepare_state({STATE: state})
            )
        _, cache = network.forward(
            attention_mask=smolvla.make_att_2d_masks(mask, blocks),
            position_ids=torch.cumsum(mask, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
            fill_kv_cache=True,
        )
        return mask, *flow.flat(cache, self._layers)


class Step(nn.Module):
    """Noisy actions [1, chunk, width], time [1], prefix mask, keys and values → velocity [1, chunk, width]."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.model = policy.model
        self._layers = layers_of(policy)
        width, config = policy.model.vlm_with_expert.expert_hidden_size, policy.config
        self._embed_time = flow.TimeEmbedding(width, config.min_period, config.max_period)

    def forward(
        self, noisy_actions: torch.Tensor, time: torch.Tensor, mask: torch.Tensor, *cache: torch.Tensor
    ) -> torch.Tensor:
        smolvla, embed = lerobot("policies.smolvla.modeling_smolvla"), self._embed_time
        layers = flow.rebuilt(cache, self._layers)
        # A layer without an expert is looked up, and what is found is not used.
        every = {**dict.fromkeys(range(self.model.vlm_with_expert.num_vlm_layers), layers[0]), **layers}
        with patched(smolvla, "create_sinusoidal_pos_embedding", lambda _: lambda time, *_, **__: embed(time)):
            velocity: torch.Tensor = self.model.denoise_step(
                x_t=noisy_actions,
                prefix_pad_masks=mask,
                past_key_values=every,
                timestep=time,
            )
        return velocity
