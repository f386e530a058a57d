"""What a Jetson says of itself: Jetson Linux (L4T), JetPack, system on chip, power mode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vlaopt.machine.packages import version_of
from vlaopt.machine.sources import Sources
from vlaopt.machine.system import read_text

JETPACKS = {
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.2.2": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
"""JetPack by Jetson Linux, for machines on which JetPack's packages are not installed.

Source: NVIDIA's JetPack archive (developer.nvidia.com/embedded/jetpack-archive); jetson-stats 7.2 for 36.4.7, 36.5.0
and 38.2.2.
"""

CHIPS = {"tegra194": ("Xavier", "7.2"), "tegra234": ("Orin", "8.7"), "tegra264": ("Thor", "11.0")}
"""GPU and compute capability of NVIDIA's systems on chip. Source: developer.nvidia.com/cuda-gpus."""


_GPU = re.compile(r"\.(gpu|ga10b|gv11b)$|^gpu-gpc-\d+$")
"""Devfreq's names of GPUs: 17000000.gpu on Orin (.ga10b to JetPack 5), gpu-gpc-0 on Thor (gpu-nvd-0 is for video)."""


def is_jetson(root: Path) -> bool:
    """Also in a container, which often has neither a device tree nor NVIDIA's release file."""
    return bool(l4t(root) or chip(root) or gpu_clocks(root))


def l4t(root: Path) -> str | None:
    """The release of Jetson Linux, `36.4.3`, from /etc/nv_tegra_release."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def jetpack(packages: Mapping[str, str], release: str | None) -> str | None:
    """The JetPack whose packages are installed (their version is its), else the one that brought this Jetson Linux."""
    return version_of(packages, "nvidia-(jetpack|tensorrt)") or JETPACKS.get(release or "")


def chip(root: Path) -> str | None:
    """The system on chip, `tegra234`, from the device tree."""
    found = re.search(r"nvidia,(tegra\d+)\b", read_text(root / "proc/device-tree/compatible") or "")
    return found[1] if found else None


def gpu_clocks(root: Path) -> list[Path]:
    """Devfreq's folders of the GPU's clocks. Empty on other machines."""
    return [folder for folder in sorted((root / "sys/class/devfreq").glob("*")) if _GPU.search(folder.name)]


def power_modes(root: Path) -> dict[int, str]:
    """Names of the power modes by number, from /etc/nvpmodel.conf."""
    text = read_text(root / "etc/nvpmodel.conf") or ""
    return {int(number): name for number, name in re.findall(r"^<\s*POWER_MODEL ID=(\d+) NAME=(\S+)", text, re.M)}


def power_mode(sources: Sources) -> str | None:
    """The power mode that was set last, which the next start keeps; from its file, else from `nvpmodel -q`."""
    kept = re.search(r"pmode:(\d+)", read_text(sources.root / "var/lib/nvpmodel/status") or "")
    if kept and (name := power_modes(sources.root).get(int(kept[1]))):
        return name
    asked = re.search(r"NV Power Mode: *(\S+)", sources.run(["nvpmodel", "-q"]) or "")
    return asked[1] if asked else None
