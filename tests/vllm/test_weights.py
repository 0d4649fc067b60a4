"""Weights in local files are told apart wherever training, merging or editing changed them, and are the same wherever they lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from vcache_vllm.weights import weights_digest

pytestmark = pytest.mark.vllm

Tensors = dict[str, npt.NDArray[np.float32]]
MIB = 1 << 20


def tensors() -> Tensors:
    """14 MiB: three layers of a model, most of it far from any other tensor's begin."""
    dice = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (4096, 256), "model.norm.weight": (256,)}
    for layer in range(3):
        shapes |= {
            f"model.layers.{layer}.attn.weight": (256, 1024),
            f"model.layers.{layer}.attn.bias": (1024,),
            f"model.layers.{layer}.norm.weight": (256,),
            f"model.layers.{layer}.mlp.weight": (512, 1024),
        }
    return {name: dice.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Tensors], Path]:
    """A directory of its own with these tensors, in two files as large models have them."""

    def save(values: Tensors) -> Path:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        names = sorted(values)
        for index, part in enumerate((names[::2], names[1::2])):
            save_file({name: values[name] for name in part}, directory / f"model-{index}.safetensors")
        return directory

    return save


def finetuned_norm(values: Tensors) -> None:
    values["model.layers.1.norm.weight"][100] += 1


def finetuned_bias(values: Tensors) -> None:
    values["model.layers.2.attn.bias"][-1] += 1


def edited_layer(values: Tensors) -> None:
    weight = values["model.layers.1.mlp.weight"]
    weight += 0.01 * np.outer(np.arange(512), np.ones(1024)).astype(np.float32)


def merged_adapter(values: Tensors) -> None:
    dice = np.random.default_rng(2)
    for layer in range(3):
        left, right = dice.standard_normal((256, 2)), dice.standard_normal((2, 1024))
        values[f"model.layers.{layer}.attn.weight"] += (1e-4 * left @ right).astype(np.float32)


def trained_token(values: Tensors) -> None:
    values["model.embed_tokens.weight"][3001] += 1


@pytest.mark.parametrize("change", [finetuned_norm, finetuned_bias, edited_layer, merged_adapter, trained_token])
def test_another_model_of_the_same_form_differs(
    saved: Callable[[Tensors], Path], change: Callable[[Tensors], None]
) -> None:
    other = tensors()
    change(other)
    assert weights_digest(saved(other)) != weights_digest(saved(tensors()))


def test_one_of_many_experts_in_one_tensor_counts(saved: Callable[[Tensors], Path]) -> None:
    experts = np.ones((3, 4 * MIB // 4), dtype=np.float32)
    other = experts.copy()
    other[1] += 1
    assert weights_digest(saved({"experts": experts})) != weights_digest(saved({"experts": other}))


def test_a_copy_of_another_age_is_the_same(saved: Callable[[Tensors], Path], tmp_path: Path) -> None:
    here = saved(tensors())
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(here, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert weights_digest(copy) == weights_digest(here)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in here.iterdir():  # as the Hugging Face hub's cache has them
        (linked / file.name).symlink_to(file)
    assert weights_digest(linked) == weights_digest(here)


def test_what_decides_how_weights_are_used_counts_and_what_does_not_does_not(saved: Callable[[Tensors], Path]) -> None:
    here = saved({"norm": np.ones(4, dtype=np.float32)})
    before = weights_digest(here)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        (here / name).write_text("{}")
    assert weights_digest(here) == before
    (here / "preprocessor_config.json").write_text('{"image_mean": 0}')
    images = weights_digest(here)
    (here / "modeling_own.py").write_text("pass")
    assert len({before, images, weights_digest(here)}) == 3


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "model.pt", "weights.unknown"])
def test_files_whose_tensors_are_not_known_count_whole(tmp_path: Path, name: str) -> None:
    content = bytearray(3 * MIB)
    (tmp_path / name).write_bytes(content)
    before = weights_digest(tmp_path)
    content[MIB + 12345] ^= 1
    (tmp_path / name).write_bytes(content)
    assert weights_digest(tmp_path) != before
    assert weights_digest(tmp_path / name) != ""


def header_of(entries: object, size: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text


ENTRY = {"dtype": "U8", "shape": [MIB], "data_offsets": [0, MIB]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        (1 << 63).to_bytes(8, "little"),
        header_of({"a": ENTRY}, size=99_000_000),
        header_of([1, 2]),
        header_of({"a": {**ENTRY, "data_offsets": [0, MIB - 1]}}),
        header_of({"a": {**ENTRY, "data_offsets": [1, MIB]}}),
        header_of({"a": {**ENTRY, "data_offsets": [MIB, 0]}}),
        header_of({"a": {**ENTRY, "data_offsets": [-MIB, MIB]}}),
        header_of({"a": {**ENTRY, "data_offsets": [0, 1 << 62]}}),
        header_of({"a": {**ENTRY, "data_offsets": [0, MIB // 2]}, "b": {**ENTRY, "data_offsets": [1, MIB]}}),
        header_of({"a": {"dtype": "U8"}}),
        b"\x10\x27\0\0\0\0\0\0" + b"[" * 10_000,
    ],
)
def test_a_file_that_only_looks_like_safetensors_counts_whole(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    content = bytearray(header + bytes(MIB))
    file.write_bytes(content)
    before = weights_digest(tmp_path)
    content[-MIB // 3] ^= 1
    file.write_bytes(content)
    assert weights_digest(tmp_path) != before


def test_nothing_has_no_digest(tmp_path: Path) -> None:
    assert weights_digest(tmp_path) == ""
    assert weights_digest(tmp_path / "missing") == ""
