"""Calibration sets: recorded observations, and the expert's actions where there are any, in one checked folder.

    card.json                    what it is and who made it; size and sha256 of the file beside it
    observations.safetensors     one row per sample; images as PNG bytes with offsets

The same format holds calibration sets, held-out sets and demonstrations. Nothing in it can run code.
"""

from vlaopt.calibration.card import ActionFeature, Card, Feature, FileEntry
from vlaopt.calibration.checks import MINIMUM_SAMPLES, Expected
from vlaopt.calibration.reading import CalibrationSet, Observation
from vlaopt.calibration.recorder import Recorder
from vlaopt.calibration.writing import write_calibration_set

__all__ = [
    "MINIMUM_SAMPLES",
    "ActionFeature",
    "CalibrationSet",
    "Card",
    "Expected",
    "Feature",
    "FileEntry",
    "Observation",
    "Recorder",
    "write_calibration_set",
]
