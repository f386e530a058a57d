"""A component's quantized graph by its plan, checked: one path from plan to graph, for the chain and for trials."""

from __future__ import annotations

from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import component_path
from vlaopt.backends import Placement
from vlaopt.errors import StageError
from vlaopt.graph.check import check
from vlaopt.graph.external import decode, encode
from vlaopt.quantization.casts import mark, write_casts
from vlaopt.quantization.dynamic import write_dynamic
from vlaopt.quantization.lowbit import write_lowbit
from vlaopt.quantization.placement import write_qdq
from vlaopt.quantization.plan import ComponentPlan, WeightScales
from vlaopt.quantization.structure import structural_check
from vlaopt.quantization.weights import REDUCED_LIMIT, WEIGHT_LIMIT
from vlaopt.target import Target


def write(
    name: str, plain: Graph, component: ComponentPlan, target: Target, weights: WeightScales, placement: Placement
) -> Graph:
    """The quantized graph of the component `name` for a kind of backend, its weights as the machines of `target` want.

    `plain` is the FP32 graph that the plan was made for. Raises StageError when it is another one, when nothing came of
    the plan, or when the graph breaks the rules for its kind of backend.
    """
    if plain.digest != component.graph_digest:
        raise StageError(f"the quantization plan of {name} was made for another graph", hint="run quantize again")
    limit = REDUCED_LIMIT if target.reduce_range else WEIGHT_LIMIT
    model = write_qdq(decode(plain), component, plain.data, placement=placement, weights=weights, limit=limit)
    if component.named("int8-dynamic"):
        model = write_dynamic(model, component, plain.data, weights=weights, limit=limit)
    model = write_lowbit(model, component, plain.data)
    if placement == "openvino":
        model = mark(model, component.half_nodes())
    else:
        model = write_casts(model, component.half_nodes(), plain.data)
    check(model, plain.data, where=component_path(name))
    structural_check(model, placement)
    written = encode(model, name, plain.data)
    if written == plain:
        raise StageError(f"{name} was to be quantized, but its graph did not change")
    return written
