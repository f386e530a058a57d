"""A small untrained policy, quick to build."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlaopt.policies.edge_vla.config import BlockConfig, Camera, EdgeVLAConfig, HeadConfig, LanguageConfig, VisionConfig
from vlaopt.policies.edge_vla.model import EdgeVLA
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy, Statistics, build_tokenizer

INSTRUCTIONS = ["open the drawer", "close the window"]


def tiny_config(vocabulary: int) -> EdgeVLAConfig:
    blocks = (
        BlockConfig(kernel=3, expand=16, out=8, se=8, act="relu", stride=2),
        BlockConfig(kernel=5, expand=24, out=8, se=0, act="hardswish", stride=1),
    )
    return EdgeVLAConfig(
        image_size=32,
        chunk_size=6,
        n_action_steps=2,
        max_length=5,
        vocabulary=vocabulary,
        camera=Camera(lookat=(0.0, 0.0, 0.0), azimuth=0.0, elevation=-45.0, distance=1.0),
        vision=VisionConfig(stem=8, blocks=blocks, map_channels=4, features=16),
        language=LanguageConfig(embedding=8, hidden=12, layers=2),
        head=HeadConfig(hidden=(20, 16)),
    )


@pytest.fixture
def policy() -> EdgeVLAPolicy:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(INSTRUCTIONS, 5)
    statistics = Statistics(
        state_mean=np.array([0.0, 0.6, 0.2, 0.5], np.float32),
        state_std=np.array([0.1, 0.1, 0.1, 0.3], np.float32),
        action_mean=np.zeros(4, np.float32),
        action_std=np.full(4, 0.7, np.float32),
    )
    return EdgeVLAPolicy(EdgeVLA(tiny_config(tokenizer.get_vocab_size())), statistics, tokenizer)


@pytest.fixture
def observation() -> dict[str, object]:
    rng = np.random.default_rng(0)
    return {
        "observation.images.front": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "observation.state": np.array([0.0, 0.6, 0.2, 1.0], np.float32),
        "task": "open the drawer",
    }
