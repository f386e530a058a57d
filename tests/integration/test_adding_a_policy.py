"""The guide to adding a policy, followed to the letter: its files written, its commands run, its mistake found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vlaopt
from tests.integration.conftest import ROOT
from vlaopt.artifact.artifact import Artifact

GUIDE = (ROOT / "vlaopt/policies/README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL))
BUILD, MISTAKE = (block.splitlines() for block in re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL))


class Reader:
    """Somebody who follows the guide in a folder of their own, into an environment of their own, without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        site = folder / "site"
        binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        pip = {"TARGET": str(site), "NO_DEPS": "1", "NO_INDEX": "1", "NO_BUILD_ISOLATION": "0", "QUIET": "1"}
        self.environment = {
            **os.environ,
            **{f"PIP_{name}": value for name, value in pip.items()},
            "PATH": binaries,
            "PYTHONPATH": str(site),
            "VLAOPT_STORE": str(folder / "store"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        command = line.replace("pip ", f"{sys.executable} -m pip ", 1) if line.startswith("pip ") else line
        return subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    pytest.importorskip("hatchling", reason="without hatchling the example's package needs a network to be installed")
    found = Reader(tmp_path_factory.mktemp("guide"))
    for name, content in FILES.items():
        (found.folder / name).parent.mkdir(exist_ok=True)
        (found.folder / name).write_text(content, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def artifact(reader: Reader) -> Path:
    """What the guide's build ends with."""
    for line in BUILD:
        done = reader.run(line)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return reader.folder / done.stdout.splitlines()[-1]


def test_the_example_is_short() -> None:
    assert list(FILES) == ["reach/model.py", "reach/adapter.py", "pyproject.toml", "make_data.py", "recipe.yaml"]
    lines = [line for line in FILES["reach/adapter.py"].splitlines() if line.strip()]
    assert len(lines) <= 80
    assert max(map(len, "\n".join(FILES.values()).splitlines())) <= 120


def test_the_build_ends_with_an_artifact_that_runs_without_the_package(artifact: Path) -> None:
    policy = vlaopt.open(artifact)
    random = np.random.default_rng(5)
    observation = {
        "observation.images.front": random.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "observation.state": random.standard_normal(4).astype(np.float32),
    }
    noise = random.standard_normal((1, 8, 3)).astype(np.float32)
    assert policy.predict(observation).shape == (3,)
    chunk = policy.predict_chunk(observation, noise)
    twice = vlaopt.open(artifact, steps=10).predict_chunk(observation, noise)
    assert chunk.shape == (8, 3)
    assert 1e-4 < np.abs(chunk - twice).max() < 1


def test_its_actions_are_those_of_the_policy_as_it_was_trained(reader: Reader, artifact: Path) -> None:
    script = f"""
import numpy as np, torch, vlaopt
from safetensors.torch import load_file
from reach.model import Reach
network = Reach(64, 8, 3).eval()
network.load_state_dict(load_file("checkpoint/model.safetensors"))
random = np.random.default_rng(1)
frame = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
state = random.standard_normal(4).astype(np.float32)
noise = random.standard_normal((1, 8, 3)).astype(np.float32)
image = torch.from_numpy(frame).permute(2, 0, 1)[None] / 255
with torch.no_grad():
    actions = network.sample(image, torch.from_numpy((state - 0.5) / 0.5)[None], torch.from_numpy(noise))[0] * 0.5 + 0.5
observation = {{"observation.images.front": frame, "observation.state": state}}
mine = vlaopt.open({str(artifact)!r}).predict_chunk(observation, noise)
print(np.abs(mine - actions.numpy()).max())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=reader.folder,
        env=reader.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-5


def test_export_reports_what_the_guide_lists(artifact: Path) -> None:
    parity = Artifact.open(artifact).manifest.metrics["export"]["parity"]
    assert {"encoder", "velocity", "policy"} <= set(parity)
    assert {"input image of encoder", "input state of encoder", "input time of velocity"} <= set(parity)


def test_init_proposes_a_recipe_for_the_new_policy(reader: Reader, artifact: Path) -> None:
    [line] = re.findall(r"`(vlaopt recipe init [^`]+)`", GUIDE.partition("## The build")[2])
    done = reader.run(f"{line} --calibration calibration > proposed.yaml")
    assert done.returncode == 0, done.stderr
    done = reader.run("vlaopt build proposed.yaml --dry-run")
    assert done.returncode == 0, done.stderr


def test_the_mistake_is_found_and_named(reader: Reader, artifact: Path) -> None:
    before = (reader.folder / "reach/adapter.py").read_text()
    *changes, build = MISTAKE
    for line in changes:
        done = reader.run(line)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (reader.folder / "reach/adapter.py").read_text() != before
    done = reader.run(build)
    assert done.returncode == 5, done.stderr
    assert "velocity" in next(line for line in done.stderr.splitlines() if line.startswith("error: "))
