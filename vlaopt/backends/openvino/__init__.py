"""OpenVINO on the CPU. The engine is an IR (xml and bin); knows no other backend and no onnx."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Placement, Port, Resident, Session, Value, check_feeds
from vlaopt.backends.audit import by_node
from vlaopt.backends.kept import LARGEST, keep, recall
from vlaopt.backends.openvino.ir import BIN, XML, computes_in, convert, reason
from vlaopt.backends.openvino.layers import fused_precisions, fused_products, layers_of
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.hashing import digest_bytes, digest_json
from vlaopt.optional import installed_version, require

LENT_FROM = 1 << 18
"""Bytes from which OpenVINO reads an input where it lies; smaller ones are copied into its own memory. Measured with a
graph that only reads it: 16 KiB copied 4.5 µs, lent 5.9; 256 KiB 14.1 and 13.6; 4 MiB 167 and 80."""
_DEVICE = "CPU"
# vlaopt's word: OpenVINO's hint, and the capability without which OpenVINO would quietly calculate in FP32.
_HINTS = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16")}
_MATRIX_LAYER = re.compile(r"Convolution|Deconvolution|FullyConnected|MatMul|RNN|Attention|Attn|MHA|MLP|QKV")
_CONSTANT_KINDS = ("Const", "Input", "Output")


class OpenVinoSession:
    """A component compiled by OpenVINO; one infer request, so one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = tuple(_port(port, port.node.get_friendly_name()) for port in compiled.inputs)
        self._outputs = tuple(
            _port(port, port.node.get_friendly_name().removesuffix("/sink_port_0")) for port in compiled.outputs
        )
        # OpenVINO's own input tensors; only static shapes have them beforehand.
        static = all(size >= 0 for port in self._inputs for size in port.shape)
        self._own = [self._request.get_input_tensor(i) for i in range(len(self._inputs))] if static else None
        self._held: dict[str, Resident] = {}
        self._lent: dict[int, np.ndarray] = {}
        self._tensor = require("openvino", "cpu").Tensor

    @property
    def inputs(self) -> tuple[Port, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        """Outputs by name, copies but for `resident`. Raises InputError for wrong feeds, StageError when a layer fails.

        A resident output is a view of this request's memory. The session that takes it copies it into its own once,
        however often it runs with it; binding it there instead was slower.
        """
        check_feeds(self._inputs, feeds, BACKEND.name)
        try:
            self._infer(feeds)
        except RuntimeError as error:
            raise StageError(f"OpenVINO failed while it ran: {reason(error)}") from error
        views = {port.name: self._request.get_output_tensor(i).data for i, port in enumerate(self._outputs)}
        return {
            name: Resident(BACKEND.name, view.dtype.name, view.shape, view) if name in resident else view.copy()
            for name, view in views.items()
        }

    def _infer(self, feeds: Mapping[str, Value]) -> None:
        if self._own is None:
            values = [feeds[port.name] for port in self._inputs]
            arrays = [value.value if isinstance(value, Resident) else value for value in values]
            self._request.infer({i: np.asarray(array, order="C") for i, array in enumerate(arrays)})
            return
        for index, port in enumerate(self._inputs):
            value = feeds[port.name]
            if isinstance(value, Resident):
                if self._held.get(port.name) is not value:
                    np.copyto(self._taken_back(index), value.value)
                    self._held[port.name] = value
                continue
            self._held.pop(port.name, None)
            if value.nbytes >= LENT_FROM and value.flags.c_contiguous and value.flags.writeable:
                self._request.set_input_tensor(index, self._tensor(value, shared_memory=True))
                self._lent[index] = value  # which must live as long as OpenVINO knows its memory
            else:
                np.copyto(self._taken_back(index), value)
        self._request.infer()

    def _taken_back(self, index: int) -> np.ndarray:
        """OpenVINO's own memory of an input, which is what it reads again."""
        assert self._own is not None
        if self._lent.pop(index, None) is not None:
            self._request.set_input_tensor(index, self._own[index])
        data: np.ndarray = self._own[index].data
        return data


class OpenVinoBackend:
    """Builds and opens components with OpenVINO's CPU plugin.

    Layers that are not quantized compute in FP32, but for nodes that the graph marks for bf16 or fp16. OpenVINO is
    always told: left alone, it takes bf16 on a CPU that has it, and an FP32 component would not be one.
    """

    name = "openvino"
    placement: Placement = "openvino"
    settings: Mapping[str, Any] = MappingProxyType({})
    native = False
    timed = True

    def missing(self) -> str | None:
        found = importlib.util.find_spec("openvino")
        return None if found else "openvino is not installed: pip install 'vlaopt[cpu]'"

    def version(self) -> str:
        found = installed_version("openvino")
        if found is None:
            raise EnvironmentProblem("openvino is not installed", hint="pip install 'vlaopt[cpu]'")
        return found

    def runnable(self) -> str | None:
        return self.missing()

    def machine(self) -> Mapping[str, str]:
        return {}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        """Convert `graph` to an IR and name, in the compiled IR, the matrix layers and their precision.

        Weights keep their precision. Equal graphs give equal bytes. OpenVINO does not tell the precision of products
        that it fused into an attention kernel: `fused_precisions` finds it where it can, else it is unknown. Raises
        StageError with OpenVINO's reason.
        """
        files = convert(graph)
        model, compiled = _compile(files, _config(files, options))
        layers = layers_of(compiled)
        precisions = Counter(layer.precision for layer in layers if _MATRIX_LAYER.search(layer.kind))
        others = Counter(
            layer.kind for layer in layers if not _MATRIX_LAYER.search(layer.kind) and layer.kind not in _CONSTANT_KINDS
        )
        notes = ["other layers: " + (", ".join(f"{n} {kind}" for kind, n in sorted(others.items())) or "none")]
        kernels = [(layer.origins, layer.precision) for layer in layers if _MATRIX_LAYER.search(layer.kind)]
        named = by_node(graph.nodes(), kernels)
        if fused := fused_products(model, layers):
            shown = fused_precisions(graph.nodes(), layers, named)
            precisions.update(shown.values())
            named |= shown
            notes.append(
                f"{fused} matrix products named in fused layers; what reaches {len(shown)} in such layers shows their "
                "precision, that of others is not told"
            )
        return Engine(
            files,
            dict(sorted(precisions.items())),
            tuple(notes),
            named,
            facts={"computes_in": computes_in(files[XML])},
        )

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        """A session from the IR's bytes; no file touched but in `options.cache`.

        Raises InputError when a file is missing or damaged.
        """
        if set(files) != {XML, BIN}:
            raise InputError(f"an openvino engine is {XML} and {BIN}, not {', '.join(sorted(files)) or 'none'}")
        config = _config(files, options)
        cache = options.cache if sum(map(len, files.values())) <= LARGEST else None
        key = _key(files, config) if cache else ""
        if cache and (kept := _recalled(cache, key, config)):
            return OpenVinoSession(kept)
        try:
            _, compiled = _compile(files, config)
        except StageError as error:
            raise InputError(error.message, where=XML, hint="build the engine again") from error
        if cache:
            keep(cache, key, compiled.export_model().getvalue())
        return OpenVinoSession(compiled)


BACKEND = OpenVinoBackend()


def _config(files: Mapping[str, bytes], options: EngineOptions) -> dict[str, Any]:
    """OpenVINO's properties for an IR. Raises EnvironmentProblem when this CPU lacks the precision that it says."""
    if options.settings:
        raise InputError(f"unknown openvino setting {min(options.settings)!r}", hint="openvino has no settings")
    if options.threads < 0:
        raise InputError(f"threads cannot be negative: {options.threads}")
    precision = computes_in(files[XML])
    hint, capability = _HINTS[precision]
    if capability not in require("openvino", "cpu").Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
        raise EnvironmentProblem(f"this CPU does not calculate in {precision}", hint="take fp32 (quantize.floats)")
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": options.threads,
        # Otherwise activations before compressed weights are quantized although the graph does not say so.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


def _compile(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model of an IR, and that model compiled.

    Where Snippets, which generates code for fused layers, fails on the model, it is compiled without: seen with 2026.4
    and Mish between quantized convolutions on one thread.
    """
    core = require("openvino", "cpu").Core()
    try:
        model = core.read_model(files[XML], files[BIN])
        try:
            return model, core.compile_model(model, _DEVICE, dict(config))
        except RuntimeError as error:
            if "snippets" not in str(error):
                raise
            return model, core.compile_model(model, _DEVICE, {**config, "SNIPPETS_MODE": "DISABLE"})
    except RuntimeError as error:
        raise StageError(f"OpenVINO cannot compile the IR: {reason(error)}") from error


def _key(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """Identity of what `_compile` makes here: the IR, the properties, OpenVINO to the build, and the CPU."""
    ov = require("openvino", "cpu")
    core = ov.Core()
    cpu = [str(core.get_property(_DEVICE, name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    digests = {name: digest_bytes(data) for name, data in files.items()}
    return digest_json({"files": digests, "config": dict(config), "openvino": ov.get_version(), "cpu": cpu})


def _recalled(cache: Path, key: str, config: Mapping[str, Any]) -> Any:
    """The compiled model kept under `key`, or None: what OpenVINO does not take any more is compiled again."""
    data = recall(cache, key)
    if data is None:
        return None
    try:
        return require("openvino", "cpu").Core().import_model(data, _DEVICE, dict(config))
    except RuntimeError:
        return None


def _port(port: Any, name: str) -> Port:
    kind = port.get_element_type()
    try:
        dtype = np.dtype(kind.to_dtype()).name
    except (RuntimeError, TypeError) as error:
        raise StageError(f"{name!r} is {kind.get_type_name()}, which numpy cannot hold") from error
    shape = tuple(-1 if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    return Port(name if name in port.get_names() else port.get_any_name(), dtype, shape)
