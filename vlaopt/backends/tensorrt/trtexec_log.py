"""What trtexec prints, read: version, device, success, memory, and why it refuses a graph.

Formats are those of NVIDIA's sources: samples/common/logging.h, sampleDevice.cpp and sampleEngines.cpp of TensorRT 10.3
to 11.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from signal import Signals

from vlaopt.backends.tensorrt.building import Refusal
from vlaopt.backends.tensorrt.log import MEMORY_HINT, meaning, ran_out_of_memory

# `&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # …`; 10.3 tells no build.
_BANNER = re.compile(
    r"^&&&& (RUNNING|PASSED|FAILED) TensorRT\.trtexec \[TensorRT v(\d+)\](?: \[b(\d+)\])?", re.MULTILINE
)
# `[06/20/2025-12:02:56] [E] [TRT] …`, also without the time.
_LINE = re.compile(r"^(?:\[[\d/]+-[\d:]+\] )?\[([FEWIV])\] (?:\[TRT\] ?)?(.*)$")
_DEVICE = {
    "gpu": re.compile(r"\[I\] Selected Device: (.+)"),
    "sm": re.compile(r"\[I\] Compute Capability: (\d+\.\d+)"),
    "memory_mib": re.compile(r"\[I\] Device Global Memory: (\d+) MiB"),
}
_NO_DEVICE = re.compile(r"Cannot find any available devices|^Cuda failure", re.MULTILINE)
_BYTES = {
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+)"),
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+)"),
}
# What follows every failure and says nothing of it.
_AFTERMATH = re.compile(
    r"(?:Failed to parse onnx file|Parsing model failed|Engine could not be created from network|Building engine failed"
    r"|Failed to create engine from model(?: or file)?\.|Engine set up failed|Inference set up failed"
    r"|Got invalid engine!|Engine deserialization failed)$"
)
_PARSING = re.compile(r"While parsing node number (\d+) \[(\S+)")
# Of the node itself, as 10.x and as 11 print it; names of its attributes are indented.
_NAME = re.compile(r'^(?:name: "|Node name: )(.*?)"?$', re.MULTILINE)
_BECAUSE = re.compile(r"ERROR: \S+ In function \w+:\n?\s*(?:\[\d+\] )?(.*)", re.DOTALL)
_IN_NODE = re.compile(r"In node (-?\d+) with name: (.*?) and operator: (\S*) \(\w+\): (?:\w+: )?(.*)", re.DOTALL)
_FOR_NODE = re.compile(r"Could not find any implementation for node (.+?)\.?\)$")
_READ_AS_INT8 = "Defaulting to INT8"


@dataclass(frozen=True)
class Log:
    """One run of trtexec. `errors` and `warnings` are whole messages, of several lines where they have them.

    `version` has four parts where the build is told, else three, and is "" where no banner was printed; `gpu`, `sm` and
    `memory_mib` are those of the device it took, `passed` what it says of itself, `sizes` bytes of the built engine.
    """

    version: str
    passed: bool
    gpu: str | None
    sm: str | None
    memory_mib: int | None
    no_device: bool
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def reads_uint8_as_int8(self) -> bool:
        """Whether the parser took uint8 quantization as int8, and so calculates something else."""
        return any(_READ_AS_INT8 in message for message in self.warnings)

    def refusals(self, status: int) -> tuple[Refusal, ...]:
        """Why it failed, one reason at least; `status` is its exit status, below 0 the signal that ended it."""
        if status < 0:
            return (Refusal("", "", _ended(-status)),)
        told = [error for error in self.errors if not _AFTERMATH.match(error)]
        found = tuple(dict.fromkeys(_refusals(told)))
        return (
            found or tuple(Refusal("", "", text) for text in self.errors[:1]) or (Refusal("", "", "it says nothing"),)
        )

    def told(self, status: int) -> str:
        """All of `refusals` in one line."""
        return "; ".join(map(str, self.refusals(status)))

    def hint(self, status: int) -> str | None:
        """What may help against running out of memory, where it did: told, or killed by the system."""
        short = ran_out_of_memory([*self.errors, *self.warnings])
        return MEMORY_HINT if short or status == -9 else None


def parse(text: str) -> Log:
    """The log that trtexec printed to stdout and stderr, in the order of printing."""
    banners = _BANNER.findall(text)
    _, number, build = banners[0] if banners else ("", "", "")
    device = {name: match[1] for name, pattern in _DEVICE.items() if (match := pattern.search(text))}
    messages = _messages(text)
    memory = device.get("memory_mib")
    return Log(
        version=_version(number, build) if number else "",
        passed=any(result == "PASSED" for result, _, _ in banners),
        gpu=device.get("gpu"),
        sm=device.get("sm"),
        memory_mib=int(memory) if memory else None,
        no_device=_NO_DEVICE.search(text) is not None,
        errors=tuple(message for kind, message in messages if kind in "FE"),
        warnings=tuple(message for kind, message in messages if kind == "W"),
        sizes={name: int(found[-1]) for name, pattern in _BYTES.items() if (found := pattern.findall(text))},
    )


def _version(number: str, build: str) -> str:
    """`v101303` is 10.13.3: NV_TENSORRT_VERSION since 10.0 is major·10000 + minor·100 + patch."""
    value = int(number)
    parts = [value // 10000, value // 100 % 100, value % 100]
    return ".".join(map(str, parts)) + (f".{build}" if build else "")


def _messages(text: str) -> list[tuple[str, str]]:
    """The kind (F, E, W, I, V) and text of every message; lines without a kind go on with the one above."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("&&&&"):
            continue
        if line.startswith("Cuda failure"):
            found.append(("E", line))
        elif match := _LINE.match(line):
            found.append((match[1], match[2]))
        elif found:
            kind, message = found[-1]
            found[-1] = (kind, f"{message}\n{line}".rstrip())
    return found


def _refusals(errors: Sequence[str]) -> list[Refusal]:
    """The reasons behind errors: the parser tells of one node in several messages, the builder in one.

    What the parser says of nodes holds what the network said of them before.
    """
    found: list[Refusal] = []
    parsed: list[Refusal] = []
    node = operator = ""
    inside = False  # between the parser's lines about a node and its reason
    for error in errors:
        if match := _PARSING.search(error):
            node, operator, inside = f"#{match[1]}", match[2], True
        elif match := _BECAUSE.search(error):
            parsed.append(Refusal(node, operator, _plain(match[1])))
            node, operator, inside = "", "", False
        elif inside:
            named = _NAME.search(error)
            node = named[1] if named else node
        elif match := _IN_NODE.search(error):
            told = match[2] or (f"#{match[1]}" if int(match[1]) >= 0 else "")
            found.append(Refusal(told, match[3], _plain(match[4])))
        else:
            match = _FOR_NODE.search(error)
            found.append(Refusal(match[1] if match else "", "", _plain(error)))
    return parsed or found


def _plain(text: str) -> str:
    """A message on one line without counters, function names and source files."""
    text = re.sub(r"^Error\[\d+\]: ", "", " ".join(text.split()))
    text = re.sub(r"^\[[\w.]+::\w+::\d+\] |^\w+::\w+: ", "", text)
    return meaning(re.sub(r"Error Code:? \d+: ", "", text))


def _ended(signal: int) -> str:
    name = Signals(signal).name if signal in set(Signals) else f"signal {signal}"
    if name == "SIGKILL":
        return "the system ended trtexec (SIGKILL), most often because memory ran out"
    return f"trtexec crashed ({name})"
