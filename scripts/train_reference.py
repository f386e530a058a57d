"""Train the reference policy edge-vla from nothing: record the experts, imitate, correct, imitate again, evaluate.

    python scripts/train_reference.py                      about 30 minutes on two CPU cores
    python scripts/train_reference.py --episodes 2 --steps 20 --corrections 1 --correction-steps 20 --evaluate 1 \\
        --output build/tiny --demonstrations build/tiny-demonstrations          a minute, to see that it runs

The demonstrations (about 500 MB) stay in build/demonstrations and are used again if they are there.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlaopt.calibration import CalibrationSet, write_calibration_set
from vlaopt.policies.edge_vla.checkpoint import load_checkpoint, save_checkpoint
from vlaopt.policies.edge_vla.config import Camera, Provenance, reference_config
from vlaopt.policies.edge_vla.model import EdgeVLA
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy, Statistics, build_tokenizer
from vlaopt.sim import CAMERA, CONTROL_HZ, TASKS, EvaluationRecord, Scene, Task, episode_seed, evaluate
from vlaopt.training.demonstrations import Sample, Shaking, record_episode
from vlaopt.training.imitation import Augmentation, Examples, batches, examples_of, fit, joined

MAX_LENGTH = 16
CORRECTION_SEED = 1


@dataclass(frozen=True)
class Job:
    """One task to record: by the shaken expert, or by the policy of `checkpoint` with the expert's labels."""

    task: Task
    path: Path
    episodes: int
    seed: int
    chunk_size: int
    checkpoint: Path | None


def main() -> None:
    arguments = _arguments()
    _keep_freed_memory()
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer([text for task in TASKS for text in task.training], MAX_LENGTH)
    config = reference_config(
        vocabulary=tokenizer.get_vocab_size(),
        camera=Camera.model_validate(CAMERA),
        tasks=tuple(task.name for task in TASKS),
        control_hz=CONTROL_HZ,
    )
    expert = record(arguments.demonstrations / "expert", arguments.episodes, arguments.seed, config.chunk_size)
    policy = EdgeVLAPolicy(EdgeVLA(config), statistics_of(expert), tokenizer)
    examples = train(policy, expert, steps=arguments.steps, lr=1.5e-3, seed=arguments.seed)
    episodes = sum(part.card.episodes for part in expert)

    if arguments.corrections:
        first = arguments.demonstrations / "first-checkpoint"
        save_checkpoint(policy, first)
        corrections = record(
            arguments.demonstrations / "corrections", arguments.corrections, CORRECTION_SEED, config.chunk_size, first
        )
        episodes += sum(part.card.episodes for part in corrections)
        parts = [*expert, *corrections]
        examples = train(policy, parts, steps=arguments.correction_steps, lr=1e-3, seed=arguments.seed + 1)

    result = evaluate(policy, episodes=arguments.evaluate, seed=arguments.seed)
    print(table(result))
    provenance = Provenance(
        command=shlex.join(["python", *sys.argv]),
        seed=arguments.seed,
        demonstrations=episodes,
        samples=len(examples),
        steps=arguments.steps + (arguments.correction_steps if arguments.corrections else 0),
        success=_success(result),
    )
    save_checkpoint(policy, arguments.output, provenance=provenance)


def record(
    folder: Path, episodes: int, seed: int, chunk_size: int, checkpoint: Path | None = None
) -> list[CalibrationSet]:
    """One set of demonstrations per task, recorded by two processes; sets already there are opened as they are."""
    jobs = [Job(task, folder / task.name, episodes, seed, chunk_size, checkpoint) for task in TASKS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for line in pool.imap_unordered(_record_task, [job for job in jobs if not job.path.exists()]):
            print(line, flush=True)
    return [CalibrationSet.open(job.path) for job in jobs]


def statistics_of(parts: list[CalibrationSet]) -> Statistics:
    """Normalisation over all samples of all sets."""
    states, actions = (
        np.concatenate([part.column(name) for part in parts]) for name in ("observation.state", "action")
    )
    return Statistics.of(states, actions)


def train(policy: EdgeVLAPolicy, parts: list[CalibrationSet], *, steps: int, lr: float, seed: int) -> Examples:
    """Fit the policy's network to the sets, in place; returns what it was fitted to."""
    examples = joined([examples_of(part, policy.statistics, policy.tokenize) for part in parts])
    print(f"{len(examples)} samples, {steps} steps", flush=True)
    policy.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = time.monotonic()
    fit(
        policy.module,
        batches(examples, size=64, seed=seed, augmentation=Augmentation()),
        steps=steps,
        lr=lr,
        report=lambda step, loss: print(f"step {step} loss {loss:.4f} {time.monotonic() - start:.0f} s", flush=True),
    )
    policy.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return examples


def table(result: EvaluationRecord) -> str:
    """The success rates as lines of text."""
    lines = [f"{part.task:24} {part.successes}/{part.episodes}" for part in result.tasks]
    low, high = result.interval
    return "\n".join([*lines, f"{'total':24} {result.successes}/{result.episodes}  95 % in {low:.3f}..{high:.3f}"])


def _record_task(job: Job) -> str:
    torch.set_num_threads(1)
    driver = load_checkpoint(job.checkpoint) if job.checkpoint else None
    samples: list[Sample] = []
    kept = attempt = 0
    with Scene(job.task) as scene:
        while kept < job.episodes:
            episode = record_episode(
                scene,
                seed=episode_seed("demonstration", job.seed, job.task.name, attempt),
                episode=attempt,
                instructions=job.task.training,
                chunk_size=job.chunk_size,
                max_steps=job.task.max_steps,
                every=2,
                shaking=Shaking(),
                driver=driver,
            )
            attempt += 1
            if episode:
                kept += 1
                samples += episode
    write_calibration_set(
        job.path,
        [sample.observation for sample in samples],
        [sample.action for sample in samples],
        episodes=[sample.episode for sample in samples],
        steps=[sample.step for sample in samples],
        name=job.task.name,
        description="demonstrations for training",
        source="recorded from Meta-World 3.1 (MIT licence) with its scripted experts",
        licence="Apache-2.0",
        created_by="scripts/train_reference.py",
        seed=job.seed,
    )
    return f"{job.task.name}: {kept} of {attempt} episodes kept, {len(samples)} samples"


def _success(result: EvaluationRecord) -> dict[str, str]:
    counts = {part.task: f"{part.successes}/{part.episodes}" for part in result.tasks}
    return {**counts, "total": f"{result.successes}/{result.episodes}"}


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: handing every large tensor's pages back and forth costs a third of a step."""
    if sys.platform == "linux":
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(m_mmap_threshold, 1 << 30)
            mallopt(m_trim_threshold, (1 << 31) - 1)
            mallopt(m_top_pad, 1 << 28)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("recipes/edge-vla/checkpoint"))
    parser.add_argument("--demonstrations", type=Path, default=Path("build/demonstrations"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=90, help="demonstrations per task")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--corrections", type=int, default=30, help="episodes per task that the first policy drives")
    parser.add_argument("--correction-steps", type=int, default=5000)
    parser.add_argument("--evaluate", type=int, default=25, help="held-out episodes per task")
    return parser.parse_args()


if __name__ == "__main__":
    main()
