"""OpenVINO's IR of a graph: the files of an engine, which say themselves what its layers compute in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from vlaopt.artifact.graph import Graph, Node
from vlaopt.backends import graph_on_disk, scratch_folder
from vlaopt.errors import InputError, StageError
from vlaopt.optional import require

XML, BIN = "model.xml", "model.bin"
_COMPUTES_IN = ["vlaopt", "computes_in"]


def convert(graph: Graph) -> dict[str, bytes]:
    """The IR of a graph, weights in their own precision; equal graphs give equal bytes.

    Where nodes are marked to compute in halves, the IR says which, and all others stay in FP32. Raises StageError with
    OpenVINO's reason.
    """
    ov = require("openvino", "cpu")
    with scratch_folder() as folder, graph_on_disk(graph) as source:
        try:
            model = ov.Core().read_model(source)
        except RuntimeError as error:
            raise StageError(f"OpenVINO refuses the graph: {reason(error)}") from error
        _number_unnamed(model)
        nodes = graph.nodes()
        half = _half(nodes)
        exact: set[str] = set()
        if half:
            model.set_rt_info(half, _COMPUTES_IN)
            exact = _exact(model, nodes)
            exact |= _bias_apart(model, exact)
        try:
            ov.save_model(model, folder / XML, compress_to_fp16=False)
        except RuntimeError as error:
            raise StageError(f"OpenVINO cannot write the IR: {reason(error)}") from error
        xml = (folder / XML).read_bytes()
        return {XML: _kept_exact(xml, exact) if half else xml, BIN: (folder / BIN).read_bytes()}


def computes_in(xml: bytes) -> str:
    """What the layers of an IR compute in unless they are kept exact: fp32, bf16 or fp16."""
    found = re.search(rb'<computes_in value="(\w+)"', xml)
    return found[1].decode() if found else "fp32"


def reason(error: Exception) -> str:
    """OpenVINO's message on one line: what it says, or, when it says nothing, the check that failed."""
    checks, rest = [], []
    for line in filter(None, (line.strip() for line in str(error).splitlines())):
        if failed := re.match(r"Check '(.+)' failed at \S+?:\d+:?\s*(.*)", line):
            checks.append(f"check '{failed[1]}' failed")
            line = failed[2]
        if line and not re.match(r"Exception from \S+:\d+:|FrontEnd API failed with \w+:|Summary:", line):
            rest.append(re.sub(r"^-- ", "", line).split(" To facilitate ")[0])
    kept = [line for line in rest if not line.startswith("To facilitate the conversion")]
    named = [line for line in kept if re.search(r"[Nn]ode|[Ll]ayer|operation", line)]
    return "; ".join(dict.fromkeys(named or kept or checks)) or "it gives no reason"


def _half(nodes: Sequence[Node]) -> str | None:
    """The type that nodes are marked to compute in, or None. Raises InputError where they are of several."""
    marked = sorted({node.computes_in for node in nodes if node.computes_in})
    if len(marked) > 1:
        raise InputError(f"OpenVINO computes in one type beside FP32, and nodes are marked for {' and '.join(marked)}")
    return marked[0] if marked else None


def _exact(model: Any, nodes: Sequence[Node]) -> set[str]:
    """The names of the model's operations that come of nodes which are not marked.

    What OpenVINO makes several operations of carries the node's name in the last of them, which the others lead to.
    """
    named: Mapping[str, Node] = {name: node for node in nodes for name in (*node.outputs, node.name) if name}
    owner: dict[str, Node | None] = {}
    for operation in reversed(model.get_ordered_ops()):
        takers = [
            taken.get_node().get_friendly_name() for out in operation.outputs() for taken in out.get_target_inputs()
        ]
        name = operation.get_friendly_name()
        owner[name] = named.get(name) or next((owner[taker] for taker in takers if owner.get(taker)), None)
    return {name for name, node in owner.items() if node and not node.computes_in}


def _bias_apart(model: Any, exact: set[str]) -> set[str]:
    """Clamp exact products to all finite numbers, in front of their bias; the names of what was put in.

    OpenVINO 2026.4 makes one operation of product and bias, and forgets that they were to be exact. It computes the
    clamp with them all the same.
    """
    largest = float(np.finfo(np.float32).max)
    clamp = require("openvino.opset13", "cpu").clamp
    found = set()
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        if operation.get_type_name() == "MatMul" and name in exact:
            takers = operation.output(0).get_target_inputs()
            apart = clamp(operation, -largest, largest, name=f"{name}/finite")
            for taken in takers:
                taken.replace_source_output(apart.output(0))
            found.add(apart.get_friendly_name())
    return found


def _kept_exact(xml: bytes, names: set[str]) -> bytes:
    """The IR with what OpenVINO writes for operations that are not to be converted to a smaller type.

    `precise` is its attribute DisablePrecisionConversion, which Python cannot set.
    """
    root = ElementTree.fromstring(xml)
    for layer in root.iter("layer"):
        if layer.get("name") in names and layer.get("type") not in ("Const", "Parameter", "Result"):
            told = layer.find("rt_info")
            if told is None:
                told = ElementTree.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, told)
            ElementTree.SubElement(told, "attribute", name="precise", version="0")
    return ElementTree.tostring(root)


def _number_unnamed(model: Any) -> None:
    """Rename what OpenVINO named after a counter of the whole process, so that equal graphs give equal bytes."""
    for index, operation in enumerate(model.get_ordered_ops()):
        kind = operation.get_type_name()
        unnamed = re.fullmatch(re.escape(kind) + r"_\d+", operation.get_friendly_name())
        if unnamed and not any(output.get_names() for output in operation.outputs()):
            operation.set_friendly_name(f"{kind}_unnamed_{index}")
