"""What a policy wants to observe: told by an artifact or a LeRobot checkpoint without torch, by a recipe with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlaopt.errors import InputError

if TYPE_CHECKING:
    from vlaopt.artifact.policy_spec import PolicySpec
    from vlaopt.calibration import Expected

CONFIG, PREPROCESSOR = "config.json", "policy_preprocessor.json"
_LIMIT = 16 << 20
_TAKES_SENTENCES = ("smolvla", "pi0", "pi05", "pi0fast", "pi0_fast")
"""LeRobot's policies that take an instruction, for older checkpoints, which have no preprocessor file to say it."""


@dataclass(frozen=True)
class Wanted:
    """Dtype and shape of every part of an observation, and the time steps it holds."""

    expected: Expected
    history: int


def wanted_by(policy: Path) -> Wanted:
    """What the policy of an artifact, a LeRobot checkpoint or a recipe observes. Raises InputError for others."""
    from vlaopt.artifact.manifest import FILE_NAME

    if policy.is_file() and policy.suffix in (".yaml", ".yml"):
        from vlaopt import policies
        from vlaopt.recipe.load import load_recipe

        # The recipe's calibration set is what is about to be made.
        return _of_spec(policies.load(load_recipe(policy, check_paths=False)).spec)
    if (policy / FILE_NAME).is_file():
        from vlaopt.artifact.artifact import Artifact

        return _of_spec(Artifact.open(policy).spec())
    config = _read(policy / CONFIG) if (policy / CONFIG).is_file() else {}
    if isinstance(config.get("input_features"), dict):
        return _of_lerobot(policy, config)
    raise InputError(
        "tells nothing of observations" if policy.exists() else "no such artifact, checkpoint or recipe",
        where=str(policy),
        hint="give an artifact, a LeRobot checkpoint or a recipe",
    )


def _of_spec(spec: PolicySpec) -> Wanted:
    return Wanted(spec.observation_layout(), spec.history)


def _of_lerobot(folder: Path, config: dict[str, Any]) -> Wanted:
    """From `input_features` of its config, by the names that observations have before its preprocessor renames them."""
    steps = _steps(folder)
    history = config.get("n_obs_steps", 1)
    renamed: dict[str, str] = next(
        (step["config"].get("rename_map", {}) for step in steps if "rename" in step["name"]), {}
    )
    before = {new: old for old, new in renamed.items()}
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        time = (int(history),) if int(history) > 1 else ()
        for name, feature in config["input_features"].items():
            shape = tuple(int(size) for size in feature["shape"])
            if feature["type"] == "VISUAL" and ".empty_camera_" not in name:
                expected[before.get(name, name)] = ("uint8", (*time, *shape[1:], shape[0]))
            elif feature["type"] != "VISUAL":
                expected[before.get(name, name)] = ("float32", (*time, *shape))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not understood: {error!r}", where=f"{folder / CONFIG}:input_features") from error
    takes = any("tokenizer" in step["name"] for step in steps) if steps else config.get("type") in _TAKES_SENTENCES
    if takes:
        expected["task"] = ("string", ())
    return Wanted(expected, max(int(history), 1))


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Name and config of each step of the preprocessor; none where the checkpoint has no such file."""
    path = folder / PREPROCESSOR
    found = _read(path).get("steps", []) if path.is_file() else []
    return [
        {"name": str(step.get("registry_name", "")), "config": step.get("config") or {}}
        for step in (found if isinstance(found, list) else [])
        if isinstance(step, dict)
    ]


def _read(path: Path) -> dict[str, Any]:
    from vlaopt.files import read_file

    try:
        value = json.loads(read_file(path, limit=_LIMIT))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from error
    return value if isinstance(value, dict) else {}
