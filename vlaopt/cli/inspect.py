"""vlaopt inspect ARTIFACT"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson


def inspect(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact directory.")],
    as_json: AsJson = False,
) -> None:
    """Show what an artifact holds and where it came from.

    Every byte is checked before.
    """
    from vlaopt.artifact.artifact import Artifact

    opened = Artifact.open(artifact)
    opened.check()
    manifest = opened.manifest
    if as_json:
        terminal.give_json({"id": opened.id, "manifest": manifest.model_dump(mode="json", by_alias=True)})
        return
    spec = opened.spec()
    terminal.give(f"{manifest.name} {opened.version} for {manifest.target}, after {manifest.stage}")
    terminal.give(f"id {opened.id}")
    components = terminal.table("component", "kind", "inputs", "outputs")
    for name in spec.order():
        component = spec.components[name]
        inputs, outputs = (
            ", ".join(f"{tensor.name} {tensor.dtype}{list(tensor.shape)}" for tensor in tensors)
            for tensors in (component.inputs, component.outputs)
        )
        components.add_row(name, component.kind, inputs, outputs)
    terminal.give_table(components)
    rate = "control rate not known" if spec.control_hz is None else f"{spec.control_hz:g} Hz"
    terminal.give(
        f"loop {spec.loop.kind}, noise {spec.noise.law}, chunk of {spec.chunk.size}, "
        f"{spec.chunk.n_action_steps} executed, {rate}"
    )
    if manifest.engine:
        engine = manifest.engine
        terminal.give(f"engine: {engine.backend} {engine.backend_version} for {engine.machine}")
        audits = manifest.metrics.get("engine", {}).get("audit", {})
        ran = manifest.metrics.get("bench", {}).get("told", {})
        for name, built in engine.components.items():
            layers = (
                ", ".join(f"{count} {kind}" for kind, count in built.precisions.items())
                or "precision known on the target only"
            )
            terminal.give(f"  {name}: {built.variant} ({layers}); {built.reason}")
            if audit := audits.get(name):
                terminal.give(f"    {_audited(audit)}")
            for said in ran.get(name, ()):
                terminal.give(f"    ran {said}")
    if manifest.finish:
        terminal.give(f"engine: to be finished on the target: {manifest.finish.command}")
    terminal.give("lineage: " + " → ".join(f"{step.stage} {step.key[:8]}" for step in manifest.lineage))
    terminal.give("tools: " + ", ".join(f"{tool} {version}" for tool, version in sorted(manifest.tools.items())))
    files = terminal.table("file", "role", "size", "sha256", right=("size",))
    for entry in manifest.files:
        files.add_row(entry.path, entry.role, terminal.size(entry.size), entry.sha256[:12])
    terminal.give_table(files)


def _audited(audit: Mapping[str, Any]) -> str:
    """One line on how far a component runs as planned."""
    others = ", ".join(f"{node} in {kind}" for node, kind in audit["others"].items())
    kept = f"{audit['kept']} of {audit['planned']} layers planned in low precision run in it"
    return f"{kept}; not {others}" if others else kept


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(epilog="Example: vlaopt inspect artifacts/edge-vla/…/cpu-x86")(inspect)
