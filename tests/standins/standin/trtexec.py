"""Stand-in for NVIDIA's program trtexec: flags of the lane, log and files as its published sources write them.

They are samples/trtexec/trtexec.cpp and samples/common/sample{Options,Engines,Inference,Reporting}.cpp of
github.com/NVIDIA/TensorRT.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from standin.device import DEVICE
from standin.module import surface
from standin.running import NUMPY
from standin.settings import Settings, settings
from standin.surface import API

FLAGS: dict[str, list[str]] = json.loads((API / "trtexec.json").read_text(encoding="utf-8"))

_PRECISIONS = {"--fp16": ["FP16"], "--bf16": ["BF16"], "--int8": ["INT8"], "--fp8": ["FP8"], "--int4": ["INT4"]}
_PRECISIONS["--best"] = ["FP16", "INT8"]
# Flags that the stand-in takes and that change nothing of what it writes.
_WITHOUT_EFFECT = {
    "--verbose", "--noTF32", "--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--noSpinWait", "--noCudaGraph",
    "--duration", "--warmUp", "--iterations", "--avgRuns", "--stronglyTyped", "--skipInference", "--device",
    "--separateProfileRun", "--dumpProfile", "--dumpLayerInfo", "--includeDataTransfers", "--infStreams", "--idleTime",
}  # fmt: skip
_DONE = {
    "--onnx", "--saveEngine", "--loadEngine", "--exportLayerInfo", "--timingCacheFile", "--memPoolSize", "--shapes",
    "--builderOptimizationLevel", "--versionCompatible", "--hardwareCompatibilityLevel", "--minShapes", "--optShapes",
    "--maxShapes", "--profilingVerbosity", "--loadInputs", "--exportOutput", "--exportTimes", "--getPlanVersionOnly",
    "--useRuntime", "--exportProfile",
}  # fmt: skip


class Failed(Exception):
    """The program reports FAILED; its lines were told before."""


def main(argv: list[str]) -> int:
    """Exit status of the program called with `argv`."""
    now = settings()
    now.note("trtexec", *argv[1:])
    program = Program(now, argv)
    program.report("RUNNING")
    try:
        told = dict(argument.partition("=")[::2] for argument in argv[1:])
        if told and "--help" not in told:
            program.go(told)
        else:
            program.help()
    except Failed:
        program.report("FAILED")
        return 1
    program.report("PASSED")
    return 0


class Program:
    def __init__(self, now: Settings, argv: list[str]) -> None:
        self.now, self.argv = now, argv
        self.trt = surface(now)
        self.logger = _logger(self)

    def report(self, result: str) -> None:
        parts = [int(part) for part in self.trt.version.split(".")]
        number = parts[0] * 10000 + parts[1] * 100 + parts[2]
        build = f" [b{parts[3]}]" if len(parts) > 3 else ""
        self._print(f"&&&& {result} TensorRT.trtexec [TensorRT v{number}]{build} # {' '.join(self.argv)}")

    def say(self, kind: str, message: str) -> None:
        stream = sys.stderr if kind == "E" else sys.stdout
        stream.write(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [{kind}] {message}\n")
        stream.flush()

    def fail(self, *messages: str) -> Failed:
        for message in messages:
            self.say("E", message)
        return Failed()

    def help(self) -> None:
        self._print("=== Model Options ===\n  --onnx=<file>               ONNX model\n")

    def _print(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def go(self, told: dict[str, str]) -> None:
        unknown = [flag for flag in told if flag not in FLAGS[self.now.lane]]
        if unknown:
            self.help()
            raise self.fail(*(f"Unknown option: {flag} {told[flag]}" for flag in unknown))
        if unwritten := sorted(set(told) - _DONE - _WITHOUT_EFFECT - set(_PRECISIONS)):
            raise NotImplementedError(f"stand-in: trtexec {' '.join(unwritten)} is not written")
        if ("--onnx" in told) == ("--loadEngine" in told):
            self.help()
            raise self.fail("Model missing or format not recognized")
        self._device()
        plan = self._loaded(told["--loadEngine"]) if "--loadEngine" in told else self._built(told)
        if "--getPlanVersionOnly" in told:
            self.say("I", f"Plan was created with TensorRT version {self.trt.version}")
            return
        if "--skipInference" in told:
            self._layers(told, self._engine(plan))
            self.say("I", "Skipped inference phase since --skipInference is added.")
            return
        engine = self._engine(plan, told)
        self._layers(told, engine)
        self._infer(told, engine)

    def _device(self) -> None:
        self.say("I", "=== Device Information ===")
        for fault, text in (
            ("no-driver", "CUDA driver version is insufficient for CUDA runtime version"),
            ("no-gpu", "no CUDA-capable device is detected"),
        ):
            if self.now.has(fault):
                sys.stderr.write(f"Cuda failure: {text}\n")
                sys.exit(1)
        uuid = "GPU-f5507ee1-b6b1-556b-8350-83af993dbffd"
        for line in (
            "Available Devices: ",
            f'  Device 0: "{self.now.gpu}" UUID: {uuid}',
            f"Selected Device: {self.now.gpu}",
            "Selected Device ID: 0",
            f"Selected Device UUID: {uuid}",
            f"Compute Capability: {self.now.sm}",
            "SMs: 16",
            f"Device Global Memory: {self.now.memory_mib} MiB",
            "",
            f"TensorRT version: {'.'.join(self.trt.version.split('.')[:3])}",
            "Loading standard plugins",
        ):
            self.say("I", line)

    def _loaded(self, path: str) -> bytes:
        try:
            data = Path(path).read_bytes()
        except OSError:
            lines = (f"Error opening engine file: {path}", "Failed to create engine from model or file.")
            raise self.fail(*lines, "Engine set up failed") from None
        self.say("I", "Engine loaded in 0.01 sec.")
        self.say("I", f"Loaded engine with size: {len(data) / 2**20:g} MiB")
        return data

    def _built(self, told: Mapping[str, str]) -> bytes:
        names, end = self.trt.names, ("Failed to create engine from model or file.", "Engine set up failed")
        builder = names["Builder"](self.logger)
        strong = "--stronglyTyped" in told
        flag = 1 << int(names["NetworkDefinitionCreationFlag"].STRONGLY_TYPED) if strong else 0
        network = builder.create_network(flag)
        self.say("I", "Start parsing network model.")
        parser = names["OnnxParser"](network, self.logger)
        if not parser.parse_from_file(told["--onnx"]):
            raise self.fail("Failed to parse onnx file", "Parsing model failed", *end)
        self.say("I", "Finished parsing network model. Parse time: 0.01")
        config = builder.create_builder_config()
        self._configure(config, told)
        self._profile(builder, config, network, told)
        cache = told.get("--timingCacheFile")
        if cache:
            self._read_cache(config, Path(cache))
        blob = builder.build_serialized_network(network, config)
        if blob is None:
            raise self.fail("Engine could not be created from network", "Building engine failed", *end)
        data = bytes(blob)
        self.say("I", "Engine built in 0.1 sec.")
        self.say("I", f"Created engine with size: {len(data) / 2**20:g} MiB")
        if cache:
            Path(cache).write_bytes(bytes(config.get_timing_cache().serialize()))
        if "--saveEngine" in told:
            Path(told["--saveEngine"]).write_bytes(data)
        return data

    def _configure(self, config: Any, told: Mapping[str, str]) -> None:
        names = self.trt.names
        for flag, precisions in _PRECISIONS.items():
            for precision in precisions if flag in told else ():
                config.set_flag(getattr(names["BuilderFlag"], precision))
        if "--versionCompatible" in told:
            config.set_flag(names["BuilderFlag"].VERSION_COMPATIBLE)
        if level := told.get("--hardwareCompatibilityLevel"):
            known = {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}
            if level not in known:
                raise self.fail(f"Unknown hardwareCompatibilityLevel: {level}")
            config.hardware_compatibility_level = getattr(names["HardwareCompatibilityLevel"], known[level])
        if level := told.get("--builderOptimizationLevel"):
            config.builder_optimization_level = int(level)
        verbosity = told.get("--profilingVerbosity", "layer_names_only").upper()
        config.profiling_verbosity = getattr(names["ProfilingVerbosity"], verbosity)
        for spec in filter(None, told.get("--memPoolSize", "").split(",")):
            found = re.fullmatch(r"(workspace|tacticSharedMem):([\d.]+)([BKMG]?)", spec)
            if found is None:
                raise self.fail(f"Unknown memory pool: {spec.partition(':')[0]}")
            pool = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}[found[1]]
            size = int(float(found[2]) * {"B": 1, "K": 1 << 10, "M": 1 << 20, "": 1 << 20, "G": 1 << 30}[found[3]])
            config.set_memory_pool_limit(getattr(names["MemoryPoolType"], pool), size)

    def _profile(self, builder: Any, config: Any, network: Any, told: Mapping[str, str]) -> None:
        bounds = [_shapes(told.get(f"--{bound}Shapes") or told.get("--shapes", "")) for bound in ("min", "opt", "max")]
        inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
        for name in {name for bound in bounds for name in bound} - set(inputs):
            raise self.fail(
                f'Cannot find input tensor with name "{name}" in the network inputs! Please make sure the input tensor '
                "names are correct.",
                "Network And Config setup failed",
            )
        profile = builder.create_optimization_profile()
        dynamic = {name for name, tensor in inputs.items() if -1 in tuple(tensor.shape)}
        if any(bounds) and not dynamic:
            raise self.fail(
                "Static model does not take explicit shapes since the shape of inference tensors will be determined by "
                "the model itself",
                "Network And Config setup failed",
            )
        for name in dynamic:
            if not all(name in bound for bound in bounds):
                shape = [1 if size == -1 else size for size in tuple(inputs[name].shape)]
                self.say(
                    "W",
                    f"Dynamic dimensions required for input: {name}, but no shapes were provided. Automatically "
                    f"overriding shape to: {'x'.join(map(str, shape))}",
                )
                for bound in bounds:
                    bound[name] = shape
            profile.set_shape(name, *(bound[name] for bound in bounds))
        if dynamic:
            config.add_optimization_profile(profile)

    def _read_cache(self, config: Any, path: Path) -> None:
        data = path.read_bytes() if path.exists() else b""
        if not data:
            self.say(
                "W", f"Could not read timing cache from: {path}. A new timing cache will be generated and written."
            )
        config.set_timing_cache(config.create_timing_cache(data), False)
        if config.get_timing_cache() is None:
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _engine(self, plan: bytes, told: Mapping[str, str] | None = None) -> Any:
        runtime = self.trt.names["Runtime"](self.logger)
        runtime.engine_host_code_allowed = told is None or "--versionCompatible" in told
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.fail("Engine deserialization failed", "Got invalid engine!", "Inference set up failed")
        self.say("I", "Engine deserialized in 0.01 sec.")
        return engine

    def _layers(self, told: Mapping[str, str], engine: Any) -> None:
        if path := told.get("--exportLayerInfo"):
            json_format = self.trt.names["LayerInformationFormat"].JSON
            Path(path).write_text(engine.create_engine_inspector().get_engine_information(json_format), "utf-8")

    def _infer(self, told: Mapping[str, str], engine: Any) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = self.trt.names["TensorIOMode"]
        inputs = [name for name in names if engine.get_tensor_mode(name) == modes.INPUT]
        files = _pairs(told.get("--loadInputs", ""))
        if foreign := sorted(set(files) - set(inputs)):
            raise self.fail(
                *(f'Cannot find input tensor with name "{name}" in the engine bindings! Please make sure the input '
                  "tensor names are correct." for name in foreign),
                "Invalid tensor names found in --loadInputs flag.", "Inference set up failed",
            )  # fmt: skip
        context = engine.create_execution_context()
        if context is None:
            raise self.fail("Unable to create execution context for stream 0.", "Inference set up failed")
        for name, shape in _shapes(told.get("--shapes", "")).items():
            if name not in inputs or -1 not in tuple(engine.get_tensor_shape(name)):
                raise self.fail(
                    f"The engine was built with static shapes for input tensor {name} but the provided shapes do not "
                    "match the static shapes!",
                    "Inference set up failed",
                )
            if not context.set_input_shape(name, shape):
                raise self.fail("Inference set up failed")
        buffers = {name: self._buffer(name, engine, context, files, told) for name in names}
        self.say("I", "Starting inference")
        stream = DEVICE.make_stream()
        began = time.perf_counter()
        if not context.execute_async_v3(stream):
            raise self.fail("Error occurred during inference")
        DEVICE.wait(stream)
        took = (time.perf_counter() - began) * 1000
        for line in (
            "Warmup completed 1 queries over 0 ms", f"Timing trace has 1 queries over {took / 1000:g} s", "",
            "=== Performance summary ===", f"Throughput: {1000 / took:g} qps",
            f"GPU Compute Time: min = {took:g} ms, max = {took:g} ms, mean = {took:g} ms, median = {took:g} ms",
        ):  # fmt: skip
            self.say("I", line)
        if path := told.get("--exportTimes"):
            keys = ("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs")
            keys += ("endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs")
            trace = ", ".join(f'"{key}" : {took if key.endswith(("computeMs", "latencyMs")) else 0:g}' for key in keys)
            Path(path).write_text(f"[\n  {{ {trace} }}\n]\n", "utf-8")
        if path := told.get("--exportOutput"):
            outputs = sorted(set(names) - set(inputs))
            Path(path).write_text(_outputs({name: buffers[name] for name in outputs}, context, engine), "utf-8")

    def _buffer(
        self, name: str, engine: Any, context: Any, files: Mapping[str, str], told: Mapping[str, str]
    ) -> tuple[int, np.dtype[Any]]:
        """A tensor on the device: of its file; at random where there is none; zeros where none was copied."""
        dtype = np.dtype(NUMPY[engine.get_tensor_dtype(name).name])
        shape = [int(size) for size in tuple(context.get_tensor_shape(name))]
        if -1 in shape:
            shape = [1 if size == -1 else size for size in shape]
            context.set_input_shape(name, shape)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = DEVICE.allocate(size, "device")
        context.set_tensor_address(name, address)
        data = bytes(size)
        copies = not self.now.lane.startswith("11") or "--includeDataTransfers" in told
        if name in files:
            try:
                data = Path(files[name]).read_bytes()
            except OSError:
                raise self.fail(f"Cannot open file {files[name]}!") from None
            self.say("I", f"Using values loaded from {files[name]} for input {name}")
            if len(data) < size:
                raise self.fail(f"Unexpected file size: {files[name]} has {len(data)} bytes, {size} are wanted")
        if copies:
            ctypes.memmove(address, data[:size], size)
        else:
            ctypes.memset(address, 0, size)
        return address, dtype


def _outputs(buffers: Mapping[str, tuple[int, np.dtype[Any]]], context: Any, engine: Any) -> str:
    """The JSON of --exportOutput: numbers as C++ streams write them, six digits."""
    text, comma = "[\n", "  "
    for name, (address, dtype) in buffers.items():
        shape = [int(size) for size in tuple(context.get_tensor_shape(name))]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if dtype == np.uint8:
            raise NotImplementedError("stand-in: trtexec writes uint8 as characters")
        values = np.frombuffer(ctypes.string_at(address, size), dtype)
        shown = ", ".join(f"{float(value):g}" if dtype.kind == "f" else str(int(value)) for value in values)
        sizes = "x".join(map(str, shape)) or "scalar"
        text += f'{comma}{{ "name" : "{name}"\n  , "dimensions" : "{sizes}"\n  , "values" : [ {shown} ]\n  }}\n'
        comma = ", "
    return text + "]\n"


def _pairs(text: str) -> dict[str, str]:
    """Names and values of "a:x,'b:c':y"."""
    parts = re.findall(r"(?:'([^']*)'|([^,:]+)):([^,]*)", text)
    return {quoted or plain: value for quoted, plain, value in parts}


def _shapes(text: str) -> dict[str, list[int]]:
    return {name: [int(size) for size in value.split("x") if size] for name, value in _pairs(text).items()}


def _logger(program: Program) -> Any:
    """What the library says, as the samples print it: errors of its recorder without the tag of the library."""

    class Log(program.trt.names["ILogger"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            letter = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I"}.get(severity.name)
            code = re.search(r"Error Code (\d+)", msg)
            if letter == "E" and code and not msg.startswith("ModelImporter"):
                program.say("E", f"Error[{code[1]}]: {msg}")
            elif letter:
                program.say(letter, f"[TRT] {msg}")

    return Log()
