"""Record the shipped calibration sets: calibration/metaworld and calibration/metaworld-held-out.

    python scripts/make_calibration.py --checkpoint recipes/edge-vla/checkpoint

Half of the episodes are driven by the expert with a shaking hand, half by the policy itself; the expert labels all of
them. The held-out set has other episodes and other phrasings.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlaopt.calibration import write_calibration_set
from vlaopt.policies.edge_vla.checkpoint import load_checkpoint
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy
from vlaopt.sim import TASKS, Phrasings, Scene, Task, episode_seed
from vlaopt.training.demonstrations import Sample, Shaking, record_episode

SEED = 0
EPISODES_EACH = 5
"""Episodes per task and driver; the samples are spread over them."""


@dataclass(frozen=True)
class SetPlan:
    """One set to record."""

    folder: str
    split: Literal["calibration", "held-out"]
    phrasings: Phrasings
    samples_per_task: int
    description: str


PLANS = (
    SetPlan(
        "metaworld",
        "calibration",
        "training",
        48,
        "Eight Meta-World tasks seen by the edge-vla camera: for finding scales and for recovery training.",
    ),
    SetPlan(
        "metaworld-held-out",
        "held-out",
        "held-out",
        24,
        "Other episodes and other phrasings of the same tasks: for gates, never for scales or training.",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("recipes/edge-vla/checkpoint"))
    parser.add_argument("--output", type=Path, default=Path("calibration"))
    arguments = parser.parse_args()
    policy = load_checkpoint(arguments.checkpoint)
    for plan in PLANS:
        record_set(plan, policy, arguments.output / plan.folder)


def record_set(plan: SetPlan, policy: EdgeVLAPolicy, path: Path) -> None:
    """Record one set and put it at `path`, in the place of an older one; its README stays."""
    samples: list[Sample] = []
    for number, task in enumerate(TASKS):
        episodes = record_task(plan, policy, task, first_episode=number * 2 * EPISODES_EACH)
        samples += spread(episodes, plan.samples_per_task)
    readme = (path / "README.md").read_bytes() if (path / "README.md").exists() else None
    shutil.rmtree(path, ignore_errors=True)
    recorded = write_calibration_set(
        path,
        [sample.observation for sample in samples],
        [sample.action for sample in samples],
        episodes=[sample.episode for sample in samples],
        steps=[sample.step for sample in samples],
        name=plan.folder,
        description=plan.description,
        source="recorded from Meta-World 3.1 (MIT licence) with its scripted experts",
        licence="Apache-2.0",
        created_by="scripts/make_calibration.py",
        seed=SEED,
    )
    if readme is not None:
        (path / "README.md").write_bytes(readme)
    print(f"{path}: {len(recorded)} samples, {recorded.card.episodes} episodes, digest {recorded.digest}")


def record_task(plan: SetPlan, policy: EdgeVLAPolicy, task: Task, first_episode: int) -> list[list[Sample]]:
    """`2 * EPISODES_EACH` episodes of one task: the shaken expert's, then the policy's."""
    episodes: list[list[Sample]] = []
    with Scene(task) as scene:
        attempt = 0
        while len(episodes) < 2 * EPISODES_EACH:
            samples = record_episode(
                scene,
                seed=episode_seed(plan.split, SEED, task.name, attempt),
                episode=first_episode + len(episodes),
                instructions=task.phrasings(plan.phrasings),
                chunk_size=policy.module.config.chunk_size,
                max_steps=task.max_steps,
                every=2,
                shaking=Shaking(),
                driver=policy if len(episodes) >= EPISODES_EACH else None,
            )
            attempt += 1
            if samples:
                episodes.append(samples)
    return episodes


def spread(episodes: Sequence[Sequence[Sample]], count: int) -> list[Sample]:
    """`count` samples, as many from each episode as from the next (give or take one), evenly in time."""
    chosen: list[Sample] = []
    for number, episode in enumerate(episodes):
        share = count // len(episodes) + (number < count % len(episodes))
        places = np.linspace(0, len(episode) - 1, num=share).round().astype(int)
        chosen += [episode[place] for place in sorted(set(places.tolist()))]
    return chosen


if __name__ == "__main__":
    main()
