"""What pruning removed, as data: it is printed, kept in the artifact and compared. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["l1-unstructured", "channels"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerReport(_Frozen):
    """One layer (or one weight tensor) that pruning looked at or changed.

    `before` and `after` count what `PruneReport.unit` says: output channels of the layer, or non-zero weights.
    A layer that only lost inputs keeps its width and shows it in its parameters.
    """

    scope: str
    amount: float
    before: int = Field(ge=0)
    after: int = Field(ge=0)
    zeros: int = Field(ge=0)
    """Zero weights the layer holds afterwards."""
    parameters_before: int = Field(ge=0)
    parameters_after: int = Field(ge=0)
    macs_before: int = Field(ge=0)
    macs_after: int = Field(ge=0)


class KeptWidth(_Frozen):
    """A width that was asked for and left alone, by the layer that makes it, and why."""

    scope: str
    reason: str


class PruneReport(_Frozen):
    """What one pruning did to a policy, in parameters and in multiply-accumulates (MACs) of one call with the example.

    Zeros are multiplied like any other weight by every backend of vlaopt, so unstructured pruning leaves MACs as they
    were. `zero_fraction` is zero weights / parameters over the layers listed.
    """

    method: Method
    unit: Literal["channels", "weights"]
    amount: float
    """The amount asked for; where scopes ask for different amounts, the largest."""
    layers: tuple[LayerReport, ...]
    kept: tuple[KeptWidth, ...] = ()
    parameters_before: int = Field(ge=0)
    parameters_after: int = Field(ge=0)
    macs_before: int = Field(ge=0)
    macs_after: int = Field(ge=0)
    zero_fraction: float = Field(ge=0.0, le=1.0)
