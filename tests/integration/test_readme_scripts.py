"""README's scripts that run an artifact without vlaopt do so, with nothing but the libraries they name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, SmallBuild

BLOCKED = """
import sys
ALLOWED = {allowed!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"vlaopt", "torch", "onnx", "onnxruntime", "openvino", "tokenizers"}} - ALLOWED:
            raise ImportError(name + " is not for this script")
sys.meta_path.insert(0, Block())
sys.argv = ["script", {artifact!r}]
"""


def scripts() -> dict[str, str]:
    """README's Python blocks that import a runtime, by its name."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = {}
    for block in blocks:
        for library in ("onnxruntime", "openvino"):
            if re.search(rf"^import .*\b{library}\b", block, re.MULTILINE):
                found[library] = block
    return found


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_the_script_reproduces_the_golden_actions(small_build: SmallBuild, library: str) -> None:
    pytest.importorskip(library)
    script = scripts()[library]
    lines = [line for line in script.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15
    imported = set(re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE)) | set(
        re.findall(r"^import \w+ as \w+, (\w+)", script, re.MULTILINE)
    )
    assert imported <= {"json", "sys", "numpy", "pathlib", "safetensors", library}
    prologue = BLOCKED.format(allowed={library}, artifact=str(small_build.result.artifact.path))
    done = subprocess.run([sys.executable, "-c", prologue + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error = float(re.search(r"([0-9.e-]+)\s*$", done.stdout)[1])  # type: ignore[index]
    assert error < 0.5


def test_the_artifact_holds_all_that_the_scripts_read(small_build: SmallBuild) -> None:
    listed = {entry.path for entry in small_build.result.artifact.manifest.files}
    for script in scripts().values():
        for name in re.findall(r"[\"'/](golden/\w+\.safetensors|policy/\w+\.\w+)", script):
            assert name in listed, name


def test_readme_has_both_scripts() -> None:
    assert scripts().keys() == {"onnxruntime", "openvino"}
    assert Path(ROOT / "README.md").is_file()
