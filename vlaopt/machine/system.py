"""Operating system, processor and memory, read from /proc, /sys and /etc below a root. None: not available."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """The text of a file without blanks and NULs at its ends; None where it cannot be read or is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def field(text: str | None, name: str) -> str | None:
    """The value after `name:` in the first line that has it."""
    found = re.search(rf"^{re.escape(name)}[ \t]*:[ \t]*(.+)$", text or "", re.MULTILINE)
    return found[1].strip() if found else None


def memory_mib(root: Path = ROOT) -> int | None:
    """All memory as the system counts it, in MiB."""
    kib = re.match(r"\d+", field(read_text(root / "proc/meminfo"), "MemTotal") or "")
    return int(kib[0]) // 1024 if kib else None


def cpu_flags(root: Path = ROOT) -> list[str]:
    """All features of the CPUs; x86 says `flags`, ARM `Features`. Empty where there is none to read."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    return (field(cpuinfo, "flags") or field(cpuinfo, "Features") or "").split()


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's name; the board's where /proc/cpuinfo has none, as on a Jetson."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    return field(cpuinfo, "model name") or board(root) or field(cpuinfo, "CPU part")


def logical_cores(root: Path = ROOT) -> int:
    """At least one, also where the machine does not count them."""
    return max(1, len(re.findall(r"^processor\s*:", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)))


def physical_cores(root: Path = ROOT) -> int | None:
    """Cores that differ in package or number."""
    cores = {
        (read_text(path.with_name("physical_package_id")), read_text(path)) for path in cpus(root, "topology/core_id")
    }
    return len(cores) or None


def cpus(root: Path, file: str) -> list[Path]:
    """`file` of every CPU below /sys/devices/system/cpu."""
    return sorted((root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{file}"))


def board(root: Path = ROOT) -> str | None:
    """The board's name where a device tree describes the machine: `NVIDIA Jetson AGX Orin Developer Kit`."""
    return read_text(root / "proc/device-tree/model")


def os_name(root: Path = ROOT) -> str | None:
    """The distribution, `Ubuntu 22.04.5 LTS`."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', read_text(root / "etc/os-release") or "", re.MULTILINE)
    return found[1] if found else None


def kernel(root: Path = ROOT) -> str | None:
    """The kernel's release, `5.15.148-tegra`."""
    return read_text(root / "proc/sys/kernel/osrelease")


def container(root: Path = ROOT) -> str | None:
    """What kind of container this is, or None outside of one."""
    for marker, name in (".dockerenv", "docker"), ("run/.containerenv", "podman"):
        if (root / marker).exists():
            return name
    found = re.search(r"kubepods|docker|lxc|containerd", read_text(root / "proc/1/cgroup") or "")
    return found[0] if found else None
