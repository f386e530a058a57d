"""What a policy's components cost and which layers they use, found by calling each once on zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlaopt.artifact.policy_spec import AutoregressiveLoop, PolicySpec, SingleLoop, TensorSpec
from vlaopt.policies import EagerPolicy
from vlaopt.pruning.cost import measure_cost


@dataclass(frozen=True)
class Anatomy:
    """One component: its parameters, the multiply-adds of one call, and its calls per chunk.

    `layers` are the paths within the component of its matrix products and convolutions, as they are used.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    calls: int
    layers: tuple[str, ...]

    @property
    def macs_per_chunk(self) -> int:
        """Multiply-adds of all its calls for one chunk."""
        return self.macs * self.calls


def examine(eager: EagerPolicy) -> tuple[tuple[Anatomy, ...], int]:
    """The components in the order they run, and the parameters of the network that none of them uses.

    Raises StageError naming a component that cannot run on what its spec says.
    """
    modules, found, used = eager.components(), list[Anatomy](), set[int]()
    for name in eager.spec.order():
        layers: dict[str, None] = {}
        inputs = [_zeros(tensor) for tensor in eager.spec.components[name].inputs]
        with _noted(modules[name], layers), _Used() as seen:
            macs = measure_cost(modules[name], {"": inputs}).macs
        parameters = {p.data_ptr(): p.numel() for p in modules[name].parameters() if p.data_ptr() in seen.places}
        used |= parameters.keys()
        calls = _calls(eager.spec) if name == eager.spec.step() else 1
        kind = eager.spec.components[name].kind
        found.append(Anatomy(name, kind, sum(parameters.values()), macs, calls, tuple(layers)))
    unused = sum(p.numel() for p in eager.module.parameters() if p.data_ptr() not in used)
    return tuple(found), unused


@contextmanager
def _noted(component: nn.Module, layers: dict[str, None]) -> Iterator[None]:
    """Within, the paths of what multiplies are put into `layers` as it is called."""

    def note(path: str) -> Callable[..., None]:
        return lambda *_: layers.setdefault(path)

    called = [(path, child) for path, child in component.named_modules() if _multiplies(child)]
    handles = [child.register_forward_hook(note(path)) for path, child in called]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Used(TorchDispatchMode):
    """Remembers where the tensors lie that operators take."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.places |= {tensor.data_ptr() for tensor in _tensors(args)}
        return func(*args, **(kwargs or {}))


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _multiplies(module: nn.Module) -> bool:
    """Whether it is a matrix product or convolution with weights of its own, which 8-bit has a form for."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvTransposeNd):
        return False
    weights = (getattr(module, name, None) for name in ("weight", "in_proj_weight"))
    return any(isinstance(weight, nn.Parameter) and weight.dim() > 1 for weight in weights)


def _zeros(tensor: TensorSpec) -> torch.Tensor:
    shape = [size if isinstance(size, int) else 1 for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _calls(spec: PolicySpec) -> int:
    """How often the loop calls its step for one chunk."""
    loop = spec.loop
    if isinstance(loop, SingleLoop):
        return 1
    return loop.max_length if isinstance(loop, AutoregressiveLoop) else loop.steps
