"""What lower precision gains on machines that are not this one: an estimate by multiply-adds, and told as one."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto

from vlaopt.quantization.plan import NodeScheme
from vlaopt.quantization.weights import layers

TIME: Mapping[NodeScheme, float] = {"int8": 0.5, "fp8": 0.5, "fp16": 0.5, "bf16": 0.5}
"""Time of a multiply-add against FP32; 1 for schemes that only store. Assumed, measured nowhere: it ranks layers by
their work and says nothing of the speed of a machine."""


def estimated_ms(model: ModelProto, schemes: Mapping[str, NodeScheme], plain_ms: float) -> float:
    """Milliseconds of a component with these schemes by node, where it takes `plain_ms` in FP32.

    All its time is taken to be that of its multiply-adds; a graph without any gains nothing.
    """
    work = {name: layer.multiply_adds for name, layer in layers(model).items()}
    total = sum(work.values())
    if not total:
        return plain_ms
    saved = sum(work.get(name, 0.0) * (1 - TIME.get(scheme, 1.0)) for name, scheme in schemes.items())
    return plain_ms * (1 - saved / total)
