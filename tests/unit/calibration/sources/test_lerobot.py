"""LeRobotDataset folders give what LeRobot's own classes give, pixel by pixel; unsound ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlaopt.calibration.making import open_source
from vlaopt.calibration.sources.lerobot import LeRobotDataset
from vlaopt.errors import InputError

pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
import torch
import torchvision
from lerobot.datasets import lerobot_dataset

FRONT, STATE, GRIPPER = "observation.images.front", "observation.state", "observation.gripper"
HEIGHT, WIDTH, FPS = 48, 64, 10
LENGTHS = (12, 25, 17)
TASKS = ("open the drawer", "close it")


def frame(episode: int, step: int) -> np.ndarray:
    """A moving bar over a colour of the episode: neighbouring frames differ."""
    image = np.full((HEIGHT, WIDTH, 3), (40 * episode, 90, 200 - 30 * episode), np.uint8)
    image[:, (step * 5) % WIDTH :][:, :6] = 250
    image[40:] = 10 * step
    return image


def state(episode: int, step: int) -> np.ndarray:
    return np.sin(np.arange(4) + 0.3 * step + episode).astype(np.float32)


def create(root: Path, storage: str, files_mb: float = 100, codec: str = "libsvtav1") -> Path:
    """A dataset of format v3.0, by LeRobot's own class."""
    features = {
        STATE: {"dtype": "float32", "shape": (4,), "names": list("abcd")},
        FRONT: {"dtype": storage, "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    made = lerobot_dataset.LeRobotDataset.create("somebody/drawers", FPS, features, root=root, vcodec=codec)
    made.meta.info.update(data_files_size_in_mb=files_mb, video_files_size_in_mb=files_mb)
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            made.add_frame(
                {
                    STATE: state(episode, step),
                    FRONT: frame(episode, step),
                    "action": np.array([episode, step], np.float32),
                    "task": TASKS[episode % 2],
                }
            )
        made.save_episode()
    made.finalize()
    return root


class VideoReader:
    """What LeRobot asks of torchvision's reader, which newer ones no longer have: frames from a key frame on."""

    def __init__(self, path: str, _: str) -> None:
        self.container = av.open(path)

    def seek(self, time_s: float, keyframes_only: bool) -> None:
        assert keyframes_only
        stream = self.container.streams.video[0]
        self.container.seek(round(time_s / stream.time_base), backward=True, any_frame=False, stream=stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for decoded in self.container.decode(video=0):
            pixels = torch.as_tensor(decoded.to_rgb().to_ndarray()).permute(2, 0, 1)
            yield {"data": pixels, "pts": float(decoded.pts * decoded.time_base)}


@pytest.fixture(scope="module", params=["image", "video", "video in many files", "h264 video"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = "image" if request.param == "image" else "video"
    codec = "h264" if "h264" in request.param else "libsvtav1"
    root = tmp_path_factory.mktemp("dataset") / "drawers"
    return create(root, storage, 0.001 if "many" in request.param else 100, codec)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create(tmp_path_factory.mktemp("videos") / "drawers", "video")


@pytest.fixture
def copied(videos: Path, tmp_path: Path) -> Path:
    """A dataset to be spoilt."""
    return Path(shutil.copytree(videos, tmp_path / "drawers"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("every", [1, 9])
def test_every_value_is_that_of_lerobot(dataset: Path, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.io, "VideoReader", VideoReader, raising=False)
    monkeypatch.setattr(torchvision, "set_video_backend", lambda _: None, raising=False)
    theirs = lerobot_dataset.LeRobotDataset("somebody/drawers", root=dataset, video_backend="pyav")
    ours = open_source(dataset)
    assert len(ours.steps) == len(theirs) == sum(LENGTHS)
    rows = range(0, len(theirs), every)
    items = [theirs[row] for row in rows]
    for name in (STATE, "action"):
        for item, value in zip(items, ours.column(name, rows), strict=True):
            np.testing.assert_array_equal(value, item[name].numpy())
    for item, value in zip(items, ours.column(FRONT, rows), strict=True):
        pixels = (item[FRONT].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(value, pixels)
    for row, item in zip(rows, items, strict=True):
        assert ours.steps.instructions[ours.steps.task[row]] == item["task"]
        assert (ours.steps.episode[row], ours.steps.step[row]) == (int(item["episode_index"]), int(item["frame_index"]))


def test_the_frames_of_a_video_are_those_of_reading_it_whole(videos: Path) -> None:
    with av.open(str(videos / "videos" / FRONT / "chunk-000/file-000.mp4")) as container:
        whole = [decoded.to_ndarray(format="rgb24") for decoded in container.decode(video=0)]
    rows = [0, 1, 11, 12, 30, 53]
    for row, value in zip(rows, LeRobotDataset(videos).column(FRONT, rows), strict=True):
        np.testing.assert_array_equal(value, whole[row])
        assert np.abs(value.astype(int) - frame_of_row(row)).mean() < 8, "not the frame that was recorded there"


def frame_of_row(row: int) -> np.ndarray:
    episode = int(np.searchsorted(np.cumsum(LENGTHS), row, side="right"))
    return frame(episode, row - sum(LENGTHS[:episode]))


def test_it_says_what_it_is(videos: Path) -> None:
    source = LeRobotDataset(videos)
    assert source.origin == "drawers: LeRobotDataset v3.0, 10 frames a second, 3 episodes, 54 frames"
    assert source.observed == (STATE, FRONT)
    assert source.columns[FRONT] == ("uint8", (HEIGHT, WIDTH, 3))
    assert source.columns["action"] == ("float32", (2,))


def write_older(root: Path, storage: str, version: str = "v2.1") -> Path:
    """A dataset as LeRobot wrote it before v3.0: one file per episode, metadata as lines of JSON; channels first."""
    features = {
        STATE: {"dtype": "float32", "shape": [4], "names": None},
        GRIPPER: {"dtype": "float32", "shape": [1], "names": None},
        FRONT: {"dtype": storage, "shape": [3, HEIGHT, WIDTH], "names": ["channels", "height", "width"]},
    }
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "fps": FPS,
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {**features, "timestamp": {"dtype": "float32", "shape": [1], "names": None}},
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"task_index": number, "task": task}) for number, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines) + "\n")
    for episode, length in enumerate(LENGTHS):
        columns = {
            STATE: pa.array([state(episode, step).tolist() for step in range(length)], pa.list_(pa.float32())),
            GRIPPER: pa.array(np.arange(length, dtype=np.float32)),
            "timestamp": pa.array(np.arange(length, dtype=np.float32) / np.float32(FPS)),
            "frame_index": pa.array(range(length)),
            "episode_index": pa.array([episode] * length),
            "task_index": pa.array([episode % 2] * length),
        }
        if storage == "image":
            columns[FRONT] = pa.array([{"bytes": png(frame(episode, step)), "path": "x.png"} for step in range(length)])
        else:
            encode(root / f"videos/chunk-{episode // 2:03d}/{FRONT}/episode_{episode:06d}.mp4", episode, length)
        path = root / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=7)
    return root


def png(image: np.ndarray) -> bytes:
    from vlaopt.calibration.images import encode_png

    return encode_png(image)


def encode(path: Path, episode: int, length: int) -> None:
    """H.264 with pictures that need later ones, and one key frame a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(FPS), "bf": "2", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for step in range(length):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(episode, step), format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
@pytest.mark.parametrize("storage", ["image", "video"])
def test_older_datasets(tmp_path: Path, storage: str, version: str) -> None:
    source = open_source(write_older(tmp_path / "older", storage, version))
    assert source.steps.instructions == TASKS
    assert source.steps.task.tolist() == [0] * 12 + [1] * 25 + [0] * 17
    rows = list(range(0, 54, 4))
    for row, value in zip(rows, source.column(STATE, rows), strict=True):
        np.testing.assert_array_equal(value, state(int(source.steps.episode[row]), int(source.steps.step[row])))
    assert [value.tolist() for value in source.column(GRIPPER, rows)] == [[step] for step in source.steps.step[rows]]
    for row, value in zip(rows, source.column(FRONT, rows), strict=True):
        assert value.shape == (HEIGHT, WIDTH, 3)
        difference = np.abs(value.astype(int) - frame_of_row(row))
        assert difference.max() == 0 if storage == "image" else difference.mean() < 8


def test_it_needs_the_data(copied: Path) -> None:
    shutil.rmtree(copied / "data")
    with pytest.raises(InputError, match=r"holds no data/\*/\*\.parquet"):
        open_source(copied)


@pytest.mark.parametrize("version", ["v1.6", "v4.0", "v3.1"])
def test_another_version(copied: Path, version: str) -> None:
    edit(copied / "meta/info.json", lambda info: info.update(codebase_version=version))
    with pytest.raises(InputError, match=f"LeRobotDataset {version}, this version reads v2.0, v2.1 and v3.0"):
        open_source(copied)


def test_info_that_is_wrong_is_named(copied: Path) -> None:
    edit(copied / "meta/info.json", lambda info: info.update(fps=0))
    with pytest.raises(InputError, match=r"info\.json:fps: Input should be greater than 0"):
        open_source(copied)


def test_a_pointer_in_the_place_of_a_file(copied: Path) -> None:
    data = next((copied / "data").rglob("*.parquet"))
    data.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="not a sound Parquet file") as caught:
        open_source(copied)
    assert caught.value.hint is not None and "git lfs pull" in caught.value.hint


def test_a_table_cut_at_every_tenth(copied: Path) -> None:
    data = next((copied / "data").rglob("*.parquet"))
    whole = data.read_bytes()
    for tenth in range(10):
        data.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(InputError, match="not a sound Parquet file"):
            open_source(copied)


def test_a_video_cut_at_every_fifth(copied: Path) -> None:
    video = next((copied / "videos").rglob("*.mp4"))
    whole = video.read_bytes()
    for fifth in range(5):
        video.write_bytes(whole[: len(whole) * fifth // 5])
        with pytest.raises(InputError, match=r"not a sound MP4 video|no frame at|holds no video"):
            list(open_source(copied).column(FRONT, [0, 53]))


def test_a_video_of_another_size(copied: Path) -> None:
    edit(copied / "meta/info.json", lambda info: info["features"][FRONT].update(shape=[HEIGHT, WIDTH * 2, 3]))
    with pytest.raises(InputError, match="frames of 48x64, the dataset says 48x128"):
        list(open_source(copied).column(FRONT, [0]))


@pytest.mark.parametrize("template", ["../{video_key}.mp4", "/{video_key}.mp4"])
def test_a_video_outside_of_the_dataset(copied: Path, template: str) -> None:
    edit(copied / "meta/info.json", lambda info: info.update(video_path=template))
    with pytest.raises(InputError, match="leads out of the dataset"):
        list(open_source(copied).column(FRONT, [0]))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    columns = pq.read_table(path).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), path)


def test_a_frame_that_is_missing(copied: Path) -> None:
    data = next((copied / "data").rglob("*.parquet"))
    rewrite(data, lambda columns: columns["frame_index"].__setitem__(5, 6))
    with pytest.raises(InputError, match="episode 0 lacks a frame, has one twice"):
        open_source(copied)


def test_a_task_that_nobody_knows(copied: Path) -> None:
    data = next((copied / "data").rglob("*.parquet"))
    rewrite(data, lambda columns: columns["task_index"].__setitem__(5, 7))
    with pytest.raises(InputError, match="says nothing of task 7"):
        open_source(copied)


def test_a_gap_in_a_vector(copied: Path) -> None:
    data = next((copied / "data").rglob("*.parquet"))
    rewrite(data, lambda columns: columns[STATE].__setitem__(5, [1.0, None, 2.0, 3.0]))
    with pytest.raises(InputError, match=r"at frame 5 of episode 0.*1 missing"):
        list(open_source(copied).column(STATE, [4, 5]))


@pytest.mark.parametrize("names", [None, ["channels", "height", "width"], ["channel", "h", "w"]])
def test_a_shape_with_the_channels_first(copied: Path, names: list[str] | None) -> None:
    edit(copied / "meta/info.json", lambda info: info["features"][FRONT].update(shape=[3, HEIGHT, WIDTH], names=names))
    assert open_source(copied).columns[FRONT] == ("uint8", (HEIGHT, WIDTH, 3))


def test_depth_is_no_image(copied: Path) -> None:
    edit(copied / "meta/info.json", lambda info: info["features"][FRONT].update(shape=[HEIGHT, WIDTH, 1]))
    assert FRONT not in open_source(copied).columns


def test_a_file_that_changes_during_the_reading(copied: Path) -> None:
    source = open_source(copied)
    source.check_unchanged()
    data = next((copied / "data").rglob("*.parquet"))
    data.write_bytes(data.read_bytes())
    with pytest.raises(InputError, match="changed while it was read"):
        source.check_unchanged()
