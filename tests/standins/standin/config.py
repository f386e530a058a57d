"""How a network is built: configs, profiles, timing caches."""

from __future__ import annotations

import json
from typing import Any

from standin.logger import say
from standin.natives import host_memory
from standin.plan import tag


def defaults(surface: Any) -> dict[str, Any]:
    names = surface.names
    return {
        "_flags": 1 << int(names["BuilderFlag"].TF32),
        "_pools": {},
        "_level": 3,
        "_monitor": None,
        "_cache": None,
        "_profiles": [],
        "_aux_streams": 0,
        "_timings": 1,
        "_tactics": 24,
        "_calibrator": None,
        "_verbosity": names["ProfilingVerbosity"].LAYER_NAMES_ONLY,
        "_hardware": names["HardwareCompatibilityLevel"].NONE,
        "_capability": names["EngineCapability"].STANDARD,
        "_features": {},
    }


def _kept(key: str, kind: str) -> property:
    """A property of the config that takes only values of this kind: a class of the surface, or "int"."""

    def read(self: Any) -> Any:
        return self.__dict__[key]

    def write(self: Any, value: Any) -> None:
        none_allowed = kind in ("IProgressMonitor", "IInt8Calibrator")
        wanted = int if kind == "int" else self._surface.names[kind]
        if not (isinstance(value, wanted) or (value is None and none_allowed)) or isinstance(value, bool):
            raise TypeError(f"(): incompatible function arguments: {kind} is wanted, not {value!r}")
        self.__dict__[key] = value

    return property(read, write)


class IBuilderConfig:
    profiling_verbosity = _kept("_verbosity", "ProfilingVerbosity")
    hardware_compatibility_level = _kept("_hardware", "HardwareCompatibilityLevel")
    engine_capability = _kept("_capability", "EngineCapability")
    progress_monitor = _kept("_monitor", "IProgressMonitor")
    int8_calibrator = _kept("_calibrator", "IInt8Calibrator")
    max_aux_streams = _kept("_aux_streams", "int")
    avg_timing_iterations = _kept("_timings", "int")
    flags = _kept("_flags", "int")
    num_optimization_profiles = property(lambda self: len(self._profiles))

    def _set_level(self, value: int) -> None:
        if not isinstance(value, int):
            raise TypeError("(): incompatible function arguments: an int is wanted")
        if not 0 <= value <= 5:
            say(self._logger, "ERROR", "IBuilderConfig::setBuilderOptimizationLevel: Error Code 3: API Usage Error")
            return
        self.__dict__["_level"] = value

    builder_optimization_level = property(lambda self: self._level, _set_level)

    def _names(self) -> list[str]:
        members = self._surface.names["BuilderFlag"].__members__.items()
        return sorted(name for name, member in members if self._flags >> int(member) & 1)

    def set_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self.__dict__["_flags"] &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        default = self._surface.settings.memory_mib << 20 if pool.name in ("WORKSPACE", "TACTIC_DRAM") else 0
        return int(self._pools.get(pool.name, default))

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._features[feature.name] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        return bool(self._features.get(feature.name, False))

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self.__dict__["_tactics"] = int(tactic_sources)
        return True

    def get_tactic_sources(self) -> int:
        return int(self._tactics)

    def add_optimization_profile(self, profile: Any) -> int:
        if not profile._shapes:
            say(self._logger, "ERROR", "IBuilderConfig::addOptimizationProfile: Error Code 4: API Usage Error")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        data = bytes(serialized_timing_cache)
        made = self._surface.names["ITimingCache"].make(_keys=set(), _tag=_cache_tag(self._surface))
        if not data:
            return made
        try:
            found = json.loads(data.removeprefix(_CACHE_MAGIC)) if data.startswith(_CACHE_MAGIC) else None
        except ValueError:
            found = None
        if found is None or found["tag"]["tensorrt"] != self._surface.version:
            say(self._logger, "WARNING", "The timing cache will not be used!")
            say(self._logger, "WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.")
            return made
        made.__dict__.update(_keys=set(found["keys"]), _tag=found["tag"])
        return made

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._tag != _cache_tag(self._surface) and not ignore_mismatch:
            say(
                self._logger, "ERROR",
                "IBuilderConfig::setTimingCache: Error Code 4: API Usage Error (The timing cache is of another device)",
            )  # fmt: skip
            return False
        self.__dict__["_cache"] = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def reset(self) -> None:
        self.__dict__.update(defaults(self._surface))


_CACHE_MAGIC = b"timing-cache-standin\n"


def _cache_tag(surface: Any) -> dict[str, str]:
    return {key: value for key, value in tag(surface.version, surface.settings).items() if key != "os"}


class ITimingCache:
    def serialize(self) -> Any:
        text = json.dumps({"tag": self._tag, "keys": sorted(self._keys)})
        return host_memory(self._surface, _CACHE_MAGIC + text.encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if input_cache._tag != self._tag and not ignore_mismatch:
            return False
        self._keys.update(input_cache._keys)
        return True

    def reset(self) -> bool:
        self._keys.clear()
        return True


class IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        sizes = [list(map(int, shape)) for shape in (min, opt, max)]
        same = len({len(shape) for shape in sizes}) == 1
        if not same or not all(low <= mid <= high for low, mid, high in zip(*sizes, strict=True)):
            raise ValueError(f"Shape provided for {input} is inconsistent with other shapes.")
        self._shapes[input] = sizes

    def get_shape(self, input: str) -> list[Any]:
        return [self._surface.names["Dims"](shape) for shape in self._shapes.get(input, [])]

    def __bool__(self) -> bool:
        return True


WRITTEN = {kind.__name__: kind for kind in (IBuilderConfig, ITimingCache, IOptimizationProfile)}
