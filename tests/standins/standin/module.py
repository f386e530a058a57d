"""The names of the stand-in's `tensorrt` module, for one lane."""

from __future__ import annotations

from typing import Any

import numpy as np
from standin import building, config, definition, logger, natives, network, running
from standin.settings import Settings
from standin.surface import Surface


def surface(now: Settings) -> Surface:
    """Everything that `import tensorrt` gives in this lane."""
    made = Surface(now.lane, now)
    by_hand = {"Weights": network.Weights, **dict.fromkeys(network.LAYERS, definition.ILayer)}
    written = {
        **logger.WRITTEN,
        **definition.WRITTEN,
        **config.WRITTEN,
        **building.WRITTEN,
        **running.WRITTEN,
        **by_hand,
    }
    made.generate(written, {"Dims": natives.Dims, "IHostMemory": natives.HostMemory})
    names = made.names
    names["IHostMemory"]._kind = names["DataType"].INT8
    functions = {"volume": volume, "nptype": _nptype(names), "init_libnvinfer_plugins": lambda logger, namespace: True}
    for name in made.data["functions"]:
        names[name] = functions.get(name) or _unwritten(name, now.lane)
    names["__version__"] = made.version
    return made


def volume(iterable: Any) -> int:
    """The number of elements of a shape."""
    return int(np.prod(tuple(iterable), dtype=np.int64))


def _nptype(names: dict[str, Any]) -> Any:
    def nptype(trt_type: Any) -> Any:
        known = {kind: np.dtype(value) for kind, value in running.NUMPY.items()}
        if trt_type.name not in known:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return known[trt_type.name].type

    return nptype


def _unwritten(name: str, lane: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"stand-in: {name} of tensorrt {lane} is not written")

    return refuse
