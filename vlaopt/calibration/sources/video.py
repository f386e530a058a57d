"""Single frames of a video, exactly those that are asked for; nothing else is turned into pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vlaopt.errors import InputError
from vlaopt.optional import require

_GO_ON_S = 1.0
"""A frame this near ahead is reached by decoding on, another by seeking to the key frame before it."""


def read_frames(
    file: IO[bytes], times_s: Sequence[float], size: tuple[int, int], tolerance_s: float, *, where: str
) -> Iterator[NDArray[np.uint8]]:
    """The frames nearest to `times_s`, which ascend, uint8 [height, width, 3], from an open MP4 file.

    `size` is the height and width they must have. Raises InputError, with `where`, when the video is unsound or of
    another size, or its nearest frame is more than `tolerance_s` away.
    """
    av = require("av", "data")
    with _sound(av, where), av.open(file, format="mp4") as container:
        if not container.streams.video:
            raise InputError("holds no video", where=where)
        stream = container.streams.video[0]
        had = (stream.codec_context.height, stream.codec_context.width)
        if had != size:
            raise InputError(f"frames of {had[0]}x{had[1]}, the dataset says {size[0]}x{size[1]}", where=where)
        frames = _Frames(container, stream)
        for time_s in times_s:
            frame = frames.nearest(time_s)
            if frame is None or abs(frame.time - time_s) > tolerance_s:
                near = "none" if frame is None else f"the nearest at {frame.time:.3f} s"
                raise InputError(
                    f"no frame at {time_s:.3f} s, {near}",
                    where=where,
                    hint="the video is cut short, or not of this dataset",
                )
            pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
            yield pixels


class _Frames:
    """A video's frames around the place last asked for."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container = container
        self._stream = stream
        self._decoded: Iterator[Any] = iter(())
        self._before: Any = None
        self._at: Any = None

    def nearest(self, time_s: float) -> Any:
        """The frame nearest to `time_s`, None when there is none."""
        if self._at is None or not self._at.time - _GO_ON_S < time_s <= self._at.time + _GO_ON_S:
            self._seek(time_s)
        if self._before is not None and time_s < self._before.time:
            self._seek(time_s)
        while self._at is None or self._at.time < time_s:
            frame = next(self._decoded, None)
            if frame is None:
                break
            if frame.time is not None:
                self._before, self._at = self._at, frame
        known = [frame for frame in (self._before, self._at) if frame is not None]
        return min(known, key=lambda frame: abs(frame.time - time_s), default=None)

    def _seek(self, time_s: float) -> None:
        """To the key frame at or before `time_s`."""
        self._container.seek(
            round(time_s / self._stream.time_base), stream=self._stream, backward=True, any_frame=False
        )
        self._decoded = self._container.decode(self._stream)
        self._before = self._at = None


@contextmanager
def _sound(av: Any, where: str) -> Iterator[None]:
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(
            f"not a sound MP4 video: {error.strerror or error}", where=where, hint="fetch the file again"
        ) from error
