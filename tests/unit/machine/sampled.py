"""Sampled machines: their files, what commands print and what Python has; from the listings that SOURCE.md names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlaopt.doctor import State
from vlaopt.machine import Machine, Sources, read_machine

SAMPLES = Path(__file__).parent / "samples"
NAMES = tuple(sorted(path.name for path in SAMPLES.iterdir() if path.is_dir()))


@dataclass(frozen=True)
class Sample:
    """One machine; `sources` read it, `states` are what its backends answer."""

    sources: Sources
    states: dict[str, State]

    @property
    def machine(self) -> Machine:
        return read_machine(self.sources)


def sample(name: str, **changed: Any) -> Sample:
    """The sampled machine of that name; `changed` replaces entries of its facts.json."""
    folder = SAMPLES / name
    facts = {**json.loads((folder / "facts.json").read_text()), **changed}
    commands: dict[str, str] = json.loads((folder / "commands.json").read_text())
    answers = json.loads((folder / "backends.json").read_text())

    def run(command: Sequence[str]) -> str | None:
        return commands.get(" ".join(command))

    modules = {"onnxruntime": SimpleNamespace(get_available_providers=lambda: facts["providers"])}
    sources = Sources(
        root=folder / "root",
        run=run,
        installed=facts["installed"].get,
        load=modules.get,
        variables={},
        system="Linux",
        architecture=facts["architecture"],
        python=facts["python"],
    )
    return Sample(sources, {name: State(name=name, **answer) for name, answer in answers.items()})
