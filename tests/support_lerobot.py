"""LeRobot checkpoints with random weights, made by LeRobot's own classes, and observations for them. For tests only.

Tests skip without LeRobot:  lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
A Python that a test starts:  subprocess.run(command, env=lerobot.environment())
As a program:                 python tests/support_lerobot.py act|diffusion|smolvla|act-full|smolvla-full FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_OPERATORS = Path(__file__).parent / "torchvision_operators" / "sitecustomize.py"
_spec = importlib.util.spec_from_file_location("torchvision_operators", _OPERATORS)
assert _spec is not None and _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

from lerobot.configs.types import FeatureType, PolicyFeature  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402
from lerobot.policies.act.modeling_act import ACTPolicy  # noqa: E402
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig  # noqa: E402
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy  # noqa: E402
from lerobot.policies.factory import make_pre_post_processors  # noqa: E402
from lerobot.policies.pretrained import PreTrainedPolicy  # noqa: E402
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig  # noqa: E402
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy  # noqa: E402

TASKS = ("put the cube in the bowl", "open the drawer", "hand over the red screwdriver")
STATE, ACTION, CAMERA = "observation.state", "action", "observation.images."


@dataclass(frozen=True)
class Robot:
    """What a policy sees and moves: its cameras with their frame size, and the sizes of state and action."""

    cameras: tuple[str, ...]
    height: int
    width: int
    state: int
    action: int


SMALL = Robot(cameras=("front", "wrist"), height=48, width=72, state=6, action=5)
ROBOTS = {
    "act": SMALL,
    "diffusion": SMALL,
    "smolvla": SMALL,
    "act-full": Robot(cameras=("top",), height=480, width=640, state=14, action=14),
    "smolvla-full": Robot(cameras=("top",), height=480, width=640, state=6, action=6),
}
"""The robot of every kind of checkpoint made here."""

TINY: Mapping[str, Mapping[str, Any]] = {
    "act": {
        "chunk_size": 8,
        "n_action_steps": 5,
        "dim_model": 32,
        "n_heads": 4,
        "dim_feedforward": 48,
        "n_encoder_layers": 2,
        "n_vae_encoder_layers": 1,
        "latent_dim": 8,
    },
    "diffusion": {
        "down_dims": (16, 32, 64),
        "n_groups": 4,
        "kernel_size": 3,
        "diffusion_step_embed_dim": 16,
        "spatial_softmax_num_keypoints": 8,
        "crop_shape": (40, 64),
        "num_train_timesteps": 100,
        "noise_scheduler_type": "DDIM",
        "num_inference_steps": 10,
    },
    "smolvla": {
        "chunk_size": 12,
        "n_action_steps": 7,
        "max_state_dim": 8,
        "max_action_dim": 7,
        "resize_imgs_with_padding": (64, 64),
        "num_vlm_layers": 4,
        "num_steps": 10,
    },
}
"""Fields of LeRobot's configurations that make a checkpoint tiny; ACT and Diffusion keep their ResNet-18 of 11 M."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a Python that uses LeRobot beside a CPU-only torch, on one thread, away from any hub."""
    paths = [str(_OPERATORS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **changes,
        "PYTHONPATH": os.pathsep.join(paths),
    }


def make_act(folder: Path, *, seed: int = 0, robot: Robot = SMALL, config: Mapping[str, Any] | None = None) -> Path:
    """A tiny ACT in `folder`; `config` holds further fields of LeRobot's ACTConfig."""
    return _write_act(folder, seed, robot, {**TINY["act"], **(config or {})})


def make_full_act(folder: Path, *, seed: int = 0) -> Path:
    """The ACT of LeRobot's defaults: 52 M parameters, one 480×640 camera, chunks of 100."""
    return _write_act(folder, seed, ROBOTS["act-full"], {})


def make_diffusion(
    folder: Path, *, seed: int = 0, robot: Robot = SMALL, config: Mapping[str, Any] | None = None
) -> Path:
    """A tiny Diffusion policy in `folder`: two steps of history, ten DDIM steps of a hundred."""
    fields = {"input_features": _inputs(robot), "output_features": _outputs(robot), **TINY["diffusion"]}
    settings = DiffusionConfig(**{**fields, **(config or {}), "device": "cpu"})
    with _seeded(seed):
        policy = DiffusionPolicy(settings)
        _enliven(policy.diffusion.unet)
    return _save(policy, folder, robot, seed)


def make_smolvla(
    folder: Path,
    vlm_folder: Path,
    *,
    seed: int = 0,
    robot: Robot = SMALL,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A tiny SmolVLA in `folder`, and the configuration and tokenizer of its VLM in `vlm_folder`."""
    make_vlm(vlm_folder)
    return _write_smolvla(folder, vlm_folder, seed, robot, {**TINY["smolvla"], **(config or {})})


def make_full_smolvla(folder: Path, vlm_folder: Path, *, seed: int = 0) -> Path:
    """SmolVLA in full size but for its vocabulary: 356 M parameters, 16 of 32 language layers, 512-pixel images."""
    make_vlm(vlm_folder, full=True)
    return _write_smolvla(folder, vlm_folder, seed, ROBOTS["smolvla-full"], {})


def make_vlm(folder: Path, *, full: bool = False) -> Path:
    """What SmolVLA would fetch from a hub: a SmolVLM's configuration and its processor with a byte-level tokenizer."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = _tokenizer()
    text = _FULL_TEXT if full else _TINY_TEXT
    vision = _FULL_VISION if full else _TINY_VISION
    settings = SmolVLMConfig(
        text_config={**text, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config=dict(vision),
        scale_factor=4 if full else 2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    settings.save_pretrained(folder)
    processor = SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=4)
    processor.save_pretrained(folder)
    return folder


def make(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """The checkpoint of one of `ROBOTS`, with the VLM of a SmolVLA in the folder `vlm` beside it."""
    vlm = folder.parent / "vlm"
    makers = {
        "act": lambda: make_act(folder, seed=seed),
        "diffusion": lambda: make_diffusion(folder, seed=seed),
        "smolvla": lambda: make_smolvla(folder, vlm, seed=seed),
        "act-full": lambda: make_full_act(folder, seed=seed),
        "smolvla-full": lambda: make_full_smolvla(folder, vlm, seed=seed),
    }
    return makers[kind]()


def observations(kind: str, count: int, seed: int = 0, *, robot: Robot | None = None) -> list[dict[str, Any]]:
    """`count` time steps of one episode as the robot of `kind`, or another, sees it, by the policy's own input names.

    Images uint8 [H, W, 3] of shapes that move, the state float32, and for SmolVLA a `task` that changes on the way.
    """
    robot, random = robot or ROBOTS[kind], np.random.default_rng(seed)
    mean, std = _statistics(robot, 0)[STATE]["mean"].numpy(), _statistics(robot, 0)[STATE]["std"].numpy()
    phases = random.uniform(0, 2 * np.pi, (len(robot.cameras), 4))
    rows = []
    for step in range(count):
        row: dict[str, Any] = {
            f"{CAMERA}{camera}": _frame(robot, phases[index] + 0.7 * step, random)
            for index, camera in enumerate(robot.cameras)
        }
        row[STATE] = (mean + std * random.standard_normal(robot.state)).astype(np.float32)
        if kind.startswith("smolvla"):
            row["task"] = TASKS[step * len(TASKS) // count]
        rows.append(row)
    return rows


def with_history(rows: list[dict[str, Any]], history: int) -> list[dict[str, Any]]:
    """Every row with its last `history` time steps along a new first dimension, the first row repeated before it."""
    stacked = []
    for index in range(len(rows)):
        steps = [rows[max(0, index - back)] for back in reversed(range(history))]
        stacked.append(
            {
                name: value if isinstance(value, str) else np.stack([step[name] for step in steps])
                for name, value in rows[index].items()
            }
        )
    return stacked


def write_set(folder: Path, kind: str, count: int = 12, *, seed: int = 0, history: int | None = None) -> Path:
    """A calibration set of `observations` in three episodes; with a history where the policy of `kind` has one."""
    from vlaopt.calibration import write_calibration_set

    steps = history or (2 if kind == "diffusion" else 1)
    lengths = [count // 3 + (1 if index < count % 3 else 0) for index in range(3)]
    episodes = [observations(kind, length, seed=seed * 3 + index) for index, length in enumerate(lengths)]
    write_calibration_set(
        folder,
        [row for rows in episodes for row in (with_history(rows, steps) if steps > 1 else rows)],
        episodes=[index for index, length in enumerate(lengths) for _ in range(length)],
        steps=[step for length in lengths for step in range(length)],
        name=f"random {kind}",
        description="drawn shapes and random states",
        source="tests/support_lerobot.py",
        licence="CC0-1.0",
        created_by="tests",
        seed=seed,
    )
    return folder


_TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
_FULL_TEXT = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "rope_theta": 100000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
_FULL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}


def _write_act(folder: Path, seed: int, robot: Robot, fields: Mapping[str, Any]) -> Path:
    settings = ACTConfig(
        **{
            "input_features": _inputs(robot),
            "output_features": _outputs(robot),
            "pretrained_backbone_weights": None,
            **fields,
            "device": "cpu",
        }
    )
    with _seeded(seed):
        policy = ACTPolicy(settings)
        _enliven(policy.model)
    return _save(policy, folder, robot, seed)


def _write_smolvla(folder: Path, vlm: Path, seed: int, robot: Robot, fields: Mapping[str, Any]) -> Path:
    settings = SmolVLAConfig(
        **{
            "input_features": _inputs(robot),
            "output_features": _outputs(robot),
            "pad_language_to": "max_length",
            **fields,
            "vlm_model_name": str(vlm),
            "load_vlm_weights": False,
            "device": "cpu",
        }
    )
    with _seeded(seed):
        policy = SmolVLAPolicy(settings)
        _enliven(policy.model)
    # As in a checkpoint from a hub: the name of its VLM says nothing about where it lies on this machine.
    settings.vlm_model_name = "some-hub/SmolVLM"
    return _save(policy, folder, robot, seed)


def _save(policy: PreTrainedPolicy, folder: Path, robot: Robot, seed: int) -> Path:
    policy.save_pretrained(folder)
    config = policy.config
    name = getattr(config, "vlm_model_name", None)
    if name is not None:
        # LeRobot opens the tokenizer to write down its name, so it gets the folder and the name is put back.
        config.vlm_model_name = str(policy.model.vlm_with_expert.processor.tokenizer.name_or_path)
    before, after = make_pre_post_processors(config, dataset_stats=_statistics(robot, seed))
    for step in before.steps:
        if name is not None and hasattr(step, "tokenizer_name"):
            step.tokenizer_name = name
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    return folder


def _inputs(robot: Robot) -> dict[str, PolicyFeature]:
    frame = PolicyFeature(FeatureType.VISUAL, (3, robot.height, robot.width))
    cameras = {f"{CAMERA}{camera}": frame for camera in robot.cameras}
    return {**cameras, STATE: PolicyFeature(FeatureType.STATE, (robot.state,))}


def _outputs(robot: Robot) -> dict[str, PolicyFeature]:
    return {ACTION: PolicyFeature(FeatureType.ACTION, (robot.action,))}


def _statistics(robot: Robot, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics as LeRobot takes them from a dataset: of vectors [size], of images [3, 1, 1]."""
    random = np.random.default_rng(seed + 1000)
    statistics = {}
    for name, size in ((STATE, robot.state), (ACTION, robot.action)):
        mean, std = random.uniform(-1, 1, size), random.uniform(0.2, 2, size)
        values = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 2.5 * std}
        values |= {"q01": mean - 2.3 * std, "q10": mean - 1.3 * std, "q90": mean + 1.2 * std, "q99": mean + 2.2 * std}
        statistics[name] = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "min": (0, 0, 0), "max": (1, 1, 1)}
    for camera in robot.cameras:
        statistics[f"{CAMERA}{camera}"] = {
            key: torch.tensor(value, dtype=torch.float32).reshape(3, 1, 1) for key, value in colours.items()
        }
    return statistics


def _frame(robot: Robot, phase: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Waves and a disc in colour, with a little noise: uint8 [H, W, 3]."""
    rows, columns = np.mgrid[0 : robot.height, 0 : robot.width] / robot.height
    waves = [np.sin(6 * rows * (index + 1) + phase[index]) * np.cos(5 * columns + phase[3]) for index in range(3)]
    image = 0.5 + 0.35 * np.stack(waves, axis=-1)
    centre = 0.5 + 0.3 * np.sin(phase[0]), robot.width / robot.height * (0.5 + 0.3 * np.cos(phase[1]))
    image[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 0.04] = 0.5 + 0.5 * np.sin(phase[:3])
    image += random.normal(0, 0.02, image.shape)
    frame: np.ndarray = np.clip(image * 255, 0, 255).astype(np.uint8)
    return frame


def _tokenizer() -> Any:
    """Byte by byte, with the special tokens that SmolVLM's processor asks for; pads on the left by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    special = ["<|im_end|>", "<unk>", *named.values()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        unk_token=special[1],
        extra_special_tokens=named,
        padding_side="left",
    )


def _enliven(module: nn.Module) -> None:
    """Random weights so large that every input moves the actions: fresh ones hide most mistakes."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=1.5 * part.in_features**-0.5)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.5)
        if isinstance(part, nn.Linear | nn.Conv1d | nn.LayerNorm) and part.bias is not None:
            nn.init.normal_(part.bias, std=0.1)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights from `seed`, without touching the random numbers of others; LeRobot's chatter is dropped."""
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(seed)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a LeRobot checkpoint with random weights.")
    parser.add_argument("kind", choices=sorted(ROBOTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=Path, help="write a calibration set to this folder too")
    parser.add_argument("--samples", type=int, default=12)
    arguments = parser.parse_args()
    make(arguments.kind, arguments.folder, seed=arguments.seed)
    if arguments.calibration:
        write_set(arguments.calibration, arguments.kind, arguments.samples, seed=arguments.seed)
