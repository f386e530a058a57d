"""A first recipe for a checkpoint and a target: what it proposes and why. Writes nothing, fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vlaopt import policies
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.policies import EagerPolicy
from vlaopt.policies.checkpoints import CONFIG, OnHub, check_folder, read_json
from vlaopt.progress import Progress
from vlaopt.proposal.anatomy import Anatomy, examine
from vlaopt.proposal.precision import Rule, rules_of, scheme_of
from vlaopt.recipe.fields import Slug
from vlaopt.target import Target, load_target

GUESSED_HZ = 20.0
"""Where the checkpoint does not say its rate: most tabletop arms are recorded at 10 to 30 frames a second."""


@dataclass(frozen=True)
class Wish:
    """What the user said. Paths as they shall stand in the recipe; `type` None reads it from the checkpoint."""

    checkpoint: str
    target: str
    type: str | None = None
    name: str | None = None
    calibration: str | None = None
    held_out: str | None = None
    hub_overrides: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Sizes:
    """How many observations each stage works on: fewer where one chunk takes long."""

    calibration: int
    golden: int
    held_out: int


@dataclass(frozen=True)
class Contents:
    """What is known of a policy that could be loaded."""

    spec: PolicySpec
    components: tuple[Anatomy, ...]
    unused: int
    rules: tuple[Rule, ...]
    sizes: Sizes


@dataclass(frozen=True)
class Proposal:
    """Everything that the recipe says. Without `contents`, the field `on_hub` of its config must be filled in first."""

    wish: Wish
    type: str
    name: str
    target: Target
    contents: Contents | None
    on_hub: str | None = None

    @property
    def scheme(self) -> str:
        """The scheme that is proposed for the policy, once nothing is missing."""
        return scheme_of(self.target)


_SIZES = ((1e9, Sizes(256, 32, 128)), (30e9, Sizes(128, 16, 64)), (float("inf"), Sizes(32, 8, 16)))
"""Observations by multiply-adds per chunk: a second of a CPU core is some 20 to 60 of 1e9 in FP32."""


def propose(wish: Wish, folder: Path, progress: Progress) -> Proposal:
    """A recipe for `wish` that works in `folder`, which its paths are relative to.

    The checkpoint is loaded and every component called once. Raises InputError for what is no checkpoint of a known
    type, an unknown target, a name that is none, and a set that the policy could not use.
    """
    target = load_target(wish.target, folder)
    checkpoint = folder / wish.checkpoint
    kind = wish.type or _type_of(checkpoint)
    name = _checked(wish.name or kind)
    adapter = policies.get(kind)
    hub = {field: folder / path for field, path in (wish.hub_overrides or {}).items()}
    try:
        with progress.task("loading the checkpoint"):
            eager = adapter.load(checkpoint, hub, {})
    except OnHub as error:
        return Proposal(wish, kind, name, target, None, error.field)
    for text in filter(None, (wish.calibration, wish.held_out)):
        CalibrationSet.open(folder / text).check(eager.spec.observation_layout())
    with progress.task("calling every component once"):
        return Proposal(wish, kind, name, target, _contents(eager, target))


def _type_of(checkpoint: Path) -> str:
    check_folder(checkpoint)
    config = read_json(checkpoint / CONFIG)
    kind = config.get("type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        hint = f"name it: --type T; known types: {', '.join(policies.names())}"
        raise InputError("does not say the policy's type", where=f"{checkpoint / CONFIG}:type", hint=hint)
    return kind


def _checked(name: str) -> str:
    try:
        checked: str = TypeAdapter(Slug).validate_python(name)
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"].removeprefix("Value error, "), where="--name") from error
    return checked


def _contents(eager: EagerPolicy, target: Target) -> Contents:
    components, unused = examine(eager)
    macs = sum(component.macs_per_chunk for component in components)
    sizes = next(sizes for limit, sizes in _SIZES if macs < limit)
    return Contents(eager.spec, components, unused, rules_of(eager.spec, components, target), sizes)
