"""What may be chosen when an artifact is opened, without building it again."""

from __future__ import annotations

from pydantic import ValidationError

from vlaopt.artifact.policy_spec import DiffusionLoop, EulerLoop, PolicySpec
from vlaopt.errors import InputError


def adjusted(spec: PolicySpec, *, steps: int | None = None, n_action_steps: int | None = None) -> PolicySpec:
    """`spec` with another number of loop steps and of actions executed per chunk; None keeps what it says.

    Raises InputError when its loop has no such number, or the policy cannot take the one given.
    """
    fields = spec.model_dump(by_alias=True)
    if steps is not None:
        if not isinstance(spec.loop, (EulerLoop, DiffusionLoop)):
            raise InputError(f"steps: a loop of kind {spec.loop.kind} has no number of steps")
        fields["loop"]["steps"] = steps
    if n_action_steps is not None:
        fields["chunk"]["n_action_steps"] = n_action_steps
    try:
        return PolicySpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = next((part for part in reversed(first["loc"]) if part in ("steps", "n_action_steps")), "")
        raise InputError(": ".join(filter(None, [str(key), first["msg"].removeprefix("Value error, ")]))) from error
