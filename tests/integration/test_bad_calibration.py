"""A calibration set that cannot be used is refused by name, and nothing of it is stored (bad inputs 14 to 21)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, ROOT, SmallBuild
from vlaopt.artifact.store import Store
from vlaopt.calibration import CalibrationSet, write_calibration_set
from vlaopt.chain import run_stage
from vlaopt.errors import InputError
from vlaopt.progress import Silent, Task
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import get

SET = ROOT / "calibration/metaworld"
STATE, IMAGE = "observation.state", "observation.images.front"
Observations = list[dict[str, Any]]


def write(path: Path, observations: Observations) -> Path:
    count = len(observations)
    write_calibration_set(
        path,
        observations,
        episodes=[0] * count,
        steps=list(range(count)),
        name="bad",
        description="made by a test",
        source="a test",
        licence="Apache-2.0",
        created_by="a test",
        seed=0,
    )
    return path


def spoil(value: float) -> Callable[[Observations], Observations]:
    def change(rows: Observations) -> Observations:
        rows[5][STATE] = np.asarray([0.1, value, 0.1, 0.5], dtype=np.float32)
        return rows

    return change


def constant(rows: Observations) -> Observations:
    return [{**row, STATE: rows[0][STATE], IMAGE: rows[0][IMAGE]} for row in rows]


def renamed(rows: Observations) -> Observations:
    return [{STATE: row[STATE], "observation.images.wrist": row[IMAGE], "task": row["task"]} for row in rows]


def double(rows: Observations) -> Observations:
    return [{**row, STATE: row[STATE].astype(np.float64)} for row in rows]


def channels_first(rows: Observations) -> Observations:
    return [{**row, IMAGE: np.ascontiguousarray(row[IMAGE].transpose(2, 0, 1))} for row in rows]


def bright(rows: Observations) -> Observations:
    return [{**row, IMAGE: row[IMAGE].transpose(2, 0, 1).astype(np.float32)} for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(float("nan")), "observation.state holds NaN at sample 5"),
        (spoil(float("inf")), "observation.state holds infinity at sample 5"),
        (spoil(1e30), r"observation.state reaches 1e\+30 at sample 5"),
        (constant, "observation.images.front is the same in all 12 samples"),
        (lambda rows: rows[:1], "1 samples, at least 8 are needed"),
        (double, r"observation.state is float64 \[4\], the policy needs float32"),
        (channels_first, r"is uint8 \[3, 96, 96\], the policy needs uint8 \[96, 96, 3\]"),
        (bright, "spans 0 to [0-9]+ at sample 0, float images are 0 to 1"),
        (renamed, "has no 'observation.images.front', which the policy needs"),
    ],
    ids=["nan", "inf", "outlier", "constant", "one-sample", "float64", "chw", "0-255", "other-camera"],
)
def test_a_bad_set_is_refused(
    small_build: SmallBuild, tmp_path: Path, change: Callable[[Observations], Observations], message: str
) -> None:
    shipped = CalibrationSet.open(SET)
    rows = [dict(shipped.observation(row)) for row in shipped.subset(12, 0)]
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match=message) as raised:
        path = write(tmp_path / "set", change(rows))
        recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, f"calibration.path={path}"])
        source = small_build.result.outcomes[1].artifact
        run_stage(get("quantize"), recipe, source, store=store, progress=Silent())
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert not list(store.root.rglob("manifest.json"))


class Meddler(Silent):
    """Lengthens a file whenever work of some name begins, like somebody who records over a set in use."""

    def __init__(self, path: Path, label: str) -> None:
        self._path, self._label = path, label

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        if label == self._label:
            self._path.write_bytes(self._path.read_bytes() + b"\0")
        return super().task(label, total)


@pytest.mark.parametrize("label", ["finding extremes", "counting values"])
def test_a_set_that_changes_while_it_is_used_is_refused(small_build: SmallBuild, tmp_path: Path, label: str) -> None:
    shutil.copytree(SET, tmp_path / "set")
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, f"calibration.path={tmp_path / 'set'}"])
    source, store = small_build.result.outcomes[1].artifact, Store(tmp_path / "store")
    meddler = Meddler(tmp_path / "set/observations.safetensors", label)
    with pytest.raises(InputError, match="changed while it was in use") as raised:
        run_stage(get("quantize"), recipe, source, store=store, progress=meddler)
    assert raised.value.exit_code == 2
    assert not list(store.root.rglob("manifest.json"))


def test_an_npz_is_never_unpickled(small_build: SmallBuild, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    np.savez(folder / "observations.npz", state=np.asarray([{"a": 1}], dtype=object))
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, f"calibration.path={folder}"])
    with pytest.raises(InputError, match="npz"):
        source = small_build.result.outcomes[1].artifact
        run_stage(get("quantize"), recipe, source, store=Store(tmp_path / "store"), progress=Silent())


def test_a_set_cut_short_is_refused(small_build: SmallBuild, tmp_path: Path) -> None:
    shutil.copytree(SET, tmp_path / "set")
    data = tmp_path / "set/observations.safetensors"
    data.write_bytes(data.read_bytes()[:-100])
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, f"calibration.path={tmp_path / 'set'}"])
    with pytest.raises(InputError, match=r"bytes|size|digest"):
        source = small_build.result.outcomes[1].artifact
        run_stage(get("quantize"), recipe, source, store=Store(tmp_path / "store"), progress=Silent())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.pt"], "pickle"),
        (["config.json"], "model.safetensors"),
    ],
)
def test_a_checkpoint_that_cannot_be_trusted_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in files:
        shipped = ROOT / "recipes/edge-vla/checkpoint" / name
        (folder / name).write_bytes(shipped.read_bytes() if shipped.is_file() else b"\x80\x04.")
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, f"policy.checkpoint={folder}"])
    with pytest.raises(InputError, match=message):
        run_stage(get("export"), recipe, None, store=Store(tmp_path / "store"), progress=Silent())
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_linked_checkpoint_gives_the_same_key(tmp_path: Path) -> None:
    shipped = ROOT / "recipes/edge-vla/checkpoint"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in shipped.iterdir():
        (folder / path.name).symlink_to(path)
    stage = get("export")
    plain = load_recipe(CPU)
    linked = load_recipe(CPU, overrides=[f"policy.checkpoint={folder}"])
    assert stage.outside(linked) == stage.outside(plain)
