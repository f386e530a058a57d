"""This machine, as its own files, commands and libraries describe it. What is not available is None, never an error."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from vlaopt.machine import jetson, system
from vlaopt.machine.gpu import Driver, Gpu, read_driver
from vlaopt.machine.libraries import TensorRt, cuda_version, read_libraries, read_providers, read_tensorrt
from vlaopt.machine.packages import installed_packages
from vlaopt.machine.sources import Sources
from vlaopt.memory import available_mib

__all__ = ["Driver", "Gpu", "Machine", "Sources", "TensorRt", "read_machine"]


class Machine(BaseModel):
    """What is here. Memory in MiB; `available_mib` is free for new work at the moment.

    `chip`, `l4t` (Jetson Linux), `jetpack` and the power modes, their names by number, are a Jetson's. `cuda` is the
    toolkit in the system, `driver.cuda` the newest that the driver takes; `libraries` are Python's, `providers` those
    of its ONNX Runtime.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str
    architecture: str
    os: str | None = None
    kernel: str | None = None
    container: str | None = None
    python: str
    cpu: str | None = None
    cpu_features: tuple[str, ...] = ()
    logical_cores: int = 1
    memory_mib: int | None = None
    available_mib: int | None = None
    board: str | None = None
    chip: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    power_modes: dict[int, str] = {}
    driver: Driver = Driver()
    cuda: str | None = None
    tensorrt: TensorRt = TensorRt()
    libraries: dict[str, str] = {}
    providers: tuple[str, ...] = ()

    @property
    def is_jetson(self) -> bool:
        return self.l4t is not None or self.chip is not None

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that engines are built for: the first."""
        return self.driver.gpus[0] if self.driver.gpus else None

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def read_machine(sources: Sources | None = None) -> Machine:
    """All facts that the sources give, by default those of this machine. Raises nothing for one that is not there."""
    sources = sources or Sources()
    root = sources.root
    packages = installed_packages(root)
    release = jetson.l4t(root)
    on_jetson = release is not None or jetson.chip(root) is not None
    return Machine(
        system=sources.system,
        architecture=sources.architecture,
        os=system.os_name(root),
        kernel=system.kernel(root),
        container=system.container(root),
        python=sources.python,
        cpu=system.cpu_model(root),
        cpu_features=tuple(sorted(set(system.cpu_flags(root)))),
        logical_cores=system.logical_cores(root),
        memory_mib=system.memory_mib(root),
        available_mib=available_mib(root),
        board=system.board(root),
        chip=jetson.chip(root),
        l4t=release,
        jetpack=jetson.jetpack(packages, release) if on_jetson else None,
        power_mode=jetson.power_mode(sources) if on_jetson else None,
        power_modes=jetson.power_modes(root),
        driver=read_driver(sources),
        cuda=cuda_version(root, packages),
        tensorrt=read_tensorrt(sources, packages),
        libraries=read_libraries(sources),
        providers=read_providers(sources),
    )
