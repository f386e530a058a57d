"""Which form of each component ships: measured inside the whole policy, where the backend's time can be believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from vlaopt.artifact.artifact import Artifact
from vlaopt.backends import EngineOptions, Session
from vlaopt.benchmark import environment
from vlaopt.benchmark.threads import choose_threads
from vlaopt.runtime.golden import Golden, Sample, of_sample
from vlaopt.runtime.policy import assemble
from vlaopt.runtime.timing import component_times
from vlaopt.stages.engine.forms import Form, Workshop

Variant = Literal["plain", "quantized"]
Forms = Mapping[str, Mapping[Variant, Form]]
"""Every form of every component."""


@dataclass(frozen=True)
class Built:
    """One component in the form that ships."""

    variant: Variant
    reason: str
    form: Form


def whole(forms: Forms, variant: Variant) -> dict[str, Form]:
    """The policy with every component in this form, where it has it."""
    return {name: found.get(variant, found["plain"]) for name, found in forms.items()}


def with_threads(
    workshop: Workshop, forms: Forms, golden: Golden, *, rounds: int, iterations: int
) -> tuple[EngineOptions, Mapping[int, float]]:
    """The options with the number of threads that pays for the policy in low precision, and what was measured."""
    wanted = whole(forms, "quantized")

    def opened(threads: int) -> Callable[[Sample], object]:
        found = {name: workshop.opened(form, threads=threads).session for name, form in wanted.items()}
        sessions = {name: session for name, session in found.items() if session}
        return of_sample(assemble(workshop.source, sessions, backend=workshop.library.name).predict_chunk)

    choice = choose_threads(
        opened,
        golden.samples,
        cores=environment.usable_cores(),
        rounds=rounds,
        iterations_per_round=iterations,
    )
    return replace(workshop.options, threads=choice.threads), choice.speedups


def times_of(
    source: Artifact, forms: Forms, backend: str, golden: Golden, *, rounds: int, iterations: int
) -> dict[str, dict[Variant, float]]:
    """Milliseconds that every component takes of a chunk in both forms, inside the whole policy."""
    variants: tuple[Variant, ...] = ("plain", "quantized")
    sessions: dict[str, dict[str, Session]] = {
        variant: {name: form.session for name, form in whole(forms, variant).items() if form.session}
        for variant in variants
    }
    assembled = partial(assemble, source, backend=backend)
    times = component_times(sessions, assembled, golden.samples, rounds=rounds, iterations=iterations)
    return {name: {variant: times[variant][name] for variant in variants} for name in forms}


def decide(forms: Mapping[Variant, Form], times: Mapping[Variant, float], needed: float) -> Built:
    """The quantized form when it is as fast as needed, else the plain one, with the measurement as the reason.

    Without times the quantized form ships, and the reason says that nobody measured it.
    """
    plain = forms["plain"]
    if "quantized" not in forms:
        return Built("plain", "nothing in it is quantized", plain)
    quantized = forms["quantized"]
    size = f"{quantized.size / plain.size:.0%} of its size"
    if not times:
        return Built(
            "quantized", f"{size}; not measured: this backend's sessions give no times of the engine", quantized
        )
    speedup = times["plain"] / times["quantized"]
    facts = f"{speedup:.2f}× as fast as plain ({times['quantized']:.3f} ms), {size}"
    if speedup >= needed:
        return Built("quantized", facts, quantized)
    return Built("plain", f"quantized it would be {facts}; {needed:g}× as fast was needed", plain)
