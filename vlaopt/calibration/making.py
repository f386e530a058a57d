"""Making a calibration set from recorded episodes: which steps, what of each, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlaopt.calibration.card import CARD, TASK
from vlaopt.calibration.checks import Expected
from vlaopt.calibration.reading import CalibrationSet
from vlaopt.calibration.sampling import spread
from vlaopt.calibration.sources import ACTION, Source, lerobot
from vlaopt.calibration.sources.episodes import EpisodeFolder, episode_files
from vlaopt.calibration.sources.recorded import RecordedSet
from vlaopt.calibration.writing import Columns, Facts, check_new
from vlaopt.errors import InputError
from vlaopt.files import check_writable
from vlaopt.progress import Progress, Silent, track
from vlaopt.tensors import Array

SAMPLES = 256
ROUNDING = 1e-6
"""Float64 may become float32 where no value moves by more than this: a micrometre, a microradian …"""
ROUNDING_RATIO = 1e-4
"""… or by more than this part of what the value spans over the samples."""


@dataclass(frozen=True)
class Wish:
    """What a set is to hold.

    `history` steps per sample (1: no time dimension), `chunk` actions per sample (None: no actions). `rename` maps
    names of the source to the policy's; `keep` are the names (after renaming) to take, all that are observations for
    None. `expected` is what a policy takes: then exactly its names are taken.
    """

    samples: int = SAMPLES
    seed: int = 0
    history: int = 1
    chunk: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] | None = None
    expected: Expected | None = None


@dataclass(frozen=True)
class Made:
    """The set, and what was done to its values on the way, for people."""

    samples: CalibrationSet
    notes: tuple[str, ...]


def open_source(path: Path) -> Source:
    """The recordings in the folder `path`, by what lies there. Raises InputError when nothing there can be read."""
    if (path / lerobot.INFO).exists():
        return lerobot.LeRobotDataset(path)
    if (path / CARD).exists():
        return RecordedSet(path)
    if path.is_dir() and episode_files(path):
        return EpisodeFolder(path)
    raise InputError(
        ("nothing to make a calibration set from" if path.is_dir() else "a file, a folder is needed")
        if path.exists()
        else "no such folder",
        where=str(path),
        hint="give a LeRobotDataset (meta/info.json), a folder of .npz or .safetensors episodes, or a calibration set",
    )


def make(source: Source, path: Path, wish: Wish, facts: Facts, progress: Progress | None = None) -> Made:
    """Write the set that `wish` describes to the new folder `path`; nothing when anything is wrong.

    Samples are spread evenly over instructions, episodes and time (`sampling.spread`). A history repeats the first step
    of its episode, a chunk the last. Raises InputError for names that are not there, for values that a calibrator could
    not use (`checks.check`), and when the recordings change meanwhile.
    """
    check_new(path)
    check_writable(path.parent)
    names = names_of(source, wish)
    history = 1 if _fits(source, names, wish) else wish.history
    rows = spread(source.steps.task, source.steps.episode, source.steps.step, wish.samples, wish.seed)
    taken = np.asarray(rows, dtype=np.int64)
    steps = source.steps
    texts = [steps.instructions[number] if steps.instructions else "" for number in steps.task[taken]]
    columns = Columns(steps.episode[taken].tolist(), steps.step[taken].tolist(), texts)
    notes: list[str] = []
    for name, origin in names.items():
        if name == TASK:
            columns.add_task()
            continue
        values = _windows(source, origin, _before(source, rows, history), progress)
        if history == 1:
            values = (window[0] for window in values)
        columns.add(name, _single(values, name, source, notes) if source.columns[origin][0] == "float64" else values)
    if wish.chunk is not None:
        columns.add_actions(_actions(source, rows, wish.chunk, progress))
    unwritten = columns.unwritten(path, facts)
    samples = unwritten.samples
    samples.check(wish.expected or samples.layout())
    source.check_unchanged()
    return Made(unwritten.write(), tuple(notes))


def names_of(source: Source, wish: Wish) -> dict[str, str]:
    """The names to take, and what the source calls each. Raises InputError for one that is not there."""
    renamed = {origin: wish.rename.get(origin, origin) for origin in source.columns if origin != ACTION}
    known = {name: origin for origin, name in renamed.items()}
    where, has = str(source.path), ", ".join(sorted({*known, *([TASK] if source.steps.instructions else [])}))
    for origin in wish.rename:
        if origin not in renamed:
            raise InputError(f"has no {origin!r} to rename; it has {', '.join(sorted(source.columns))}", where=where)
    if len(known) < len(renamed):
        raise InputError("two names become one", where=where, hint="rename both, or none")
    if source.steps.instructions:
        known[TASK] = TASK
    if wish.expected is not None:
        wanted, why = tuple(wish.expected), "which the policy takes"
    elif wish.keep is not None:
        wanted, why = wish.keep, "which is to be kept"
    else:
        told = {origin: renamed[origin] for origin in source.columns if origin in renamed}
        wanted = tuple(name for origin, name in told.items() if origin in source.observed or origin in wish.rename)
        wanted, why = (*wanted, *([TASK] if TASK in known else [])), ""
    for name in wanted:
        if name not in known:
            raise InputError(
                f"has no {name!r}, {why}; it has {has}", where=where, hint="--rename OLD=NEW gives it the policy's name"
            )
    if not any(name != TASK for name in wanted):
        raise InputError(
            f"no observations: it has {has}", where=where, hint="--rename OLD=NEW gives the policy's names"
        )
    return {name: known[name] for name in wanted}


def _fits(source: Source, names: Mapping[str, str], wish: Wish) -> bool:
    """Whether the source's steps are what the policy takes, history and all: so are those of a set made for it."""
    expected = wish.expected or {}
    return bool(expected) and all(
        name == TASK or source.columns[origin] == expected[name] for name, origin in names.items()
    )


def _before(source: Source, rows: Sequence[int], count: int) -> list[list[int]]:
    """For every row, itself and the `count` − 1 rows before it; the first of its episode for those before that."""
    if count > 1:
        whole_episodes(source, "a history")
    first, _ = source.steps.bounds()
    return [[max(row - back, int(first[row])) for back in range(count - 1, -1, -1)] for row in rows]


def _after(source: Source, rows: Sequence[int], count: int) -> list[list[int]]:
    """For every row, itself and the `count` − 1 rows after it; the last of its episode for those after that."""
    _, last = source.steps.bounds()
    return [[min(row + ahead, int(last[row])) for ahead in range(count)] for row in rows]


def whole_episodes(source: Source, what: str) -> None:
    """Raises InputError when `what`, which needs every step of an episode, is asked of single steps."""
    if isinstance(source, RecordedSet):
        raise InputError(
            f"{what} needs whole episodes, a calibration set holds single steps",
            where=str(source.path),
            hint="make the set again from the recordings it was made from",
        )


def _windows(source: Source, name: str, windows: Sequence[Sequence[int]], progress: Progress | None) -> Iterator[Array]:
    """The values at every window's rows, [time, …]. Windows and their rows ascend."""
    needed = sorted({row for window in windows for row in window})
    stream = zip(needed, source.column(name, needed), strict=True)
    held: dict[int, Array] = {}
    for window in track(progress or Silent(), f"reading {name}", windows, len(windows)):
        while window[-1] not in held:
            row, value = next(stream)
            held[row] = value
        held = {row: value for row, value in held.items() if row >= window[0]}
        yield np.stack([held[row] for row in window])
    next(stream, None)  # lets the column's reader come to its end and close its file


def _actions(source: Source, rows: Sequence[int], chunk: int, progress: Progress | None) -> list[Array]:
    """Chunks float32 [chunk, action]."""
    if ACTION not in source.columns:
        raise InputError("holds no actions", where=str(source.path), hint="leave --actions out")
    if isinstance(source, RecordedSet):
        had = source.columns[ACTION][1][0]
        if chunk > had:
            whole_episodes(source, f"its chunks are of {had} actions: {chunk}")
        return [value[:chunk] for value in source.column(ACTION, rows)]
    values = list(_windows(source, ACTION, _after(source, rows, chunk), progress))
    return [value.astype(np.float32) for value in values]


def _single(values: Iterator[Array], name: str, source: Source, notes: list[str]) -> Array:
    """Float64 samples as float32. Raises InputError where that would lose what a value tells."""
    whole = np.stack(list(values))
    if not np.isfinite(whole).all():
        return whole.astype(np.float32)  # refused, with the sample's number, by the checks
    with np.errstate(over="ignore"):
        rounded = whole.astype(np.float32)
    lost = np.abs(whole - rounded.astype(np.float64)).max(axis=0)
    allowed = np.maximum(ROUNDING, ROUNDING_RATIO * (whole.max(axis=0) - whole.min(axis=0)))
    if not (lost <= allowed).all():
        raise InputError(
            f"{name} is float64 and loses up to {lost.max():.3g} in float32",
            where=str(source.path),
            hint="subtract what all values share, or use units in which they are smaller",
        )
    notes.append(f"{name}: float64 rounded to float32, by {lost.max():.3g} at most")
    return rounded
