"""Every size of an edge-vla network and the facts recorded with its checkpoint. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Activation = Literal["relu", "hardswish"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlockConfig(_Frozen):
    """One inverted residual: widths in channels; `se` is the squeeze width, 0 for none.

    Input and output are added when the stride is 1 and both have the same width (MobileNetV3, Howard et al., 2019).
    """

    kernel: Literal[3, 5]
    expand: int = Field(ge=1)
    out: int = Field(ge=1)
    se: int = Field(ge=0)
    act: Activation
    stride: Literal[1, 2]


class VisionConfig(_Frozen):
    """Stem, blocks, a 1x1 convolution to `map_channels`, and a linear layer over the flattened map to `features`."""

    stem: int = Field(ge=1)
    blocks: tuple[BlockConfig, ...] = Field(min_length=1)
    map_channels: int = Field(ge=1)
    features: int = Field(ge=1)


class LanguageConfig(_Frozen):
    """Token embedding and LSTM; the language features are `hidden` wide."""

    embedding: int = Field(ge=1)
    hidden: int = Field(ge=1)
    layers: int = Field(ge=1, le=4)


class HeadConfig(_Frozen):
    """Widths of the hidden layers between the features and the action chunk."""

    hidden: tuple[int, ...] = Field(min_length=1)


class Camera(_Frozen):
    """The view the policy was trained with: a point looked at and a distance in metres, angles in degrees."""

    lookat: tuple[float, float, float]
    azimuth: float
    elevation: float
    distance: float


class Provenance(_Frozen):
    """How the weights came to be."""

    command: str = Field(min_length=1)
    seed: int
    demonstrations: int = Field(ge=0)
    samples: int = Field(ge=0)
    steps: int = Field(ge=0)
    success: dict[str, str] = Field(default_factory=dict)
    """Closed-loop result by task and `total`, as `successes/episodes`."""


class EdgeVLAConfig(_Frozen):
    """`config.json` of an edge-vla checkpoint."""

    type: Literal["edge-vla"] = "edge-vla"
    image_size: int = Field(default=96, ge=32)
    state_size: int = Field(default=4, ge=1)
    action_size: int = Field(default=4, ge=1)
    chunk_size: int = Field(default=10, ge=1)
    n_action_steps: int = Field(default=5, ge=1)
    max_length: int = Field(default=16, ge=1)
    vocabulary: int = Field(ge=2)
    control_hz: float = Field(default=80.0, gt=0)
    camera: Camera
    tasks: tuple[str, ...] = ()
    vision: VisionConfig
    language: LanguageConfig
    head: HeadConfig
    provenance: Provenance | None = None

    @field_validator("image_size")
    @classmethod
    def _image_divides(cls, value: int) -> int:
        if value % 8:
            raise ValueError("must be a multiple of 8")
        return value

    @model_validator(mode="after")
    def _steps_fit_the_chunk(self) -> EdgeVLAConfig:
        if self.n_action_steps > self.chunk_size:
            raise ValueError(f"n_action_steps {self.n_action_steps} is more than chunk_size {self.chunk_size}")
        return self

    @property
    def map_size(self) -> int:
        """Side of the vision map in cells: the image halved by the stem and by every block of stride 2."""
        side = _halved(self.image_size)
        for block in self.vision.blocks:
            side = _halved(side) if block.stride == 2 else side
        return side


def _halved(side: int) -> int:
    return (side + 1) // 2


def reference_vision() -> VisionConfig:
    """The first blocks of a MobileNetV3-small, up to a 12x12 map: fine enough to tell where a handle is."""
    rows: tuple[tuple[Literal[3, 5], int, int, int, Activation, Literal[1, 2]], ...] = (
        (3, 16, 16, 8, "relu", 2),
        (3, 72, 24, 0, "relu", 2),
        (5, 96, 32, 24, "hardswish", 1),
        (3, 128, 40, 32, "hardswish", 1),
    )
    blocks = tuple(
        BlockConfig(kernel=kernel, expand=expand, out=out, se=se, act=act, stride=stride)
        for kernel, expand, out, se, act, stride in rows
    )
    return VisionConfig(stem=16, blocks=blocks, map_channels=16, features=256)


def reference_config(*, vocabulary: int, camera: Camera, tasks: tuple[str, ...], control_hz: float) -> EdgeVLAConfig:
    """The sizes of the shipped policy: 1.2 M parameters."""
    return EdgeVLAConfig(
        vocabulary=vocabulary,
        camera=camera,
        tasks=tasks,
        control_hz=control_hz,
        vision=reference_vision(),
        language=LanguageConfig(embedding=64, hidden=128, layers=2),
        head=HeadConfig(hidden=(384, 384)),
    )
