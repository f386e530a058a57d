"""Combinations of keys that cannot work, and paths that are not there. Each rule is one small generator."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlaopt.recipe.model import RecipeFile
from vlaopt.recipe.reader import KeyPath
from vlaopt.target import Precision, Target, is_path

_NEEDED_PRECISION: dict[str, Precision] = {
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "int8-dynamic": "int8",
    "int8-weights": "int8",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "mixed": "int8",
}

_NEEDS_DATA = {"int8": "int8-dynamic", "mixed": "int8-dynamic", "fp16": "bf16", "fp8": "bf16"}
"""Schemes that look at observations, with one that does not."""


@dataclass(frozen=True)
class Finding:
    """One rule that is broken: the key to name, and whether the target (not the recipe) is what rules it out."""

    path: KeyPath
    message: str
    hint: str | None = None
    target_cannot: bool = False


def check_keys(recipe: RecipeFile) -> list[Finding]:
    """Keys that contradict each other, whatever the target."""
    return [
        *_prune_without_amount(recipe),
        *_recovery_without_pruning(recipe),
        *_global_channels(recipe),
        *_without_calibration(recipe),
        *_unsimplified_quantization(recipe),
        *_floats_beside_nothing(recipe),
        *_success_without_episodes(recipe),
    ]


def check_target(recipe: RecipeFile, target: Target) -> list[Finding]:
    """What the recipe asks and the target cannot do."""
    return [*_backend_of_target(recipe, target), *_schemes_of_target(recipe, target)]


def check_paths(recipe: RecipeFile, folder: Path) -> list[Finding]:
    """Files and folders that the recipe names and that are not there, or that must differ and do not."""
    return [
        *(
            Finding(path, f"no such file or folder: {text!r}", f"looked for {folder / text}")
            for path, text in _named_paths(recipe)
            if not (folder / text).exists()
        ),
        *_held_out_is_held_out(recipe, folder),
    ]


def leaves_folder(target: str) -> Finding | None:
    """A target file, as the recipe names it, that is not below the recipe's folder."""
    path = PurePosixPath(target.replace("\\", "/"))
    if is_path(target) and (path.is_absolute() or ".." in path.parts):
        hint = "keep the target's file beside the recipe, or give it with --target"
        return Finding(("target",), f"{target!r} leaves the recipe's folder", hint)
    return None


def _named_paths(recipe: RecipeFile) -> Iterator[tuple[KeyPath, str]]:
    yield ("policy", "checkpoint"), recipe.policy.checkpoint
    yield from ((("policy", "hub_overrides", field), path) for field, path in recipe.policy.hub_overrides.items())
    if recipe.calibration is not None:
        yield ("calibration", "path"), recipe.calibration.path
    if recipe.prune.recovery is not None:
        yield ("prune", "recovery", "demonstrations"), recipe.prune.recovery.demonstrations
    if recipe.verify.observations is not None:
        yield ("verify", "observations"), recipe.verify.observations


def _prune_without_amount(recipe: RecipeFile) -> Iterator[Finding]:
    if recipe.prune.method != "none" and recipe.prune.amount == 0:
        yield Finding(("prune", "amount"), f"method {recipe.prune.method} needs an amount above 0", "0.125 is mild")


def _recovery_without_pruning(recipe: RecipeFile) -> Iterator[Finding]:
    if recipe.prune.method == "none" and recipe.prune.recovery is not None:
        hint = "set prune.method, or prune.recovery to null"
        yield Finding(("prune", "recovery"), "recovery training without pruning (method none)", hint)


def _global_channels(recipe: RecipeFile) -> Iterator[Finding]:
    if recipe.prune.global_ and recipe.prune.method == "channels":
        yield Finding(("prune", "global"), "a global limit is for method l1-unstructured only", "set it to false")


def _without_calibration(recipe: RecipeFile) -> Iterator[Finding]:
    if recipe.calibration is not None or recipe.quantize.scheme == "none":
        return
    asked = _asked(recipe)
    rules = enumerate(recipe.quantize.rules)
    asked += [(("quantize", "rules", index, "scheme"), rule.scheme) for index, rule in rules]
    for path, scheme in asked:
        if scheme in _NEEDS_DATA and (len(path) == 2 or scheme != recipe.quantize.scheme):
            hint = f"add `calibration: {{path: ...}}`; {_NEEDS_DATA[scheme]} needs none"
            yield Finding(path, f"scheme {scheme} needs a calibration set", hint)


def _held_out_is_held_out(recipe: RecipeFile, folder: Path) -> Iterator[Finding]:
    observations = recipe.verify.observations
    recovery = recipe.prune.recovery
    used = [recipe.calibration.path] if recipe.calibration else []
    used += [recovery.demonstrations] if recovery else []
    if observations is not None and (folder / observations).resolve() in {(folder / path).resolve() for path in used}:
        message = "these observations are calibrated or trained on, so they are not held out"
        yield Finding(("verify", "observations"), message, "name a set of other episodes, or leave the key out")


def _unsimplified_quantization(recipe: RecipeFile) -> Iterator[Finding]:
    if not recipe.onnx.simplify and recipe.quantize.scheme != "none":
        message = f"simplify cannot be false with quantize.scheme {recipe.quantize.scheme}"
        yield Finding(("onnx", "simplify"), message, "constants must be folded before scales are placed")


def _floats_beside_nothing(recipe: RecipeFile) -> Iterator[Finding]:
    scheme, floats = recipe.quantize.scheme, recipe.quantize.floats
    if floats != "fp32" and scheme in ("none", "fp16", "bf16"):
        message = f"floats {floats} stand beside a scheme of fewer bits, and scheme is {scheme}"
        yield Finding(("quantize", "floats"), message, f"write scheme: {floats}, or leave floats out")


def _success_without_episodes(recipe: RecipeFile) -> Iterator[Finding]:
    limits: dict[str, Any] = {"success": recipe.accept.success, "success_drop": recipe.accept.success_drop}
    for key, limit in limits.items():
        if limit is not None and recipe.verify.closed_loop is None:
            hint = "add `verify: {closed_loop: {simulator: metaworld}}`"
            yield Finding(("accept", key), f"{key} needs episodes to count", hint)


def _backend_of_target(recipe: RecipeFile, target: Target) -> Iterator[Finding]:
    backend = recipe.engine.backend
    if backend == "auto" or backend in target.backends:
        return
    close = difflib.get_close_matches(backend, target.backends, n=1)
    hint = f"did you mean `{close[0]}`? " if close else ""
    message = f"target {target.name} has no backend {backend}"
    yield Finding(
        ("engine", "backend"), message, f"{hint}it has auto, {', '.join(target.backends)}", target_cannot=True
    )


def _schemes_of_target(recipe: RecipeFile, target: Target) -> Iterator[Finding]:
    asked = _asked(recipe)
    if recipe.quantize.scheme != "none":
        rules = enumerate(recipe.quantize.rules)
        asked += [(("quantize", "rules", index, "scheme"), rule.scheme) for index, rule in rules]
    for path, scheme in asked:
        if reason := _cannot(scheme, target):
            yield Finding(path, reason, f"{target.name} has {', '.join(target.precisions)}", target_cannot=True)


def _asked(recipe: RecipeFile) -> list[tuple[KeyPath, str]]:
    """The schemes that are asked for beside rules, by the keys that do."""
    quantize = recipe.quantize
    return [(("quantize", "scheme"), quantize.scheme), (("quantize", "floats"), quantize.floats)]


def _cannot(scheme: str, target: Target) -> str | None:
    """Why the target cannot run a scheme, or None."""
    precision = _NEEDED_PRECISION.get(scheme)
    if precision is None:
        return None
    if reason := target.hardware_lacks(precision):
        return reason
    if precision not in target.precisions:
        return f"target {target.name} does not compute in {precision}"
    # TensorRT has no DynamicQuantizeLinear: only CPU backends find ranges while running.
    if scheme == "int8-dynamic" and target.kind != "cpu":
        return f"int8-dynamic runs on CPU targets only; {target.name} is a {target.kind} target"
    return None
