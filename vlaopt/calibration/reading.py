"""Opening a calibration set: every byte read once, hashed, then parsed; samples decoded as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaopt.calibration.card import CARD, DATA, TASK, Card, Feature, check_layout, read_card
from vlaopt.calibration.checks import MINIMUM_SAMPLES, Expected, check
from vlaopt.calibration.images import decode_image
from vlaopt.calibration.sampling import spread
from vlaopt.errors import InputError
from vlaopt.files import read_file
from vlaopt.hashing import digest_bytes, digest_json
from vlaopt.tensors import Array, unpack

ARCHIVE_SUFFIXES = (".npz", ".npy", ".pkl", ".pickle", ".pt", ".pth", ".h5", ".zip")
_DATA_LIMIT = 8 << 30

Observation = dict[str, Any]


@dataclass(frozen=True)
class CalibrationSet:
    """An opened set: its card, and every byte of its data in memory, hashed as it was read."""

    path: Path
    card: Card
    digest: str
    """SHA-256 of the canonical card, which holds the digest of the data."""
    _tensors: Mapping[str, Array] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> CalibrationSet:
        """Read and check the folder `path`. Raises InputError when it is not a whole, unaltered calibration set."""
        _refuse_archives(path)
        card, value = read_card(path / CARD)
        entry = card.files[0]
        data = read_file(path / DATA, limit=_DATA_LIMIT)
        if digest_bytes(data) != entry.sha256:
            raise InputError(
                f"not the file its card describes: {len(data)} bytes of another digest, not {entry.size}",
                where=str(path / DATA),
                hint="it was changed, cut short, or written to during the read; copy or record the set again",
            )
        tensors = unpack(data, where=str(path / DATA))
        check_layout(tensors, card, path / DATA)
        return cls(path, card, digest_json(value), tensors)

    def __len__(self) -> int:
        return self.card.samples

    def __iter__(self) -> Iterator[Observation]:
        return (self.observation(index) for index in range(len(self)))

    def observation(self, index: int) -> Observation:
        """Sample `index` as the policy takes it: arrays by name (images uint8 [H, W, 3]), and `task`, a string.

        Where the policy looks back, arrays have a leading time dimension, the newest step last.
        """
        self._check_index(index)
        return {name: self._value(name, feature, index) for name, feature in self.card.observation.items()}

    def value(self, name: str, index: int) -> Any:
        """One part of sample `index`. Raises KeyError for a name the card does not have."""
        self._check_index(index)
        return self._value(name, self.card.observation[name], index)

    def task_index(self, index: int) -> int:
        """Which of the card's instructions sample `index` was recorded under."""
        self._check_index(index)
        return int(self._tensors["task_index"][index])

    def action(self, index: int) -> NDArray[np.float32]:
        """The expert's chunk at sample `index`, float32 [chunk, action]. Raises InputError when the set has none."""
        self._check_index(index)
        if self.card.action is None:
            raise InputError("the set holds no actions", where=str(self.path))
        chunk: NDArray[np.float32] = self._tensors["action"][index].copy()
        return chunk

    def column(self, name: str) -> Array:
        """All samples of a feature that is not an image or text, [samples, ...]; `action` for the expert's chunks.

        Raises InputError when there is no such column.
        """
        feature = self.card.observation.get(name)
        if name not in self._tensors or (name != "action" and (feature is None or feature.encoding != "raw")):
            raise InputError(f"has no column {name!r}", where=str(self.path))
        column: Array = self._tensors[name].copy()
        return column

    def episode(self, index: int) -> tuple[int, int]:
        """The episode of sample `index` and the step within it."""
        self._check_index(index)
        return int(self._tensors["episode_index"][index]), int(self._tensors["step_index"][index])

    def subset(self, count: int, seed: int) -> tuple[int, ...]:
        """`count` sample indices spread evenly over instructions, episodes and time; the same for the same arguments.

        All of them when the set has no more. Raises InputError below 1.
        """
        if count < 1:
            raise InputError(f"{count} samples asked for, at least 1 is needed", where=str(self.path))
        return spread(
            self._tensors["task_index"], self._tensors["episode_index"], self._tensors["step_index"], count, seed
        )

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of one sample of every feature: what a policy would have to take for the set to fit."""
        return {name: (feature.dtype, feature.shape) for name, feature in self.card.observation.items()}

    def check_unchanged(self) -> None:
        """Hash the file again. Raises InputError when it is no longer what was opened."""
        if digest_bytes(read_file(self.path / DATA, limit=_DATA_LIMIT)) != self.card.files[0].sha256:
            raise InputError(
                "changed while it was in use", where=str(self.path / DATA), hint="start again on a set nobody writes to"
            )

    def check(self, expected: Expected, minimum_samples: int = MINIMUM_SAMPLES) -> None:
        """Refuse a set that a calibrator could not use for the policy that needs `expected`; see `checks.check`."""
        check(self, expected, minimum_samples)

    def _value(self, name: str, feature: Feature, index: int) -> Any:
        if name == TASK:
            return self.card.instructions[int(self._tensors["task_index"][index])]
        if feature.encoding == "raw":
            return self._tensors[name][index].copy()
        start, end = (int(offset) for offset in self._tensors[f"{name}.offsets"][index : index + 2])
        data = self._tensors[f"{name}.png"][start:end].tobytes()
        return decode_image(data, feature.shape, where=f"{self.path}: {name} at sample {index}")

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")


def _refuse_archives(path: Path) -> None:
    archive = path if path.is_file() else None
    if path.is_dir() and not (path / CARD).exists():
        archive = next((file for file in sorted(path.iterdir()) if file.suffix in ARCHIVE_SUFFIXES), None)
    if archive is not None and archive.suffix in ARCHIVE_SUFFIXES:
        raise InputError(
            f"{archive.suffix} files are not opened: they can run code or unpack without bound",
            where=str(archive),
            hint="convert it: `vlaopt calibration make FOLDER -o SET` reads a folder of .npz episodes; load others "
            "where you trust them and call vlaopt.calibration.write_calibration_set",
        )
    if not path.is_dir():
        raise InputError(
            "a file, a calibration set is a folder" if path.exists() else "no such calibration set",
            where=str(path),
            hint=f"give the folder that holds {CARD}",
        )
