"""A finished artifact as a model repository of Triton Inference Server, and what its clients must know."""

from __future__ import annotations

from pathlib import Path

from vlaopt.artifact.artifact import SPEC_PATH, Artifact
from vlaopt.artifact.manifest import EngineEntry
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.files import read_file, staged_directory, write_file
from vlaopt.runtime.golden import ACTIONS, INPUTS, OBSERVATIONS, TEXT
from vlaopt.triton.guide import guide
from vlaopt.triton.models import VERSION, Model, models_of, pipeline
from vlaopt.triton.schema import check_ensemble, component_config, ensemble_config, text

REPOSITORY, GUIDE, CONFIG = "models", "README.md", "config.pbtxt"


def export(artifact: Artifact, folder: Path) -> Path:
    """Write `folder`: the repository in `models/`, README.md, and beside them what clients need; gives that repository.

    A policy whose components run once gets an ensemble of them; of a loop, README.md says how a client runs it. The
    repository is a folder of its own, as Triton takes every folder in it for a model. Written whole or not at all.
    Raises InputError for an artifact without an engine, one that Triton cannot serve, and a folder that holds files;
    EnvironmentProblem where the engine is not finished, or Triton's schema is not installed.
    """
    _check_vacant(folder)
    engine = _engine_of(artifact)
    spec = artifact.spec()
    models = models_of(artifact.manifest.name, spec, engine)
    whole = pipeline(artifact.manifest.name, spec, models)
    head = f"{artifact.manifest.name} {artifact.version} for {artifact.manifest.target}"
    manual = guide(head, artifact, engine, spec, models, whole).encode()
    with staged_directory(folder) as staging:
        repository = staging / REPOSITORY
        for model in models.values():
            config = component_config(model, engine)
            write_file(repository / model.name / CONFIG, text(config, f"{model.component} of {head}"))
            _write_files(artifact, model, repository / model.name / VERSION)
        if whole:
            ensemble = ensemble_config(whole)
            check_ensemble(ensemble, {model.name: component_config(model, engine) for model in models.values()})
            write_file(repository / whole.name / CONFIG, text(ensemble, f"all components of {head}"))
            (repository / whole.name / VERSION).mkdir()  # Triton wants a version of every model, of ensembles too
        for path in _assets(artifact):
            write_file(staging / path, artifact.read(path))
        write_file(staging / GUIDE, manual)
    if read_file(folder / GUIDE) != manual:  # another process was faster, and the rename kept its folder
        raise InputError("something else was written there meanwhile", where=str(folder), hint="give another --output")
    return folder / REPOSITORY


def _check_vacant(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise InputError("something lies there already", where=str(folder), hint="give another --output")


def _engine_of(artifact: Artifact) -> EngineEntry:
    manifest = artifact.manifest
    if manifest.finish:
        raise EnvironmentProblem(
            f"the engine for {manifest.target} is not built yet",
            where=str(artifact.path),
            hint=f"on the target: {manifest.finish.command} --output DIR, then export what that gives",
        )
    if manifest.engine is None:
        raise InputError(
            f"the artifact is of stage {manifest.stage!r} and has no engine",
            where=str(artifact.path),
            hint="build it to the end: vlaopt build RECIPE",
        )
    return manifest.engine


def _write_files(artifact: Artifact, model: Model, folder: Path) -> None:
    for path, name in model.files.items():
        write_file(folder / name, artifact.read(path))


def _assets(artifact: Artifact) -> list[str]:
    """What a client needs to make tensors of observations and actions of tensors, and to see that it does."""
    spec = artifact.spec()
    named = [spec.statistics, *(step.asset for step in spec.preprocess if step.kind == "tokenise")]
    wanted = [SPEC_PATH, *(f"policy/{asset}" for asset in named), OBSERVATIONS, TEXT, INPUTS, ACTIONS]
    return [path for path in dict.fromkeys(wanted) if artifact.has(path)]
