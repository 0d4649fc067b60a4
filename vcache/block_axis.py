"""Which axis of an engine's KV tensor counts its blocks: decided from the shape and hints, never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

#: One layer: a tensor, or K and V apart.
Layer = torch.Tensor | Sequence[torch.Tensor]
KVCaches = Mapping[str, Layer] | Sequence[Layer] | torch.Tensor


@dataclass(frozen=True, slots=True)
class KVExpectation:
    """What a model description promises about one rank's KV tensors; None where it does not say."""

    num_layers: int | None = None
    #: K and V of one block in one layer.
    layer_block_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor with the name that errors call it by."""

    name: str
    tensor: torch.Tensor
    #: How many tensors make up its layer, and whether it may hold all layers.
    parts: int = 1
    whole_model: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def block_bytes(self, axis: int) -> int:
        """Bytes of one block in this tensor if its blocks lie along ``axis``."""
        return self.tensor.numel() * self.tensor.element_size() // self.shape[axis]


def named_tensors(kv_caches: KVCaches, expect: KVExpectation, *, argument: str = "kv_caches") -> list[NamedTensor]:
    """The tensors in order; ValueError names the first that is no usable tensor, or the wrong number of layers.

    ``argument``: what the caller calls them.
    """
    if isinstance(kv_caches, torch.Tensor):
        named = [NamedTensor(argument, kv_caches, whole_model=True)]
    else:
        named = _per_layer(kv_caches, expect.num_layers, argument)
    first = named[0]
    for item in named:
        tensor = item.tensor
        if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"{item.name} is {tensor.layout} on {tensor.device}; a dense tensor on cpu or cuda is needed"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{item.name} is empty (shape {item.shape})")
        if tensor.dim() < 2:
            raise ValueError(f"{item.name} has shape {item.shape}; at least [num_blocks, ...] is needed")
        if tensor.device != first.tensor.device:
            raise ValueError(f"{item.name} is on {tensor.device}, but {first.name} on {first.tensor.device}")
    return named


def _per_layer(
    kv_caches: Mapping[str, Layer] | Sequence[Layer], num_layers: int | None, argument: str
) -> list[NamedTensor]:
    entries: list[tuple[str, object]]
    if isinstance(kv_caches, Mapping):
        entries = [(f"{argument}[{key!r}]", value) for key, value in kv_caches.items()]
    elif isinstance(kv_caches, list | tuple):
        entries = [(f"{argument}[{index}]", value) for index, value in enumerate(kv_caches)]
    else:
        raise ValueError(f"{argument} must be a tensor, or a dict or list of tensors, not {type(kv_caches).__name__}")
    if not entries:
        raise ValueError(f"{argument} is empty")
    if num_layers is not None and len(entries) != num_layers:
        raise ValueError(
            f"{argument} holds {len(entries)} layers ({entries[0][0]} to {entries[-1][0]}); "
            f"the model description says {num_layers}"
        )
    named: list[NamedTensor] = []
    for name, value in entries:
        parts: list[tuple[str, object]] = [(name, value)]
        if isinstance(value, tuple | list) and value:  # K and V apart
            parts = [(f"{name}[{index}]", part) for index, part in enumerate(value)]
        for part_name, part in parts:
            if not isinstance(part, torch.Tensor):
                raise ValueError(f"{part_name} must be a tensor, not {type(part).__name__}")
            named.append(NamedTensor(part_name, part, parts=len(parts)))
    return named


def block_axes(
    named: Sequence[NamedTensor],
    *,
    block_size: int,
    num_blocks: int | None = None,
    block_axis: int | None = None,
    expect: KVExpectation,
) -> list[int]:
    """The block axis of each tensor, such that all agree on the number of blocks.

    ValueError names the tensor that contradicts a hint or the others, or that can be read in two ways.
    """
    readings = [_readings(item, block_size, num_blocks, block_axis, expect) for item in named]
    common = {named[0].shape[axis] for axis in readings[0]}
    for item, axes in zip(named, readings, strict=True):
        counts = {item.shape[axis] for axis in axes}
        if not common & counts:
            raise ValueError(
                f"{item.name} of shape {item.shape} has {_either(counts)} blocks, "
                f"but {named[0].name} of shape {named[0].shape} has {_either(common)}"
            )
        common &= counts
    chosen = []
    for item, axes in zip(named, readings, strict=True):
        fitting = [axis for axis in axes if item.shape[axis] in common]
        if len(fitting) > 1:
            raise ValueError(
                f"{item.name} of shape {item.shape} can be read with its blocks along axis {_either(fitting)}: "
                "pass block_axis=, num_blocks= or a model description"
            )
        chosen.append(fitting[0])
    return chosen


def _readings(
    item: NamedTensor, block_size: int, num_blocks: int | None, block_axis: int | None, expect: KVExpectation
) -> list[int]:
    shape = item.shape
    if block_axis is not None:
        if not 0 <= block_axis < len(shape) - 1:
            raise ValueError(f"block_axis={block_axis} does not fit {item.name} of shape {shape}")
        axes = [block_axis]
    else:
        axes = _possible(item, num_blocks, expect.num_layers)
    if num_blocks is not None:
        axes = [axis for axis in axes if shape[axis] == num_blocks]
        if not axes:
            raise ValueError(f"{item.name} of shape {shape} cannot be read as num_blocks={num_blocks} blocks")
    promised = _promised_bytes(item, expect)
    if promised is not None:
        found = {item.block_bytes(axis) for axis in axes}
        axes = [axis for axis in axes if item.block_bytes(axis) == promised]
        if not axes:
            raise ValueError(
                f"{item.name} of shape {shape} and dtype {item.tensor.dtype} has {_either(found)} bytes a block; "
                f"by the model description it should have {promised}"
            )
    return axes if len(axes) == 1 else _plausible(item, axes, block_size, expect.num_layers)


def _possible(item: NamedTensor, num_blocks: int | None, num_layers: int | None) -> list[int]:
    """Every axis that may count blocks: the first, the one after K/V halves, those after a stack of layers."""
    shape = item.shape
    inner = len(shape) - 1  # an axis must be left for the block's inside
    halves = shape[0] == 2
    stacked = item.whole_model and (num_blocks is not None or shape[0] == num_layers)
    axes = [0]
    if inner > 1 and (halves or stacked):
        axes.append(1)
    if inner > 2 and stacked:
        axes.append(2)
    return axes


def _plausible(item: NamedTensor, axes: list[int], block_size: int, num_layers: int | None) -> list[int]:
    """Drop the readings that no engine's layout has. What is left may still be more than one."""
    shape = item.shape
    if item.whole_model and num_layers is not None and num_layers > 1:
        # All layers must be in there, before the block axis or inside the block.
        kept = [axis for axis in axes if (num_layers in shape[1:] if axis == 0 else shape[0] == num_layers)]
        if 2 in kept:
            kept.remove(2 if shape[1] != 2 else 1)
        return kept or axes
    if axes != [0, 1]:
        return axes
    # [2, n, ...]: halves of n blocks, unless it may as well be a cache of two blocks.
    two_blocks = {3: shape[1] == block_size, 4: True}.get(len(shape), shape[1] == 2)
    return [0, 1] if two_blocks else [1]


def _promised_bytes(item: NamedTensor, expect: KVExpectation) -> int | None:
    if expect.layer_block_bytes is None:
        return None
    if item.whole_model:
        return None if expect.num_layers is None else expect.layer_block_bytes * expect.num_layers
    return expect.layer_block_bytes // item.parts


def _either(values: set[int] | list[int]) -> str:
    return " or ".join(str(value) for value in sorted(values))
