"""The page as a browser lays it out: nothing hangs over on a phone or a desktop, and nothing goes wrong meanwhile."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.report.conftest import bare, facts
from vlaopt.report import figures
from vlaopt.report.facts import Facts
from vlaopt.report.page import render

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESKTOP = 360, 1280

MEASURE = """
<pre id="told"></pre>
<script>
page.onload = () => {
  const document_ = page.contentDocument, root = document_.documentElement;
  const scrolls = (element) => element.closest(".scroll, nav, pre, svg");
  const over = [...document_.body.querySelectorAll("*")]
    .filter((element) => !scrolls(element) && element.getBoundingClientRect().right > root.clientWidth + 1)
    .map((element) => element.outerHTML.slice(0, 80));
  const scale = (matrix) => Math.hypot(matrix.a, matrix.b);
  const sizes = [...document_.querySelectorAll("svg text")]
    .map((element) => parseFloat(getComputedStyle(element).fontSize) * scale(element.getScreenCTM()));
  told.textContent = JSON.stringify({ width: root.scrollWidth, over, smallest: Math.min(...sizes, 99) });
};
</script>
"""


def long_names() -> Facts:
    """Facts of a policy with many actions, whose names and reasons have no place to be broken at."""
    whole = facts(action_dim=14, version="1.0.0+" + "0" * 90, inputs={"prune.recovery.demonstrations" * 3: "f" * 64})
    components = tuple(replace(one, reason="unbreakable" * 20) for one in whole.components)
    return replace(whole, components=components, recipe_text="key: " + "value" * 100)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("found", [facts(), bare(), long_names()], ids=["everything", "little", "long names"])
def test_nothing_hangs_over_and_figures_can_be_read(found: Facts, width: int, tmp_path: Path) -> None:
    page = html.escape(render(found, figures.draw(found)))
    frame = f'<iframe id="page" style="border: 0; width: {width}px; height: 800px" srcdoc="{page}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}{MEASURE}", encoding="utf-8")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"),
    ]
    command = [str(BROWSER), *options, (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = re.search(r'<pre id="told">(.+?)</pre>', done.stdout)
    assert said, done.stderr
    told = json.loads(html.unescape(said[1]))
    assert told["over"] == []
    assert told["width"] <= width
    assert told["smallest"] >= 6.5
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
