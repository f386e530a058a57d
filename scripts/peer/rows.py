"""The rows: how each library is built and run, as its own documentation says and with its own defaults.

A row is built for each component in a process that ends, and opened in another that stays. What a row imports is
imported in it, so that no row carries another's libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.subjects import Subject
from vlaopt.backends import Port, Value, graph_on_disk
from vlaopt.tensors import Array

Build = Callable[[Subject, str, Path], None]
Open = Callable[[Subject, str, Path, int], "RowSession"]
VLAOPT = "vlaopt"
"""The row that is vlaopt's own artifact: the others' latencies are told as multiples of its."""


@dataclass(frozen=True)
class Row:
    """One way to run a policy. `build(subject, component, folder)`; `open(subject, component, folder, threads)`."""

    label: str
    open: Open
    build: Build | None = None


class RowSession:
    """A component: feeds by name to outputs by name. `size` in bytes."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    size = 0

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        raise NotImplementedError


class _Torch(RowSession):
    """A module, called with the tensors in the order its component lists them."""

    def __init__(self, subject: Subject, component: str, change: Callable[..., Any], *, autocast: bool = False) -> None:
        import torch

        # Mapped, so that weights which the component refers to and never uses stay on the disk.
        module = torch.load(Path(subject.modules) / f"{component}.pt", weights_only=False, mmap=True).eval()
        self.size = 4 * subject.parameters[component]
        listed = subject.spec.components[component]
        self._names, self._outputs = [t.name for t in listed.inputs], [t.name for t in listed.outputs]
        first = next(subject.feeds(component))
        with torch.inference_mode():
            self._module = change(module, tuple(torch.from_numpy(first[name].copy()) for name in self._names))
        self._torch, self._autocast = torch, autocast

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        torch = self._torch
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            given = self._module(*(torch.from_numpy(feeds[name]) for name in self._names))
        results = given if isinstance(given, tuple) else (given,)
        return {
            name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            for name, value in zip(self._outputs, results, strict=True)
        }


def _eager(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
    return _Torch(subject, component, lambda module, example: module)


def _compiled(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
    import torch

    return _Torch(subject, component, lambda module, example: torch.compile(module))


def _script(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
    import torch

    def traced(module: Any, example: tuple[Any, ...]) -> Any:
        return torch.jit.freeze(torch.jit.trace(module, example, check_trace=False))

    return _Torch(subject, component, traced)


def _bf16(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
    return _Torch(subject, component, lambda module, example: module, autocast=True)


class _Ort(RowSession):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]
        self.size = _size(path)

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        return dict(zip(self._names, self._session.run(None, dict(feeds)), strict=True))


def _ort(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
    return _Ort(folder / f"{component}.onnx", threads)


def _export(subject: Subject, component: str, folder: Path) -> None:
    for name, data in subject.graph(component).files(f"{component}.onnx").items():
        (folder / name).write_bytes(data)


def _ort_static(*, advised: bool) -> Build:
    """`quantize_static` by its defaults, or by what ONNX Runtime's documentation advises for AVX2: uint8 activations,
    weights of 7 bits by channel."""

    def build(subject: Subject, component: str, folder: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._feeds = subject.feeds(component)

            def get_next(self) -> dict[str, Array] | None:
                return next(self._feeds, None)

        prepared = _prepared(subject, component, folder)
        settings = {"activation_type": QuantType.QUInt8, "per_channel": True, "reduce_range": True} if advised else {}
        quantize_static(prepared, folder / f"{component}.onnx", Reader(), **settings)
        prepared.unlink()

    return build


def _ort_dynamic(subject: Subject, component: str, folder: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    prepared = _prepared(subject, component, folder)
    quantize_dynamic(prepared, folder / f"{component}.onnx")
    prepared.unlink()


def _prepared(subject: Subject, component: str, folder: Path) -> Path:
    """The graph after ONNX Runtime's own `quant_pre_process`, as both of its quantizers ask for."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / "prepared.onnx"
    with graph_on_disk(subject.graph(component)) as source:
        quant_pre_process(source, prepared)
    return prepared


class _OpenVino(RowSession):
    def __init__(self, path: Path, threads: int, **hints: str) -> None:
        import openvino as ov

        core = ov.Core()
        wants_bf16 = hints.get("INFERENCE_PRECISION_HINT") == "bf16"
        if wants_bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise NotImplementedError("this CPU does not calculate in bf16")
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **hints}
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._names = [output.get_any_name() for output in compiled.outputs]
        self.size = _size(path) + (_size(path.with_suffix(".bin")) if path.suffix == ".xml" else 0)

    def run(self, feeds: Mapping[str, Value], resident: Collection[str] = ()) -> dict[str, Any]:
        given = self._request.infer(dict(feeds), share_inputs=True, share_outputs=True)
        return {name: given[index] for index, name in enumerate(self._names)}


def _openvino(**hints: str) -> Open:
    def opened(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
        return _OpenVino(folder / f"{component}.onnx", threads, **hints)

    return opened


def _openvino_ir(subject: Subject, component: str, folder: Path, threads: int) -> RowSession:
    return _OpenVino(folder / f"{component}.xml", threads)


def _nncf(*, cleaned: bool, transformer: bool = False) -> Build:
    """`nncf.quantize` by its defaults, of the exported graph or of the one that vlaopt's `simplify` made of it."""

    def build(subject: Subject, component: str, folder: Path) -> None:
        import nncf
        import openvino as ov

        class Samples:
            def __iter__(self) -> Iterator[dict[str, Array]]:
                return subject.feeds(component)

        graph = subject.graph(component)
        if cleaned:
            from vlaopt.graph.check import load
            from vlaopt.graph.external import encode
            from vlaopt.graph.simplify import simplify

            graph = encode(simplify(load(graph, where=component), graph.data), component, graph.data)
        with graph_on_disk(graph) as source:
            model = ov.Core().read_model(source)
            count = sum(1 for _ in subject.feeds(component))
            kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
            quantized = nncf.quantize(model, nncf.Dataset(Samples()), subset_size=count, **kind)
            ov.save_model(quantized, folder / f"{component}.xml")

    return build


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, path.with_name(path.name + ".data")] if file.is_file())


ROWS: Mapping[str, Row] = {
    "torch": Row("torch eager", _eager),
    "torch-compile": Row("torch.compile", _compiled),
    "torchscript": Row("TorchScript (traced, frozen)", _script),
    "torch-bf16": Row("torch bf16 autocast", _bf16),
    "ort": Row("ONNX Runtime FP32", _ort, _export),
    "ort-static": Row("ONNX Runtime static INT8, stock", _ort, _ort_static(advised=False)),
    "ort-static-u8": Row("ONNX Runtime static INT8, as advised for AVX2", _ort, _ort_static(advised=True)),
    "ort-dynamic": Row("ONNX Runtime dynamic INT8, stock", _ort, _ort_dynamic),
    "openvino": Row("OpenVINO FP32", _openvino(INFERENCE_PRECISION_HINT="f32"), _export),
    "openvino-bf16": Row("OpenVINO BF16", _openvino(INFERENCE_PRECISION_HINT="bf16"), _export),
    "openvino-default": Row("OpenVINO, default", _openvino(), _export),
    "nncf": Row("NNCF INT8 on OpenVINO", _openvino_ir, _nncf(cleaned=False)),
    "nncf-clean": Row("NNCF INT8 on OpenVINO, cleaned graph", _openvino_ir, _nncf(cleaned=True)),
    "nncf-transformer": Row(
        "NNCF INT8 on OpenVINO, cleaned graph, transformer", _openvino_ir, _nncf(cleaned=True, transformer=True)
    ),
}
