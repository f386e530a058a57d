"""vlaopt: from a trained Vision-Language-Action policy to a small, fast, checked artifact.

Importing this package loads none of torch, onnx, onnxruntime or tensorrt.

    artifact = vlaopt.build("recipe.yaml")      # Artifact; artifact.path
    policy = vlaopt.open(artifact.path)         # needs neither torch nor onnx
    action = policy.predict(observation)        # float32 [action_dim], in the robot's units
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.runtime.policy import Policy

__version__ = "0.1.0"


def build(
    recipe: str | Path, *, overrides: Sequence[str] = (), target: str | None = None, output: str | Path = "artifacts"
) -> Artifact:
    """Build the artifact of a recipe and publish it under `output`; see `vlaopt build --help`.

    `overrides` are `key=value` texts, checked like the recipe. Raises the errors of `vlaopt.errors`.
    """
    from vlaopt.chain import build as run

    return run(recipe, overrides=overrides, target=target, output=output).artifact


def open(
    path: str | Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    steps: int | None = None,
    n_action_steps: int | None = None,
    trust: bool = False,
) -> Policy:
    """The policy in the artifact at `path`, ready to predict; see `vlaopt.runtime.policy.open`."""
    from vlaopt.runtime.policy import open as open_policy

    return open_policy(path, backend=backend, threads=threads, steps=steps, n_action_steps=n_action_steps, trust=trust)
