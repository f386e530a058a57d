"""An artifact on disk: opened with every check, read once per file, written whole or not at all."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ValidationError

from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import (
    FILE_NAME,
    SIZE_LIMIT,
    EngineEntry,
    FileEntry,
    Finish,
    Manifest,
    Role,
    data_path,
    decode,
    first_problem,
)
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.errors import InputError
from vlaopt.files import copy_file, link_file, read_file, remove_directory, staged_directory, sync, write_file
from vlaopt.hashing import canonical_json, digest_bytes, digest_file
from vlaopt.recipe.model import SCHEMA as RECIPE_SCHEMA
from vlaopt.recipe.model import Recipe

SPEC_PATH = "policy/spec.json"
REBUILD = "build the artifact again, or copy it again from where it was built"
GIVE = "give the directory that `vlaopt build` printed"


@dataclass(frozen=True)
class Artifact:
    """An immutable directory with a manifest. `encoded` are the manifest's bytes, `id` is their SHA-256."""

    path: Path
    manifest: Manifest
    encoded: bytes = field(repr=False)
    id: str

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Open the artifact at `path` and check that its files are exactly the listed ones, with the listed sizes.

        Raises InputError for anything missing, extra, linked or of another size. Contents are hashed on `read`.
        """
        folder = Path(path)
        if folder.is_file():
            raise InputError("a file, not an artifact directory", where=str(path), hint=GIVE)
        if not folder.is_dir():
            raise InputError("no such artifact directory", where=str(path), hint=GIVE)
        if not (folder / FILE_NAME).is_file():
            raise InputError("not an artifact: it has no manifest.json", where=str(path), hint=GIVE)
        data = read_file(folder / FILE_NAME, limit=SIZE_LIMIT)
        artifact = cls(folder, decode(data, where=str(folder / FILE_NAME)), data, digest_bytes(data))
        artifact._check_exact_set()
        return artifact

    @classmethod
    def from_manifest(cls, path: Path, manifest: Manifest) -> Artifact:
        """The files at `path` under another manifest, one that is not written yet."""
        encoded = manifest.encode()
        return cls(path, manifest, encoded, digest_bytes(encoded))

    def _check_exact_set(self) -> None:
        listed = {entry.path: entry.size for entry in self.manifest.files}
        try:
            found = self._sizes()
        except OSError as error:  # taken away, or out of reach, while it is looked at
            raise InputError(f"cannot be read: {error.strerror}", where=str(error.filename or self.path)) from error
        for name in sorted(listed.keys() - found.keys()):
            raise InputError(f"{name} is missing", where=str(self.path), hint=REBUILD)
        for name in sorted(found.keys() - listed.keys()):
            raise InputError(
                f"{name} is not listed in the manifest", where=str(self.path), hint="remove it, or " + REBUILD
            )
        for name, size in listed.items():
            if found[name] != size:
                raise InputError(f"{name} has {found[name]} bytes, {size} listed", where=str(self.path), hint=REBUILD)

    def _sizes(self) -> dict[str, int]:
        """Bytes of every file but the manifest. Raises InputError for what is neither a plain file nor a directory."""
        found: dict[str, int] = {}
        for path in self.path.rglob("*"):
            info = path.lstat()
            if stat.S_ISDIR(info.st_mode):
                continue
            name = path.relative_to(self.path).as_posix()
            if not stat.S_ISREG(info.st_mode):
                raise InputError(f"{name} is a link or a device, not a plain file", where=str(self.path), hint=REBUILD)
            found[name] = info.st_size
        found.pop(FILE_NAME, None)
        return found

    def entry(self, path: str) -> FileEntry:
        """The manifest's line for `path`. Raises InputError when the artifact has no such file."""
        for entry in self.manifest.files:
            if entry.path == path:
                return entry
        raise InputError(f"the artifact has no {path}", where=str(self.path))

    def has(self, path: str) -> bool:
        """Whether the manifest lists `path`."""
        return any(entry.path == path for entry in self.manifest.files)

    def read(self, path: str) -> bytes:
        """The bytes of a listed file, read once and checked against its SHA-256. Use these bytes, not the file."""
        entry = self.entry(path)
        data = read_file(self.path / path, limit=entry.size)
        self._hold(entry, digest_bytes(data))
        return data

    def graph(self, path: str) -> Graph:
        """The portable graph at `path`, with its weights' own file where it has one."""
        return _graph(path, self.read, self.has)

    def check(self) -> None:
        """Read every file, in pieces, and compare its digest. Raises InputError for the first that differs."""
        for entry in self.manifest.files:
            self._hold(entry, digest_file(self.path / entry.path)[1])

    def give(self, entry: FileEntry, place: Callable[[Path, Path], None], folder: Path) -> None:
        """Bring a file to the same path below `folder` by `place(from, to)`, and check there that it is the listed one.

        Its bytes are never all in memory.
        """
        place(self.path / entry.path, folder / entry.path)
        self._hold(entry, digest_file(folder / entry.path)[1])

    def _hold(self, entry: FileEntry, digest: str) -> None:
        if digest != entry.sha256:
            raise InputError(
                f"{entry.path} was changed after it was written: its digest differs",
                where=str(self.path),
                hint=REBUILD,
            )

    def spec(self) -> PolicySpec:
        """The PolicySpec."""
        try:
            return PolicySpec.model_validate_json(self.read(SPEC_PATH))
        except ValidationError as error:
            raise InputError(f"{SPEC_PATH}: {first_problem(error)}", where=str(self.path)) from error

    def recipe(self) -> Recipe:
        """The recipe the artifact was built by. Its paths mean nothing away from the recipe's own folder."""
        fields = {"schema": RECIPE_SCHEMA, "name": self.manifest.name, "version": self.manifest.version}
        try:
            return Recipe.model_validate({**self.manifest.recipe, **fields, "path": self.path / FILE_NAME})
        except ValidationError as error:
            raise InputError(f"{FILE_NAME}: recipe: {first_problem(error)}", where=str(self.path)) from error

    def cpu_features(self) -> tuple[str, ...]:
        """`Target.cpu_features` of the target it was built for; none where its manifest does not say."""
        target = self.manifest.recipe.get("target")
        wanted = target.get("cpu_features", ()) if isinstance(target, dict) else ()
        if not isinstance(wanted, list | tuple) or not all(isinstance(feature, str) for feature in wanted):
            raise InputError(f"{FILE_NAME}: target: cpu_features is not a list of names", where=str(self.path))
        return tuple(wanted)

    def size(self, *roles: Role) -> int:
        """Bytes of the files of these roles."""
        return sum(entry.size for entry in self.manifest.by_role(*roles))

    @property
    def version(self) -> str:
        """`<recipe version>+<first twelve digits of the id>`."""
        return f"{self.manifest.version}+{self.id[:12]}"


@dataclass
class Draft:
    """An artifact being written into a staging directory."""

    folder: Path
    entries: dict[str, FileEntry] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: EngineEntry | None = None
    finish: Finish | None = None
    unfinished: Path | None = None
    """Where a long stage may keep what it found out, for the next process when this one is killed."""
    unfinished_folder: Path | None = None
    """Where it may keep files for that, each whole or not at all."""
    opened: Path | None = None
    """Where this machine keeps what backends compile and time, a folder for each backend."""

    def write(self, path: str, data: bytes, role: Role) -> None:
        """Add one file, in the place of one of the same path."""
        self.entries[path] = FileEntry(path=path, role=role, size=len(data), sha256=digest_bytes(data))
        write_file(self.folder / path, data)

    def read(self, path: str) -> bytes:
        """The bytes of a file that was written before."""
        return read_file(self.folder / path, limit=self.entries[path].size)

    def has(self, path: str) -> bool:
        """Whether `path` was written before."""
        return path in self.entries

    def graph(self, path: str) -> Graph:
        """The portable graph that was written to `path`."""
        return _graph(path, self.read, self.has)

    def write_graph(self, path: str, graph: Graph, role: Role) -> None:
        """Add a portable graph, in the place of one of the same path."""
        self.write(path, graph.model, role)
        beside = data_path(path)
        if graph.data:
            assert graph.data_name == PurePosixPath(beside).name
            self.write(beside, graph.data, role)
        elif self.has(beside):
            self.remove(beside)

    def write_json(self, path: str, value: BaseModel | Mapping[str, Any], role: Role) -> None:
        """Add one file of canonical JSON."""
        plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
        self.write(path, canonical_json(plain), role)

    def write_folder(self, path: str, save: Callable[[Path], None], role: Role) -> None:
        """Add every file of the folder `path` that `save` makes, in the place of what was there."""
        for name in [name for name in self.entries if name.startswith(f"{path}/")]:
            self.remove(name)
        save(self.folder / path)
        for file in sorted(self.folder.joinpath(path).rglob("*")):
            if file.is_file():
                sync(file)
                name = file.relative_to(self.folder).as_posix()
                size, digest = digest_file(file)
                self.entries[name] = FileEntry(path=name, role=role, size=size, sha256=digest)

    def carry(self, source: Artifact, *roles: Role) -> None:
        """Take over the files of `roles` from `source`, with its metrics; each is hashed on the way.

        They are linked, where the file system can, and so must never be written into: `write` replaces them.
        """
        for entry in source.manifest.by_role(*roles):
            source.give(entry, link_file, self.folder)
            self.entries[entry.path] = entry
        self.metrics = {**source.manifest.metrics, **self.metrics}
        if "engine" in roles:
            self.engine, self.finish = source.manifest.engine, source.manifest.finish

    def remove(self, path: str) -> None:
        """Drop one file that was written before."""
        del self.entries[path]
        (self.folder / path).unlink()


def _graph(path: str, read: Callable[[str], bytes], has: Callable[[str], bool]) -> Graph:
    beside = data_path(path)
    return Graph(read(path), read(beside), PurePosixPath(beside).name) if has(beside) else Graph(read(path))


@contextmanager
def drafted(final: Path) -> Iterator[Draft]:
    """A draft that becomes the artifact directory `final`, or nothing at all; see `staged_directory`."""
    with staged_directory(final) as folder:
        draft = Draft(folder)
        yield draft
        if not (folder / FILE_NAME).is_file():
            raise AssertionError("a draft was published without a manifest")


def finish(draft: Draft, **fields: Any) -> Manifest:
    """Write the manifest, last. `fields` are those of Manifest that a draft does not hold."""
    files = tuple(draft.entries[path] for path in sorted(draft.entries))
    manifest = Manifest(files=files, metrics=draft.metrics, engine=draft.engine, finish=draft.finish, **fields)
    write_file(draft.folder / FILE_NAME, manifest.encode())
    return manifest


def copy(artifact: Artifact, final: Path) -> Artifact:
    """A byte-for-byte copy of `artifact` at `final`, every file checked on the way.

    An equal one there is kept; a damaged copy of the same one, of which a file was changed or lost, makes room. No file
    is linked with the original: whoever writes into the copy harms the copy alone.
    Raises InputError when anything else lies there.
    """
    if _same_manifest(artifact, final) and not _sound(final):
        remove_directory(final)
    with staged_directory(final) as folder:
        for entry in artifact.manifest.files:
            artifact.give(entry, copy_file, folder)
        write_file(folder / FILE_NAME, artifact.encoded)
    if not _same_manifest(artifact, final):
        raise InputError("something else lies there already", where=str(final), hint="give another --output")
    return Artifact.open(final)


def _same_manifest(artifact: Artifact, folder: Path) -> bool:
    manifest = folder / FILE_NAME
    return manifest.is_file() and read_file(manifest) == artifact.encoded


def _sound(folder: Path) -> bool:
    try:
        Artifact.open(folder).check()
    except InputError:
        return False
    return True
