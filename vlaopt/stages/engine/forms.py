"""Components compiled, each in one form, their files on the disk; native code is made and tried in a child process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlaopt import backends, isolated
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import data_path
from vlaopt.backends import Backend, Engine, EngineOptions, Session
from vlaopt.errors import EnvironmentProblem, InputError, StageError, VlaoptError
from vlaopt.files import link_file, read_file, remove_dead_staging, remove_directory, staged_directory, write_file
from vlaopt.hashing import canonical_json, digest_bytes, digest_file
from vlaopt.memory import available_mib
from vlaopt.progress import Progress, phases
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import assemble

Advance = Callable[[str, int, int], None]

COPIES, LIBRARIES_MIB = 4, 512
"""Memory that making native code takes: the weights as the graph, as the builder's network, as the engine and as its
file, and the libraries themselves. Kernels that are tried take less, in scratch memory that the recipe bounds."""
DOCTOR = "`vlaopt doctor ARTIFACT` says whether driver and libraries of this machine fit together"
_LISTING = "form.json"


@dataclass(frozen=True)
class Form:
    """One component compiled in one form; no session until it is opened.

    Its files lie on the disk: those of every form on every backend may not fit into memory.
    """

    files: Mapping[str, Path]
    size: int
    precisions: Mapping[str, int]
    notes: tuple[str, ...]
    layers: Mapping[str, str]
    needs: Mapping[str, str]
    facts: Mapping[str, Any]
    session: Session | None = None


@dataclass(frozen=True)
class Workshop:
    """Where the forms of one backend are made: `folder` for as long as the stage runs, `kept` beyond its death."""

    source: Artifact
    library: Backend
    options: EngineOptions
    folder: Path
    kept: Path
    progress: Progress

    def form(self, component: str, variant: str, graph: str) -> Form:
        """A component compiled from the graph at that path of the artifact, or taken from what a dead process made.

        Native code is made in a child process. Raises what the backend's `build` raises, StageError when the child
        dies, EnvironmentProblem when there is not enough memory to start.
        """
        made = self.folder / component / variant
        try:
            if self.library.native:
                self._make_apart(made, self.kept / component / variant, graph)
            else:
                _keep(made, self.library.build(self.source.graph(graph), self.options))
        except VlaoptError as error:
            error.where = error.where or f"{component} ({variant})"
            raise
        return _form(made)

    def _make_apart(self, made: Path, kept: Path, graph: str) -> None:
        if _taken(kept, made):
            return
        remove_dead_staging(kept.parent)
        name = self.library.name
        with phases(self.progress) as told:
            isolated.run(
                *(_build, name, self.source, graph, self.options, kept),
                what=f"the builder of {name}",
                told=told,
                hint=f"what was built already is kept; {DOCTOR}",
            )
        if not _taken(kept, made):
            raise StageError("its files were changed or removed while they were taken", where=str(kept))

    def forget(self, *parts: str) -> None:
        """Let nobody take up again what was kept of a component or a form of it, or of all."""
        remove_directory(self.kept.joinpath(*parts))

    def try_out(self, forms: Mapping[str, Mapping[str, Form]]) -> None:
        """Open native code and have it act once in a child process, so that a crash is an error; else nothing to do.

        `forms` are whole policies by what they are called: a form for every component. Raises what opening or running
        raises, StageError when the child dies.
        """
        if not self.library.native:
            return
        name = self.library.name
        files = {called: {key: dict(form.files) for key, form in whole.items()} for called, whole in forms.items()}
        with self.progress.task(f"trying the engines on {name}"):
            isolated.run(_try, name, self.source, files, self.options, what=f"running on {name}", hint=DOCTOR)

    def opened(self, form: Form, **changes: Any) -> Form:
        """The form with a session, opened with changed options where some are given."""
        return replace(form, session=_open(self.library, form.files, replace(self.options, **changes)))


def _open(library: Backend, files: Mapping[str, Path], options: EngineOptions) -> Session:
    return library.open({name: read_file(path) for name, path in files.items()}, options)


def _build(tell: Advance, name: str, source: Artifact, graph: str, options: EngineOptions, kept: Path) -> None:
    """In the child: one form, written whole."""
    paths = [path for path in (graph, data_path(graph)) if source.has(path)]
    check_memory(sum(source.entry(path).size for path in paths), options.settings.get("workspace_mib", 0))
    engine = backends.get(name).build(source.graph(graph), replace(options, advance=tell))
    with staged_directory(kept) as staging:
        _keep(staging, engine)


def _try(
    tell: object, name: str, source: Artifact, forms: Mapping[str, Mapping[str, Mapping[str, Path]]], options: Any
) -> None:
    """In the child: every whole policy acts on one golden observation."""
    library, sample = backends.get(name), Golden.of(source).samples[0]
    for whole in forms.values():
        sessions = {component: _open(library, files, options) for component, files in whole.items()}
        assemble(source, sessions, backend=name).predict_chunk(*sample)


def needed_mib(graph_bytes: int, workspace_mib: int) -> int:
    """Memory that building native code from a graph takes."""
    return COPIES * graph_bytes // (1 << 20) + LIBRARIES_MIB + workspace_mib


def check_memory(graph_bytes: int, workspace_mib: int) -> None:
    """Raise EnvironmentProblem when building native code from a graph would run out of memory, telling have and need.

    Of the host, and of a GPU that has its own; what cannot be known is not checked.
    """
    needed = needed_mib(graph_bytes, workspace_mib)
    for where, had in (("memory", available_mib()), ("GPU memory", _device_mib())):
        if had is not None and had < needed:
            raise EnvironmentProblem(
                f"{needed} MiB of {where} are needed to build the engine, {had} are free",
                hint="close what else needs memory (the desktop, other programs) or add swap; what was built already "
                "is kept: run the same command to go on",
            )


def _device_mib() -> int | None:
    """Free memory of a GPU that has its own, or None. A Jetson's is the host's."""
    from vlaopt.backends.tensorrt import cuda

    if cuda.problem() or cuda.device().integrated:
        return None
    return cuda.free_memory_mib()


def _keep(folder: Path, engine: Engine) -> None:
    """Write an engine's files, and the listing that says what they are."""
    for name, data in engine.files.items():
        write_file(folder / name, data)
    listing = {
        "files": {name: digest_bytes(data) for name, data in engine.files.items()},
        "precisions": dict(engine.precisions),
        "notes": list(engine.notes),
        "layers": dict(engine.layers),
        "needs": dict(engine.needs),
        "facts": dict(engine.facts),
    }
    write_file(folder / _LISTING, canonical_json(listing))


def _taken(kept: Path, made: Path) -> bool:
    """Bring what was kept to `made`; False where there is nothing, or not what was written."""
    try:
        listing = json.loads(read_file(kept / _LISTING))
        for name, digest in listing["files"].items():
            link_file(kept / name, made / name)
            if digest_file(made / name)[1] != digest:
                raise InputError("it was changed", where=str(kept / name))
        link_file(kept / _LISTING, made / _LISTING)
    except (InputError, ValueError, KeyError, TypeError, AttributeError):
        remove_directory(kept)
        remove_directory(made)
        return False
    return True


def _form(made: Path) -> Form:
    listing = json.loads(read_file(made / _LISTING))
    files = {name: made / name for name in listing["files"]}
    return Form(
        files,
        sum(path.stat().st_size for path in files.values()),
        listing["precisions"],
        tuple(listing["notes"]),
        listing["layers"],
        listing["needs"],
        listing["facts"],
    )
