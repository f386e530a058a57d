"""What flow-matching policies of LeRobot share: keys and values as flat tensors, the euler loop, guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlaopt.artifact.policy_spec import EulerLoop, Guidance, TensorSpec

Cache = Mapping[int, Mapping[str, torch.Tensor]]
"""LeRobot's keys and values by layer: `{"key_states": …, "value_states": …}`, each [1, prefix, heads, head]."""

# Of the 24 bits of a float32: 11 for a frequency, 12 for a time below 1, 8 for 2π.
_COARSE_BITS, _NEAR, _TURN = 11, 4096, 6.28125
STEP, PREFIX, VISION = "step", "prefix", "vision"
STATE_INPUT, TIME_INPUT, VELOCITY, PREFIX_MASK = "noisy_actions", "time", "velocity", "prefix_mask"


def cache_names(layers: Sequence[int]) -> list[str]:
    """`key_00`, `value_00` and so on."""
    return [f"{kind}_{layer:02d}" for layer in layers for kind in ("key", "value")]


def cache_tensors(layers: Sequence[int], shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    """The cache of `layers` as tensors of a component, each of `shape`."""
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name in cache_names(layers))


def flat(cache: Cache, layers: Sequence[int]) -> list[torch.Tensor]:
    """The tensors of `cache` in the order of `cache_names`."""
    return [cache[layer][kind] for layer in layers for kind in ("key_states", "value_states")]


def rebuilt(tensors: Sequence[torch.Tensor], layers: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """The opposite of `flat`."""
    pairs = zip(tensors[0::2], tensors[1::2], strict=True)
    return {
        layer: {"key_states": key, "value_states": value} for layer, (key, value) in zip(layers, pairs, strict=True)
    }


def euler(steps: int) -> EulerLoop:
    """From noise at time 1 to actions at time 0, as the flow policies of LeRobot are trained."""
    return EulerLoop(
        steps=steps,
        start=1.0,
        end=0.0,
        step=STEP,
        state_input=STATE_INPUT,
        time_input=TIME_INPUT,
        velocity_output=VELOCITY,
    )


class TimeEmbedding:
    """Sines and cosines of a time [1] in 0–1 → float32 [1, width], as the flow policies of LeRobot, within 4e-7.

    These calculate the angles, up to 1571 radians, in float64. Backends do not: OpenVINO and TensorRT take float64 for
    float32, which turns such an angle by 1e-4. So float32 alone is used here. Angles are counted in turns, of which
    whole ones are dropped, and each product that could lose bits is cut in two: `near` and `coarse` have so few of them
    that theirs is exact, and so is that with `_TURN`.
    """

    def __init__(self, width: int, shortest: float, longest: float) -> None:
        """Periods in a geometric series from `shortest` to `longest`, half as many as `width`."""
        fractions = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
        turns = 1.0 / (shortest * (longest / shortest) ** fractions)
        grid = 2.0 ** (math.ceil(math.log2(float(turns.max()))) - _COARSE_BITS)
        coarse = torch.round(turns / grid) * grid
        self._coarse, self._fine = coarse.float(), (turns - coarse).float()

    def __call__(self, time: torch.Tensor) -> torch.Tensor:
        near = torch.floor(time * _NEAR) / _NEAR
        exact = near[:, None] * self._coarse
        turns = exact - torch.round(exact)
        rest = (time - near)[:, None] * self._coarse + time[:, None] * self._fine
        large, small = turns * _TURN, turns * (2 * math.pi - _TURN) + rest * (2 * math.pi)
        sin, cos = torch.sin(large), torch.cos(large)
        more_sin, more_cos = torch.sin(small), torch.cos(small)
        return torch.cat([sin * more_cos + cos * more_sin, cos * more_cos - sin * more_sin], dim=1)


def guidance(settings: Any) -> Guidance:
    """The defaults of real-time chunking in a config of LeRobot, which may have none."""
    if settings is None:
        return Guidance()
    return Guidance(
        execution_horizon=settings.execution_horizon,
        max_weight=settings.max_guidance_weight,
        schedule=settings.prefix_attention_schedule.value.lower(),
    )
