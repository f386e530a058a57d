"""Targets: named classes of machine, and the files that describe them. Knows nothing of recipes or this machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from vlaopt.errors import EnvironmentProblem, InputError, RecipeError
from vlaopt.recipe.fields import Many, Section, Slug, Text
from vlaopt.recipe.problems import Places, problems_of
from vlaopt.recipe.reader import read_mapping

SCHEMA = "vlaopt.target/1"

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "nvfp4"]
StageSection = Literal["export", "prune", "quantize", "onnx", "engine", "verify", "accept", "bench"]

MINIMUM_COMPUTE_CAPABILITY: dict[Precision, tuple[int, int]] = {
    "int8": (6, 1),
    "fp16": (5, 3),
    "bf16": (8, 0),
    "fp8": (8, 9),
    "nvfp4": (10, 0),
}
"""First compute capability whose hardware computes in a precision. Source: TensorRT's support matrix."""

_OR = re.compile(r"\s*\|\s*")
_FEATURE = re.compile(rf"[a-z0-9_]+({_OR.pattern}[a-z0-9_]+)*")
_CLAUSE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([0-9]+(?:\.[0-9]+)*)\s*")


def _compute_capability(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", value):
        raise ValueError(f"{value!r} is not a compute capability, such as 8.7")
    return value


def _cpu_feature(value: str) -> str:
    if not _FEATURE.fullmatch(value):
        raise ValueError(f"{value!r} is not a CPU feature, such as avx2 or avx512_vnni | avx_vnni")
    return value


def _version_range(value: str) -> str:
    if not all(_CLAUSE.fullmatch(clause) for clause in value.split(",")):
        raise ValueError(f"{value!r} is not a range of versions, such as >=10.3,<11")
    return value


ComputeCapability = Annotated[Text, AfterValidator(_compute_capability)]
CpuFeature = Annotated[Text, AfterValidator(_cpu_feature)]
VersionRange = Annotated[Text, AfterValidator(_version_range)]


class Target(Section):
    """A named class of machine: what it runs, what it computes in, and the defaults of stages a recipe leaves out."""

    schema_: Literal["vlaopt.target/1"] = Field(alias="schema", description="Always `vlaopt.target/1`.")
    name: Slug = Field(description="Its name; the same as its file's.")
    description: Text = Field(default="", description="One line for people.")
    kind: Literal["cpu", "gpu", "jetson"] = Field(description="What computes.")
    arch: Literal["x86_64", "aarch64"] = Field(description="Instruction set of the host, as `uname -m` says it.")
    backends: Annotated[Many[Slug], Field(min_length=1)] = Field(description="Backends, the preferred one first.")
    reduce_range: bool = Field(
        default=False,
        description="Whether weights have 7 bits: 8-bit products saturate on x86 CPUs without VNNI when they have 8.",
    )
    precisions: Many[Precision] = Field(description="Precisions that every machine of the class computes in.")
    cpu_features: Many[CpuFeature] = Field(
        default=(),
        description="What every CPU of the class has, named as in /proc/cpuinfo; `a | b` means one of the two.",
    )
    compute_capabilities: Many[ComputeCapability] = Field(default=(), description="Of its GPUs, such as `8.7`.")
    tensorrt: VersionRange | None = Field(default=None, description="Versions of TensorRT, such as `>=10.3,<11`.")
    engine_built_on: Literal["any", "target"] = Field(
        description="Where an engine can be built: on any machine, or on one of the class only."
    )
    memory_mib: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Memory that the policy may count on, shared with the host on a Jetson."
    )
    power_modes: Many[Text] = Field(default=(), description="Names of its power modes, lowest first.")
    jetpack: Text | None = Field(default=None, description="JetPack releases it stands for.")
    driver: Text | None = Field(default=None, description="NVIDIA driver it needs.")
    defaults: dict[StageSection, dict[str, Any]] = Field(
        default={}, description="Values of stage keys that a recipe leaves out."
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Target:
        if "fp32" not in self.precisions:
            raise ValueError("precisions lacks fp32, which every target has")
        if (self.kind == "cpu") == bool(self.compute_capabilities):
            raise ValueError(f"kind {self.kind} and compute_capabilities {list(self.compute_capabilities)} disagree")
        if self.kind != "cpu" and self.cpu_features:
            raise ValueError(f"cpu_features are for kind cpu, and this is a {self.kind}")
        for precision in self.precisions:
            if reason := self.hardware_lacks(precision):
                raise ValueError(reason)
        return self

    def hardware_lacks(self, precision: Precision) -> str | None:
        """Why some GPU of the class cannot compute in `precision`, or None."""
        minimum = MINIMUM_COMPUTE_CAPABILITY.get(precision, (0, 0))
        short = [sm for sm in self.compute_capabilities if _numbers(sm) < minimum]
        if not short:
            return None
        needed = ".".join(map(str, minimum))
        return f"{precision} needs compute capability {needed} or above; {self.name} is SM {', '.join(short)}"

    def cpu_lacks(self, features: Collection[str]) -> str | None:
        """Why a CPU with these features is not of the class, or None."""
        return cpu_lacks(self.name, self.cpu_features, features)

    def takes_tensorrt(self, version: str) -> bool:
        """Whether a TensorRT version such as '10.3.0.30' lies in the target's range; True when it names none."""
        return self.tensorrt is None or all(_holds(clause, version) for clause in self.tensorrt.split(","))


def cpu_lacks(target: str, wanted: Sequence[str], features: Collection[str]) -> str | None:
    """Why a CPU with these features is none of a target that wants `Target.cpu_features`, or None."""
    missing = [either for either in wanted if not {*_OR.split(either)} & {*features}]
    words = " and ".join(_OR.sub(" or ", either) for either in missing)
    return f"{target} needs a CPU with {words}, which this one lacks" if missing else None


def load_target(name_or_path: str, beside: Path | None = None) -> Target:
    """The target of that name, or in that file (relative to the folder `beside`, else to the working directory).

    Raises InputError for an unknown name or a missing file, RecipeError with every problem of the file.
    """
    return read_target(find_target(name_or_path, beside))


def find_target(name_or_path: str, beside: Path | None = None) -> Path:
    """The file that describes a target (see `load_target`)."""
    if is_path(name_or_path):
        path = (beside or Path()) / name_or_path
        if not path.is_file():
            raise InputError(f"no target file {name_or_path!r}", where=str(path))
        return path
    files = _target_files()
    if name_or_path not in files:
        close = difflib.get_close_matches(name_or_path, files, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown target {name_or_path!r}", hint=f"{hint}targets: {', '.join(files)}; or a path")
    return files[name_or_path]


def is_path(name_or_path: str) -> bool:
    """Whether the text names a target's file in place of a target."""
    return "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def read_target(path: Path) -> Target:
    """The target in one file; raises as `load_target` does."""
    document = read_mapping(path)
    places = Places.of(str(path), document.places)
    problems = problems_of(Target, document.values, places)
    if not problems and document.values["name"] != path.stem:
        problems = [InputError(f"name differs from the file's, {path.stem!r}", where=places.where(("name",)))]
    if problems:
        raise RecipeError(problems)
    return Target.model_validate(document.values)


def list_targets() -> tuple[str, ...]:
    """The names of the targets that come with vlaopt, in the order of their files."""
    return tuple(_target_files())


def _target_files() -> dict[str, Path]:
    package = Path(__file__).resolve().parent
    # A wheel carries the files inside the package; a clone keeps them beside it.
    for folder in (package / "_targets", package.parent / "recipes" / "targets"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise EnvironmentProblem(
        "vlaopt's target files are missing", hint="reinstall vlaopt, or name a target file by path"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))


def _holds(clause: str, version: str) -> bool:
    match = _CLAUSE.fullmatch(clause)
    if match is None:
        raise InputError(f"{clause!r} is not a range of versions")
    operator, bound = match[1], _numbers(match[2])
    # 10.3.0.30 is within ==10.3 and not above <=10.3: a bound speaks for all its builds.
    had = _numbers(version)[: len(bound)]
    had += (0,) * (len(bound) - len(had))
    return {
        ">=": had >= bound,
        "<=": had <= bound,
        "==": had == bound,
        "!=": had != bound,
        ">": had > bound,
        "<": had < bound,
    }[operator]
