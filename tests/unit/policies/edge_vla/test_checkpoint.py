"""A checkpoint comes back as it was saved; a damaged one is refused by file and tensor, and no pickle is opened."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from vlaopt.errors import InputError
from vlaopt.policies.edge_vla.checkpoint import load_checkpoint, save_checkpoint
from vlaopt.policies.edge_vla.config import Provenance
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy


@pytest.fixture
def folder(policy: EdgeVLAPolicy, tmp_path: Path) -> Path:
    save_checkpoint(policy, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change_weight(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors))


def test_comes_back_as_it_was_saved(policy: EdgeVLAPolicy, observation: dict[str, Any], folder: Path) -> None:
    loaded = load_checkpoint(folder)
    assert loaded.module.config == policy.module.config
    np.testing.assert_array_equal(loaded.predict_chunk(observation), policy.predict_chunk(observation))


def test_saving_twice_gives_the_same_bytes(policy: EdgeVLAPolicy, folder: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(folder), tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_saving_replaces_the_folder_whole(policy: EdgeVLAPolicy, folder: Path) -> None:
    (folder / "stale.txt").write_text("old")
    provenance = Provenance(command="train", seed=1, demonstrations=2, samples=3, steps=4, success={"total": "8/8"})
    save_checkpoint(policy, folder, provenance=provenance)
    assert not (folder / "stale.txt").exists()
    assert load_checkpoint(folder).module.config.provenance == provenance
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_links_into_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    load_checkpoint(linked)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "statistics.safetensors", "tokenizer.json"])
def test_says_which_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match="no such file") as caught:
        load_checkpoint(folder)
    assert caught.value.where == str(folder / name)


def test_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "last.ckpt"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str, inside: bool) -> None:
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(InputError, match=f"{name} is a pickle") as caught:
        load_checkpoint(tmp_path if inside else tmp_path / name)
    assert caught.value.hint is not None and "model.safetensors" in caught.value.hint


@pytest.mark.parametrize("data", [struct.pack("<Q", 2**63) + b"{}", b"", b"\0" * 7, struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_weight_file(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="damaged safetensors"):
        load_checkpoint(folder)


def test_a_weight_file_cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for percent in range(0, 100, 10):
        (folder / "model.safetensors").write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(InputError, match="damaged safetensors"):
            load_checkpoint(folder)


@pytest.mark.parametrize("offsets", [([0, 8], [4, 12]), ([0, 4], [8, 12])])
def test_tensors_that_overlap_or_leave_a_hole(folder: Path, offsets: tuple[list[int], list[int]]) -> None:
    entries = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in zip("ab", offsets, strict=True)
    }
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 12)
    with pytest.raises(InputError, match="damaged safetensors"):
        load_checkpoint(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_weight(folder, "head.output.bias", torch.zeros(7))
    with pytest.raises(
        InputError, match=r"tensor head.output.bias is float32 \[7\], the config asks for float32 \[24\]"
    ):
        load_checkpoint(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_weight(folder, "vision.project.bias", None)
    with pytest.raises(InputError, match=r"lacks tensor vision\.project\.bias"):
        load_checkpoint(folder)


def test_a_tensor_too_many_is_named(folder: Path) -> None:
    change_weight(folder, "vision.extra", torch.zeros(1))
    with pytest.raises(InputError, match=r"has tensor vision\.extra, which the config has no place for"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    change_weight(folder, "head.output.bias", torch.full((24,), value))
    with pytest.raises(InputError, match=r"tensor head\.output\.bias holds NaN or infinity"):
        load_checkpoint(folder)


def test_statistics_that_would_divide_by_zero(folder: Path) -> None:
    statistics = safetensors.torch.load((folder / "statistics.safetensors").read_bytes())
    statistics["action.std"][1] = 0.0
    (folder / "statistics.safetensors").write_bytes(safetensors.torch.save(statistics))
    with pytest.raises(InputError, match=r"tensor action\.std holds a deviation of zero or less"):
        load_checkpoint(folder)


def test_a_checkpoint_of_another_policy(folder: Path) -> None:
    (folder / "config.json").write_text('{"type": "act"}')
    with pytest.raises(InputError, match="type is 'act', needed is 'edge-vla'"):
        load_checkpoint(folder)


def test_a_config_key_out_of_range_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["stem"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json:vision\.stem: Input should be greater than or equal to 1"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "", "null"])
def test_a_damaged_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="damaged tokenizer"):
        load_checkpoint(folder)


def test_a_tokenizer_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vocabulary"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"tensor language\.embedding\.weight|words, the config's vocabulary"):
        load_checkpoint(folder)
