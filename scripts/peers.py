"""vlaopt beside its peers on this machine: every way to run a policy on a CPU, measured in turns.

make peers                                                  all, with LeRobot's policies in full size and random weights
python scripts/peers.py                                     the shipped policy alone: a few minutes
python scripts/peers.py --policies act --rows nncf,torch    some rows; vlaopt's is always there
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer import report
from peer.limit import LIMITS, SIZES
from peer.rows import ROWS, VLAOPT
from peer.subjects import POLICIES, ROOT, Subject, prepare
from peer.worker import Failed, Worker, build, run_once, serve

from vlaopt.hashing import digest_file, digest_json

MINUTES = {"edge-vla": 5, "act": 15, "smolvla": 35}
"""About, on two slow cores, the first time; what was built is kept."""
THREADS = {"edge-vla": 1}
"""The shipped recipe's. Others get every core."""
TURN_S, MOST_CALLS = 0.25, 40
"""A row's calls in one turn: about so long, and never more."""
MEMORY = 10e9
"""Bytes of all rows that are open at once. More rows than that take their turns in groups, vlaopt in each of them."""
LIBRARY, PACKED = 0.35e9, 2.5
"""Bytes that a library takes by itself, and how many times the weights lie in memory once they are packed."""


@dataclass
class Measured:
    """One row of one subject. `rounds_ms`: the median of every round; `ratios`: to vlaopt's median of that round."""

    row: str
    label: str
    failed: str | None = None
    build_s: float | None = None
    bytes: int = 0
    call_s: float = 0.0
    error: dict[str, Any] | None = None
    peak_mib: float | None = None
    rounds_ms: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    by_size: list[list[float]] = field(default_factory=list)
    """Of a row of products: its latencies by size of the matrices."""


def main() -> int:
    arguments = _arguments()
    work: Path = arguments.work.resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "scripts"), str(ROOT / "tests/torchvision_operators"), os.environ.get("PYTHONPATH", "")]
    )
    # Without torch.compile's caches: its build time would be that of the first run alone.
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    expected = sum(MINUTES[policy] for policy in arguments.policies)
    _tell(f"about {expected} minutes on two slow cores with nothing else to do; what is built is kept in {work}")
    os.environ["VLAOPT_STORE"] = str(work / "store")
    machine = report.machine()
    found, unbuilt = [], []
    for policy in arguments.policies:
        threads = arguments.threads or THREADS.get(policy, os.cpu_count() or 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        folder = work / (policy if arguments.size == "full" else f"{policy}-{arguments.size}")
        log = folder / "prepare.log"
        _tell(f"{policy}: vlaopt builds it")
        try:
            paths = run_once(_prepared, policy, folder, arguments.size, arguments.set, log=log, limit_s=3600)
        except Failed as error:
            _tell(f"{policy} is left out: {error}; see {log}")
            unbuilt.append(policy)
            continue
        for path in paths:
            found.append(measure(Subject.load(path), path, arguments.rows, threads, arguments.rounds))
            sys.stdout.write(report.table(found[-1]) + "\n")
            sys.stdout.flush()
    result = {"machine": machine, "rounds": arguments.rounds, "subjects": found}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    if arguments.readme and found:
        report.write_readme(result)
    return 1 if unbuilt else 0


def _prepared(policy: str, folder: Path, size: str, overrides: Sequence[str]) -> list[Path]:
    return prepare(policy, folder, size, overrides, _tell)


def measure(subject: Subject, path: Path, rows: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Every row of one subject, built one after the other, then measured in turns."""
    folder = path.with_suffix("")
    measured = {VLAOPT: Measured(VLAOPT, "vlaopt", build_s=subject.built_s)}
    for row in rows:
        measured[row] = Measured(row, ROWS[row].label)
        if ROWS[row].build is not None:
            _tell(f"{subject.title}: building {ROWS[row].label}")
            try:
                log = folder / f"{row}.log"
                measured[row].build_s = run_once(build, row, path, folder / _kept(row, subject), log=log)
            except Failed as error:
                measured[row].failed = str(error)
    products = {row: Measured(row, label) for row, (label, _) in LIMITS.items()}
    here = [one for one in measured.values() if one.failed is None and one.row != VLAOPT]
    anchor = measured[VLAOPT]
    for group in _groups([*here, *products.values()], subject.bytes):
        _tell(f"{subject.title}: {len(group)} rows and vlaopt in turns, {rounds} rounds")
        _in_turns([anchor, *group], subject, path, folder, threads, rounds)
    best, rate = _limit(list(products.values()))
    limit = {"library": best, "gmacs_per_s": rate, "ms": subject.macs / rate / 1e6 if rate else None}
    limit["artifact_ms"] = subject.artifact_macs / rate / 1e6 if rate else None
    return {
        "title": subject.title,
        "policy": subject.policy,
        "component": subject.component,
        "trained": subject.trained,
        "threads": threads,
        "gmacs": subject.macs / 1e9,
        "artifact_gmacs": subject.artifact_macs / 1e9,
        "limit": limit,
        "rows": [vars(one) for one in measured.values()],
        "products": [vars(one) for one in products.values()],
    }


def _kept(row: str, subject: Subject) -> str:
    """A folder for what a row builds: another for another export, another version of a library or another recipe."""
    code = digest_file(ROOT / "scripts/peer/rows.py")[1]
    return f"{row}-{digest_json([Path(subject.export).name, code, report.versions()])[:12]}"


def _groups(rows: list[Measured], size: int) -> Iterator[list[Measured]]:
    """Rows that are open together, vlaopt's beside them: as many as fit into `MEMORY`."""
    needed = {one.row: LIBRARY + (0.0 if one.row in LIMITS else PACKED * size) for one in rows}
    own = LIBRARY + PACKED * size
    group: list[Measured] = []
    for one in rows:
        if group and own + needed[one.row] + sum(needed[other.row] for other in group) > MEMORY:
            yield group
            group = []
        group.append(one)
    yield group


def _in_turns(rows: list[Measured], subject: Subject, path: Path, folder: Path, threads: int, rounds: int) -> None:
    workers: dict[str, Worker] = {}
    try:
        for one in rows:  # one at a time: opening takes all cores too
            log = folder / f"{one.row}.log"
            worker = Worker(serve, one.row, path, folder / _kept(one.row, subject), threads, log=log)
            workers[one.row] = worker
            with _told(one, workers):
                said = worker.ask(None)
                one.bytes, one.call_s = said["bytes"], said["call_s"]
                if one.row != VLAOPT:
                    one.build_s = (one.build_s or 0.0) + said["open_s"]
                if one.row not in LIMITS and one.error is None:
                    one.error = worker.ask(("error",))
        order, random_ = [one for one in rows if one.row in workers], random.Random(0)
        for round_ in range(rounds):
            random_.shuffle(order)
            medians = {one.row: _turn(one, workers, round_) for one in order if one.row in workers}
            for one in order:
                own, other = medians.get(one.row), medians.get(VLAOPT)
                if own is not None:
                    one.rounds_ms.append(own)
                    if other is not None:
                        one.ratios.append(own / other)
        for one in order:
            if one.row in workers:
                with _told(one, workers):
                    one.peak_mib = workers[one.row].ask(("memory",))
    finally:
        for worker in workers.values():
            worker.close()


def _turn(one: Measured, workers: dict[str, Worker], round_: int) -> float | None:
    """The median latency in ms of a row's calls in one round."""
    count = max(2, min(MOST_CALLS, int(TURN_S / max(one.call_s, 1e-6))))
    with _told(one, workers):
        times = workers[one.row].ask(("time", round_ * count, count))
        if one.row in LIMITS:
            one.by_size.extend([] for _ in range(len(SIZES) - len(one.by_size)))
            for place, took in enumerate(times, round_ * count):
                one.by_size[place % len(SIZES)].append(took)
        return report.median(times)
    return None


class _told:
    """Within, a row that fails gets its reason and loses its process."""

    def __init__(self, one: Measured, workers: dict[str, Worker]) -> None:
        self._one, self._workers = one, workers

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Failed):
            return False
        self._one.failed = str(error)
        self._workers.pop(self._one.row).close()
        return True


def _limit(products: list[Measured]) -> tuple[str | None, float | None]:
    """The library and size of the fastest 8-bit products, and their rate in 10⁹ multiply-adds per second."""
    rates = [
        (size**3 / report.median(times) / 1e6, f"{one.label}, {size}×{size}")
        for one in products
        if one.failed is None
        for size, times in zip(SIZES, one.by_size, strict=False)
        if times
    ]
    rate, label = max(rates, default=(None, None))
    return label, rate


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure vlaopt beside its peers on this machine.")
    parser.add_argument("--policies", type=lambda text: _listed(text, POLICIES), default=["edge-vla"])
    parser.add_argument("--rows", type=lambda text: _listed(text, ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=10, help="turns of every row")
    parser.add_argument("--threads", type=int, default=0, help="of every row; 0: the recipe's, or every core")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of vlaopt's recipe; may repeat"
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of LeRobot's policies; tiny: a try")
    parser.add_argument("--work", type=Path, default=ROOT / "build/peers", help="where what is built is kept")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md and the plot beside it")
    return parser.parse_args()


def _listed(text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


def _tell(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
