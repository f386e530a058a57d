"""A proposal as a recipe: YAML with comments for the person who will change it."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator

from vlaopt import __version__
from vlaopt.artifact.policy_spec import DiffusionLoop, SingleLoop
from vlaopt.proposal import GUESSED_HZ, Contents, Proposal
from vlaopt.proposal.anatomy import Anatomy
from vlaopt.scopes import covers

WIDTH = 80
_PLAIN = re.compile(r"(?:\.{0,2}/|[A-Za-z])[\w./+-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def as_yaml(proposal: Proposal) -> str:
    """The recipe. What is missing stands in its first lines, and commented out where it belongs."""
    sections = (_head, _policy, _calibration, _export, _quantize, _engine, _verify, _accept, _bench)
    return "\n\n".join("\n".join(section(proposal)) for section in sections) + "\n"


def missing(proposal: Proposal) -> list[tuple[str, str]]:
    """What the recipe still needs before it can be built, and how to come by it."""
    found = []
    if field := proposal.on_hub:
        how = (
            f"Nothing is fetched, so copy it to a folder. Run this command again with --hub-override {field}=FOLDER "
            "to see the components and the schemes that suit them."
        )
        found.append((f"a local copy of what {field} names on a hub", how))
    if not proposal.wish.calibration:
        how = (
            "Golden actions and scales come from recorded observations. Make a set from a LeRobotDataset or a folder "
            "of episodes: `vlaopt calibration make DATASET -o SET --policy THIS_FILE`. Then run this command again "
            f"with --calibration SET; or take the `#` off the lines below and set `scheme: {proposal.scheme}`."
        )
        found.append(("a calibration set", how))
    return found


def _head(proposal: Proposal) -> Iterator[str]:
    target = proposal.target
    about = f"{proposal.type} for {target.name}, proposed by vlaopt {__version__}. Paths are relative to this file."
    yield from _comment(about)
    if proposal.contents:
        yield "#"
        yield from (f"#   {line}" for line in _table(proposal, proposal.contents))
        if proposal.contents.unused:
            yield "#"
            yield from _comment(f"No component uses {_count(proposal.contents.unused)} of the parameters.")
    for what, how in missing(proposal):
        yield "#"
        yield from _comment(f"MISSING: {what}. {how}")
    yield "schema: vlaopt.recipe/1"
    yield f"name: {_scalar(proposal.name)}"
    yield "version: 1.0.0"
    yield f"description: {proposal.type} on {target.name}"
    yield f"target: {_scalar(proposal.wish.target)}"


def _policy(proposal: Proposal) -> Iterator[str]:
    yield "policy:"
    yield f"  type: {_scalar(proposal.type)}"
    yield f"  checkpoint: {_scalar(proposal.wish.checkpoint)}"
    if proposal.wish.hub_overrides:
        yield "  # Local folders in place of a hub: nothing is ever fetched."
        pairs = (f"{_scalar(field)}: {_scalar(path)}" for field, path in proposal.wish.hub_overrides.items())
        yield f"  hub_overrides: {{{', '.join(pairs)}}}"
    loop = proposal.contents.spec.loop if proposal.contents else None
    if proposal.type == "diffusion" and isinstance(loop, DiffusionLoop) and loop.kind == "ddpm":
        yield f"  # Ten deterministic steps in place of {loop.steps}, if the robot is content with them:"
        yield "  # config_overrides: {noise_scheduler_type: DDIM, num_inference_steps: 10}"
    if proposal.on_hub:
        yield f"  # hub_overrides: {{{proposal.on_hub}: FOLDER}}  # MISSING"


def _calibration(proposal: Proposal) -> Iterator[str]:
    samples = proposal.contents.sizes.calibration if proposal.contents else 128
    yield from _comment("Recorded observations: golden actions and scales come from them.")
    path = proposal.wish.calibration
    if path:
        yield from ("calibration:", f"  path: {_scalar(path)}", f"  samples: {samples}")
    else:
        yield from ("# calibration:  # MISSING", f"#   path: calibration/{proposal.name}", f"#   samples: {samples}")


def _export(proposal: Proposal) -> Iterator[str]:
    golden = proposal.contents.sizes.golden if proposal.contents else 16
    yield from _comment("Observations kept in the artifact with the eager policy's actions.")
    yield f"export: {{golden_samples: {golden}}}"


def _quantize(proposal: Proposal) -> Iterator[str]:
    scheme = proposal.scheme
    if scheme == "none":
        yield from _comment(f"{proposal.target.name} has neither int8 nor fp16.")
        yield "quantize: {scheme: none}"
        return
    if scheme == "fp16":
        about = (
            "FP16, and 8 bits where a rule says so. Norms, softmax and sums stay FP32, and so does what comes near "
            "FP16's largest number on the calibration set."
        )
    else:
        form = "symmetric, as TensorRT wants it" if proposal.target.kind != "cpu" else "where it pays on a CPU"
        about = f"Static int8, {form}: the large matrix products and convolutions. Norms and softmax stay FP32 anyway."
    if proposal.contents and not isinstance(proposal.contents.spec.loop, SingleLoop):
        scope = f'{{scope: "{proposal.contents.spec.step()}.*", scheme: fp32}}'
        about += f" If a limit is missed, first add {scope}: errors add up over the loop."
    yield from _comment(about)
    yield "quantize:"
    yield f"  scheme: {scheme}" if _quantized(proposal) else f"  scheme: none  # {scheme} once nothing is missing"
    yield "  calibrator: entropy"
    if proposal.contents and proposal.contents.rules:
        yield "  rules:"
        before = ""
        for rule in proposal.contents.rules:
            if rule.why != before:
                yield f"    # {rule.why[0].upper()}{rule.why[1:]}."
            yield f"    - {{scope: {json.dumps(rule.scope)}, scheme: {rule.scheme}}}"
            before = rule.why


def _engine(proposal: Proposal) -> Iterator[str]:
    target = proposal.target
    if target.kind == "cpu":
        about = "As many threads as pay. A component ships in int8 only where that beats its FP32 form by this factor."
    elif target.engine_built_on == "any":
        about = "Built here, without a GPU; running it needs one."
    else:
        place = "on the Jetson" if target.kind == "jetson" else "on a machine of the target"
        about = f"Finished {place} by `vlaopt engine ARTIFACT`; elsewhere the build ends with the portable graphs."
    yield from _comment(about)
    cpu = "engine: {backend: auto, threads: auto, minimum_speedup: 1.02}"
    yield cpu if target.kind == "cpu" else "engine: {backend: auto}"


def _verify(proposal: Proposal) -> Iterator[str]:
    samples = proposal.contents.sizes.held_out if proposal.contents else 64
    if proposal.wish.held_out:
        yield from _comment("Judged on observations that calibration never saw.")
        yield f"verify: {{observations: {_scalar(proposal.wish.held_out)}, samples: {samples}}}"
    else:
        yield from _comment("Judged on the golden observations; other episodes (--held-out SET) judge better.")
        yield f"# verify: {{observations: calibration/{proposal.name}-held-out, samples: {samples}}}"


def _accept(proposal: Proposal) -> Iterator[str]:
    yield from _comment(
        "Beyond one of these the build fails. Action errors are in standard deviations of each degree of freedom."
    )
    yield "accept:"
    yield "  parity: 1e-4"
    yield "  action_error: {mean: 0.05}"
    if proposal.contents and proposal.contents.spec.gripper is not None:
        yield "  gripper_flips: 0.01"
    yield "  jerk: 0.05"


def _bench(proposal: Proposal) -> Iterator[str]:
    spec = proposal.contents.spec if proposal.contents else None
    hz = (spec.control_hz if spec else None) or GUESSED_HZ
    known = (
        "The robot's control rate, as the checkpoint says."
        if spec and spec.control_hz
        else ("A guess: the checkpoint does not say its control rate. Write your robot's.")
    )
    if spec and spec.chunk.n_action_steps > 1:
        steps = spec.chunk.n_action_steps
        known += f" {steps} actions of each chunk are executed, so that a new one is due every {steps / hz:.2g} s."
    yield from _comment(known)
    yield f"bench: {{hz: {hz:g}, duration_s: 10}}"


def _table(proposal: Proposal, contents: Contents) -> Iterator[str]:
    rows = [("component", "kind", "parameters", "FP32", "MACs", "calls", "layers")]
    for part in contents.components:
        size = f"{part.parameters * 4 / 1e6:.1f} MB"
        scheme = _schemes(proposal, contents, part)
        rows.append((part.name, part.kind, _count(part.parameters), size, _count(part.macs), str(part.calls), scheme))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.rjust(width) if 2 <= column <= 5 else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _schemes(proposal: Proposal, contents: Contents, component: Anatomy) -> str:
    """How many layers each scheme is proposed for."""
    counts = Counter(_scheme(proposal, contents, f"{component.name}.{layer}") for layer in component.layers)
    return ", ".join(f"{counts[scheme]} {scheme}" for scheme in sorted(counts, reverse=True)) or "fp32"


def _scheme(proposal: Proposal, contents: Contents, path: str) -> str:
    if proposal.scheme == "none":
        return "fp32"
    said = [rule.scheme for rule in contents.rules if covers(rule.scope, path)]
    return said[-1] if said else proposal.scheme


def _quantized(proposal: Proposal) -> bool:
    return proposal.scheme != "none" and proposal.contents is not None and proposal.wish.calibration is not None


def _count(number: int) -> str:
    """Three digits and a unit: 98.2 M."""
    scale, unit = next((pair for pair in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= pair[0]), (1, ""))
    return f"{float(f'{number / scale:.3g}'):g}{unit}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _scalar(text: str) -> str:
    """The text as YAML: plain where every reader takes that for text, in flow mappings too, else in quotes."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)
