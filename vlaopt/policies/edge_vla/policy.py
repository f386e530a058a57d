"""edge-vla in eager PyTorch: the reference that every optimised form is compared with.

Its processing is written here in torch, apart from the numpy runtime's, so that one can catch the other's mistakes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vlaopt.errors import InputError
from vlaopt.policies.edge_vla.model import EdgeVLA

IMAGE = "observation.images.front"
STATE = "observation.state"
TASK = "task"
PAD_TOKEN = "[pad]"
UNKNOWN_TOKEN = "[unk]"


@dataclass(frozen=True)
class Statistics:
    """Normalisation: `(x - mean) / std` per dimension, float32 [state] and [action], in the robot's units."""

    state_mean: NDArray[np.float32]
    state_std: NDArray[np.float32]
    action_mean: NDArray[np.float32]
    action_std: NDArray[np.float32]

    @classmethod
    def of(cls, state: NDArray[np.float32], actions: NDArray[np.float32]) -> Statistics:
        """Over samples: state [N, state], actions [N, chunk, action]. A deviation below 1e-2 counts as 1e-2."""
        rows = actions.reshape(-1, actions.shape[-1])
        return cls(
            state_mean=state.mean(axis=0, dtype=np.float64).astype(np.float32),
            state_std=np.maximum(state.std(axis=0, dtype=np.float64), 1e-2).astype(np.float32),
            action_mean=rows.mean(axis=0, dtype=np.float64).astype(np.float32),
            action_std=np.maximum(rows.std(axis=0, dtype=np.float64), 1e-2).astype(np.float32),
        )


def build_tokenizer(instructions: Sequence[str], max_length: int) -> Tokenizer:
    """A word-level, lower-case tokenizer of the words in `instructions`: pad 0, unknown 1, then words by name."""
    normalizer = tokenizers.normalizers.Lowercase()
    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = {word for text in instructions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = {word: index for index, word in enumerate([PAD_TOKEN, UNKNOWN_TOKEN, *sorted(words)])}
    tokenizer = Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.enable_padding(direction="right", pad_id=0, pad_token=PAD_TOKEN, length=max_length)
    tokenizer.enable_truncation(max_length)
    return tokenizer


class EdgeVLAPolicy:
    """Network, statistics and tokenizer, with the queue of actions still to execute."""

    def __init__(self, module: EdgeVLA, statistics: Statistics, tokenizer: Tokenizer) -> None:
        self.module = module.eval()
        self.statistics = statistics
        self.tokenizer = tokenizer
        self._queue: deque[NDArray[np.float32]] = deque()

    @property
    def needs_observation(self) -> bool:
        """Whether the next `predict` looks at its observation, or only takes the next action of the last chunk."""
        return not self._queue

    def reset(self) -> None:
        """Forget the rest of the last chunk: a new episode begins."""
        self._queue.clear()

    def predict(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """The next action, float32 [action], in the robot's units; a new chunk after every `n_action_steps`."""
        if not self._queue:
            self._queue.extend(self.predict_chunk(observation)[: self.module.config.n_action_steps])
        return self._queue.popleft()

    def predict_chunk(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """One chunk, float32 [chunk, action], in the robot's units, clipped to [-1, 1]."""
        images, state, tokens = self.preprocess(observation)
        with torch.inference_mode():
            normalised = self.module(images, state, tokens)[0]
            mean, std = torch.from_numpy(self.statistics.action_mean), torch.from_numpy(self.statistics.action_std)
            chunk = (normalised * std + mean).clamp(-1.0, 1.0)
        result: NDArray[np.float32] = chunk.numpy().copy()
        return result

    def preprocess(self, observation: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The network's inputs: images [1, 3, S, S] in 0..1, normalised state [1, state], tokens [1, L].

        Images may be uint8 [S, S, 3] or float32 [3, S, S] in 0..1. Raises InputError by name otherwise.
        """
        for name in (IMAGE, STATE, TASK):
            if name not in observation:
                raise InputError(f"the observation has no {name!r}, it has {sorted(observation)}", where=name)
        return self._images(observation[IMAGE]), self._state(observation[STATE]), self._tokens(observation[TASK])

    def tokenize(self, instruction: str) -> list[int]:
        """Token ids of an instruction, padded with 0 to `max_length`."""
        ids: list[int] = self.tokenizer.encode(instruction).ids
        return ids

    def _images(self, image: NDArray[Any]) -> torch.Tensor:
        size = self.module.config.image_size
        if image.dtype == np.uint8 and image.shape == (size, size, 3):
            return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0).float() / 255.0
        if image.dtype == np.float32 and image.shape == (3, size, size):
            return torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0)
        raise InputError(
            f"{IMAGE} is {image.dtype} {list(image.shape)}, "
            f"needed is uint8 [{size}, {size}, 3] or float32 [3, {size}, {size}]",
            where=IMAGE,
        )

    def _state(self, state: NDArray[Any]) -> torch.Tensor:
        size = self.module.config.state_size
        if state.dtype != np.float32 or state.shape != (size,):
            raise InputError(f"{STATE} is {state.dtype} {list(state.shape)}, needed is float32 [{size}]", where=STATE)
        if not np.isfinite(state).all():
            raise InputError(f"{STATE} holds values that are not finite", where=STATE)
        mean, std = torch.from_numpy(self.statistics.state_mean), torch.from_numpy(self.statistics.state_std)
        return ((torch.from_numpy(state) - mean) / std).unsqueeze(0)

    def _tokens(self, instruction: Any) -> torch.Tensor:
        if not isinstance(instruction, str):
            raise InputError(f"{TASK} is {type(instruction).__name__}, needed is a string", where=TASK)
        return torch.tensor([self.tokenize(instruction)], dtype=torch.int64)
