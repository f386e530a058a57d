"""The stand-in's plan: a tag that TensorRT would check, a JSON header, the ONNX file and its data."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

from standin.settings import Settings

MAGIC = b"ptrt-standin\n"


@dataclass(frozen=True)
class Plan:
    """`header` is all that an engine tells of itself; `model` and `data` are what it runs."""

    header: dict[str, Any]
    model: bytes = field(repr=False)
    data: bytes = field(default=b"", repr=False)
    data_name: str = ""

    def pack(self) -> bytes:
        """Bytes that differ from call to call, as real plans of one graph do."""
        header = {**self.header, "build": os.urandom(8).hex(), "data_name": self.data_name}
        text = json.dumps(header).encode()
        sizes = struct.pack("<3Q", len(text), len(self.model), len(self.data))
        return MAGIC + sizes + text + self.model + self.data


def unpack(data: bytes) -> Plan:
    """Raises ValueError in TensorRT's words for bytes that are no plan."""
    if not data.startswith(MAGIC):
        raise ValueError("Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match")
    at = len(MAGIC)
    sizes = struct.unpack("<3Q", data[at : at + 24]) if len(data) >= at + 24 else (0, 0, 0)
    at += 24
    if len(data) != at + sum(sizes):
        raise ValueError("Serialization assertion sizeRead == data.size() failed.Plan ends early")
    header = json.loads(data[at : at + sizes[0]])
    at += sizes[0]
    return Plan(header, data[at : at + sizes[1]], data[at + sizes[1] :], header["data_name"])


def tag(version: str, now: Settings) -> dict[str, str]:
    """What a plan is bound to."""
    known = asdict(now)
    return {"tensorrt": version, **{key: known[key] for key in ("lane", "gpu", "sm", "os")}}


def mismatch(header: dict[str, Any], version: str, now: Settings, host_code_allowed: bool) -> str | None:
    """Why a plan does not load here, in words like TensorRT's, or None.

    Stricter than the real library in one point: it refuses another model of GPU, of which TensorRT only warns.
    """
    made, here = header["tag"], tag(version, now)
    if made["os"] != here["os"]:
        return (
            "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
            "safeVersionRead == kSAFE_SERIALIZATION_VERSION failed.Platform specific tag mismatch detected. TensorRT "
            "plan files are only supported on the target runtime platform they were created on.)"
        )
    if made["tensorrt"] != version:
        if not header["version_compatible"]:
            return (
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
                f"stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: "
                f"{_number(version)}, Serialized Engine Version: {_number(made['tensorrt'])})"
            )
        if made["lane"].split(".")[0] != now.lane.split(".")[0] or _number(version) < _number(made["tensorrt"]):
            return "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (version-compatible plan is not older)"
    if header["version_compatible"] and not host_code_allowed:
        return (
            "IRuntime::deserializeCudaEngine: Error Code 4: API Usage Error (The engine contains host code and "
            "engine_host_code_allowed was not set)"
        )
    level = header["hardware_compatibility_level"]
    major = int(now.sm.split(".")[0])
    if level == "AMPERE_PLUS" and major >= 8:
        return None
    if made["sm"] != here["sm"]:
        return (
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on an "
            f"incompatible device, expecting compute {here['sm']} got compute {made['sm']}, please rebuild.)"
        )
    if made["gpu"] != here["gpu"] and level != "SAME_COMPUTE_CAPABILITY":
        return (
            "Using an engine plan file across different models of devices is not supported by the stand-in: made on "
            f"{made['gpu']}, this is {here['gpu']}"
        )
    return None


def _number(version: str) -> int:
    parts = [int(part) for part in version.split(".")] + [0, 0]
    return parts[0] * 10000 + parts[1] * 100 + parts[2]
