"""The network's three modules compose, and its config can always be read back from its layers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from vlaopt.policies.edge_vla.config import Camera, EdgeVLAConfig, reference_config
from vlaopt.policies.edge_vla.model import EdgeVLA, InvertedResidual, config_of
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy

CAMERA = Camera(lookat=(0.0, 0.0, 0.0), azimuth=0.0, elevation=0.0, distance=1.0)


def reference() -> EdgeVLAConfig:
    return reference_config(vocabulary=60, camera=CAMERA, tasks=(), control_hz=80.0)


def test_forward_is_the_head_over_the_two_encoders(policy: EdgeVLAPolicy) -> None:
    module = policy.module
    images, state = torch.rand(2, 3, 32, 32), torch.randn(2, 4)
    tokens = torch.tensor([[2, 3, 0, 0, 0], [3, 2, 2, 0, 0]])
    with torch.inference_mode():
        whole = module(images, state, tokens)
        parts = module.head(module.vision(images), module.language(tokens), state)
    assert whole.shape == (2, 6, 4)
    torch.testing.assert_close(whole, parts)


def test_padding_does_not_change_the_language_features(policy: EdgeVLAPolicy) -> None:
    with torch.inference_mode():
        short = policy.module.language(torch.tensor([[2, 3]]))
        padded = policy.module.language(torch.tensor([[2, 3, 0, 0, 0]]))
    torch.testing.assert_close(short, padded)


def test_an_empty_instruction_gives_finite_features(policy: EdgeVLAPolicy) -> None:
    with torch.inference_mode():
        assert torch.isfinite(policy.module.language(torch.zeros(1, 5, dtype=torch.int64))).all()


def test_the_reference_is_small_enough_for_a_robot() -> None:
    count = sum(value.numel() for value in EdgeVLA(reference()).parameters())
    assert 0.8e6 < count < 2.0e6


def test_reference_widths_are_multiples_of_eight() -> None:
    vision = reference().vision
    assert all(block.expand % 8 == 0 and block.out % 8 == 0 and block.se % 8 == 0 for block in vision.blocks)


def test_the_config_of_an_untouched_module_is_its_own() -> None:
    assert config_of(EdgeVLA(reference())) == reference()


def test_a_narrowed_block_is_just_another_config(policy: EdgeVLAPolicy) -> None:
    module = policy.module
    block = module.vision.blocks[1]
    assert isinstance(block, InvertedResidual)
    narrow(block, keep=16)
    config = config_of(module)
    assert [part.expand for part in config.vision.blocks] == [16, 16]
    rebuilt = EdgeVLA(config).eval()
    rebuilt.load_state_dict(module.state_dict())
    inputs = torch.rand(1, 3, 32, 32), torch.randn(1, 4), torch.tensor([[2, 3, 0, 0, 0]])
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(*inputs), module(*inputs))


def narrow(block: InvertedResidual, keep: int) -> None:
    """Cut the expanded channels of a block without squeeze-excite to the first `keep`."""
    for layer in (block.expand, block.depthwise):
        convolution, norm = layer[0], layer[1]
        convolution.weight = nn.Parameter(convolution.weight[:keep])
        convolution.out_channels = keep
        norm.weight, norm.bias = nn.Parameter(norm.weight[:keep]), nn.Parameter(norm.bias[:keep])
        norm.running_mean, norm.running_var = norm.running_mean[:keep], norm.running_var[:keep]
        norm.num_features = keep
    block.depthwise[0].groups = block.depthwise[0].in_channels = keep
    block.project[0].weight = nn.Parameter(block.project[0].weight[:, :keep])
    block.project[0].in_channels = keep


def test_a_chunk_shorter_than_its_executed_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="n_action_steps 5 is more than chunk_size 4"):
        EdgeVLAConfig.model_validate({**reference().model_dump(), "chunk_size": 4})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        EdgeVLAConfig.model_validate({**reference().model_dump(), "chunk": 4})
