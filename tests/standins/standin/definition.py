"""Networks and what fills them: the parser, tensors, layers."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

from standin import layers, parsing
from standin.logger import say
from standin.network import ByHand
from standin.onnx_file import OnnxGraph


class INetworkDefinition(ByHand):
    """Filled by the parser, or, as far as `ByHand` goes, layer by layer."""

    num_inputs = property(lambda self: len(self._io[0]))
    num_outputs = property(lambda self: len(self._io[1]))
    num_layers = property(lambda self: len(self._layers))
    flags = property(lambda self: self._flags)
    has_implicit_batch_dimension = property(lambda self: False)
    builder = property(lambda self: self._builder)

    def _get_name(self) -> str:
        return self._name

    def _set_name(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError("name is a str")
        self.__dict__["_name"] = value

    name = property(_get_name, _set_name)

    def get_input(self, index: int) -> Any:
        return self._io[0][index] if 0 <= index < len(self._io[0]) else None

    def get_output(self, index: int) -> Any:
        return self._io[1][index] if 0 <= index < len(self._io[1]) else None

    def get_layer(self, index: int) -> Any:
        return self._layers[index] if 0 <= index < len(self._layers) else None

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)


class ITensor:
    name = property(lambda self: self._name, lambda self, value: self.__dict__.update(_name=str(value)))
    dtype = property(lambda self: self._dtype)
    shape = property(lambda self: self._surface.names["Dims"](self._shape))
    is_network_input = property(lambda self: self._mode == "input")
    is_network_output = property(lambda self: self._mode == "output")
    is_shape_tensor = property(lambda self: False)
    is_execution_tensor = property(lambda self: True)
    location = property(lambda self: self._surface.names["TensorLocation"].DEVICE)

    def get_dimension_name(self, index: int) -> Any:
        name = self._dims[index] if 0 <= index < len(self._dims) else None
        return name if isinstance(name, str) and name != "?" else None


class ILayer:
    name = property(lambda self: self._name)
    type = property(lambda self: self._type)
    metadata = property(lambda self: self._metadata)
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def _get_precision(self) -> Any:
        return self._precision or self._surface.names["DataType"].FLOAT

    def _set_precision(self, value: Any) -> None:
        if not isinstance(value, self._surface.names["DataType"]):
            raise TypeError("precision is a DataType")
        self.__dict__["_precision"] = value

    precision = property(_get_precision, _set_precision)
    precision_is_set = property(lambda self: self._precision is not None)

    def reset_precision(self) -> None:
        self.__dict__["_precision"] = None

    def get_input(self, index: int) -> Any:
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index: int) -> Any:
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    def get_output_type(self, index: int) -> Any:
        return self._types.get(index) or self._outputs[index].dtype

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._types[index] = dtype

    def output_type_is_set(self, index: int) -> bool:
        return index in self._types

    def reset_output_type(self, index: int) -> None:
        self._types.pop(index, None)


class OnnxParser:
    num_errors = property(lambda self: len(self._errors))
    num_subgraphs = property(lambda self: 1 if self._network._graph is not None else 0)
    flags = property(lambda self: self._flags, lambda self, value: self.__dict__.update(_flags=int(value)))

    def __init__(self, network: Any, logger: Any) -> None:
        self.__dict__.update(_network=network, _logger=logger, _errors=[], _flags=1)
        network.__dict__["_parser"] = weakref.ref(self)

    def parse(self, model: Any, path: str | None = None) -> bool:
        return _parse(self, bytes(model), Path(path).parent if path else None)

    def parse_from_file(self, model: str) -> bool:
        try:
            data = Path(model).read_bytes()
        except OSError:
            say(self._logger, "ERROR", f"Failed to open file: {model}")
            return False
        return _parse(self, data, Path(model).parent)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        return op_name not in parsing.UNSUPPORTED

    def set_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []


def _parse(parser: Any, data: bytes, folder: Path | None) -> bool:
    surface, network = parser._surface, parser._network
    if surface.settings.has("parser-crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    found = parsing.parse(data, folder, strong=network._strong, lane=surface.lane)
    for message in found.warnings:
        say(parser._logger, "WARNING", message)
    if found.fault is not None or found.graph is None:
        fault = found.fault
        for message in fault.log() if fault else ["Failed to parse ONNX model from file"]:
            say(parser._logger, "ERROR", message)
        if fault:
            code = surface.names["ErrorCode"].__members__[fault.code]
            parser._errors.append(surface.names["ParserError"].make(_fault=fault, _code=code))
        return False
    network.__dict__.update(_graph=found.graph, _model=data, _data=found.data, _data_name=found.data_name)
    _fill(surface, network, found.graph)
    return True


class ParserError:
    def code(self) -> Any:
        return self._code

    def desc(self) -> str:
        return str(self._fault.description)

    def file(self) -> str:
        return str(self._fault.file)

    def func(self) -> str:
        return str(self._fault.function)

    def line(self) -> int:
        return int(self._fault.line)

    def node(self) -> int:
        return int(self._fault.index)

    def node_name(self) -> str:
        return str(self._fault.node)

    def node_operator(self) -> str:
        return str(self._fault.operator)

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


def _fill(surface: Any, network: Any, graph: OnnxGraph) -> None:
    names = surface.names

    def tensor(name: str, kind: str, shape: Any = (), mode: str = "") -> Any:
        numbers = [size if isinstance(size, int) else -1 for size in shape]
        dtype = data_type(surface, kind)
        return names["ITensor"].make(_name=name, _dtype=dtype, _shape=numbers, _dims=list(shape), _mode=mode)

    inputs = [tensor(port.name, port.type, port.shape, "input") for port in graph.inputs]
    outputs = [tensor(port.name, port.type, port.shape, "output") for port in graph.outputs]
    network.__dict__["_io"] = (inputs, outputs)
    made = []
    for name, weight in graph.weights.items():
        given = tensor(name, weight.type, weight.shape)
        made.append(_layer(surface, name, "CONSTANT", None, [], [given]))
    for node in graph.nodes:
        sides = [
            [tensor(name, graph.types.get(name, "FLOAT")) for name in side if name]
            for side in (node.inputs, node.outputs)
        ]
        made.append(_layer(surface, node.name, layers.LAYER_TYPES.get(node.operator, "IDENTITY"), node, *sides))
    network.__dict__["_layers"] = made


def _layer(surface: Any, name: str, kind: str, node: Any, inputs: list[Any], outputs: list[Any]) -> Any:
    known = surface.names["LayerType"].__members__
    return surface.names["ILayer"].make(
        _name=name, _type=known.get(kind, known["IDENTITY"]), _metadata=f"[ONNX Layer: {name}]" if node else "",
        _inputs=inputs, _outputs=outputs, _node=node, _precision=None, _types={},
    )  # fmt: skip


def data_type(surface: Any, kind: str) -> Any:
    """The library's name for an ONNX element type; it has no float64 and no unsigned 16-bit."""
    known = surface.names["DataType"].__members__
    return known[kind] if kind in known else known["FLOAT" if kind == "DOUBLE" else "INT32"]


WRITTEN = {kind.__name__: kind for kind in (INetworkDefinition, ITensor, ILayer, OnnxParser, ParserError)}
