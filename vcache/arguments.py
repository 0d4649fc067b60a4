"""Checks of what callers of the public API pass in: every refusal is a ``ValueError`` that names the argument.

Only values are looked at here. Whether slots fit the KV tensors is ``vcache/slots.py``'s business.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vcache.joined_keys import JoinedKeys
from vcache.protocol import KEY_BYTES

if TYPE_CHECKING:
    import torch

    Mask = Sequence[bool] | npt.NDArray[np.bool_] | torch.Tensor

#: What the wire can carry (``protocol.Seconds``).
MAX_SECONDS: Final = 86_400.0
#: What ``pin=True`` means.
DEFAULT_PIN_S: Final = 300.0


def pin_seconds(pin: object) -> float:
    """Seconds to keep chunks from eviction: the number ``pin``, ``DEFAULT_PIN_S`` for ``True``, 0 for ``False``."""
    return (DEFAULT_PIN_S if pin else 0.0) if isinstance(pin, bool) else checked_seconds("pin", pin)


def masked_prefix(mask: Mask | None, *, tokens: int, chunk_size: int) -> int:
    """Tokens that ``mask`` leaves out: the length of its leading false run, which must be whole chunks.

    ``None`` leaves out nothing. Raises ``ValueError`` naming ``mask`` when it is not bool, not one value per token, not in
    host memory, or false anywhere after its first true.
    """
    if mask is None:
        return 0
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(mask, torch.Tensor):
        if mask.device.type != "cpu":
            raise ValueError(f"mask must be in host memory, got a tensor on {mask.device}")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}")
        mask = mask.numpy()
    try:
        values = np.asarray(mask)
    except ValueError:
        raise ValueError("mask must be one-dimensional, found sequences of different lengths inside") from None
    if values.shape != (tokens,):
        raise ValueError(f"mask must have one value for each of {tokens} tokens, got shape {tuple(values.shape)}")
    if values.dtype != np.bool_:
        raise ValueError(f"mask must be bool, got {values.dtype}")
    skipped = int(values.argmax()) if values.any() else tokens
    if not values[skipped:].all():
        raise ValueError(f"mask must be false on a leading run only, is false again after token {skipped}")
    if skipped % chunk_size and skipped != tokens:
        raise ValueError(f"mask must be false on a multiple of {chunk_size} tokens (whole chunks), is on {skipped}")
    return skipped


def checked_offset(offset: object, *, tokens: int) -> int:
    """The number of leading tokens that have no slot, or a ``ValueError`` naming ``offset``."""
    if isinstance(offset, bool) or not isinstance(offset, (int, np.integer)) or not 0 <= offset <= tokens:
        raise ValueError(f"offset must be a whole number from 0 to the {tokens} tokens, got {offset!r}")
    return int(offset)


def checked_slots(slot_mapping: object, *, length: int, device: object) -> npt.NDArray[np.int64]:
    """``slot_mapping`` in host memory, with one slot for each of ``length`` tokens.

    Raises ``ValueError`` naming it for anything but one dimension of so many integers, on the host or on ``device``. Which
    slots there are is checked where they become blocks (``blocks_of_slots``).
    """
    if slot_mapping is None:
        raise ValueError("slot_mapping must be given")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(slot_mapping, torch.Tensor):
        if slot_mapping.device.type != "cpu" and slot_mapping.device != device:
            raise ValueError(f"slot_mapping must be in host memory or on {device}, is on {slot_mapping.device}")
        if slot_mapping.dtype == torch.bool or slot_mapping.dtype.is_floating_point or slot_mapping.dtype.is_complex:
            raise ValueError(f"slot_mapping must be integers, got {slot_mapping.dtype}")
        slot_mapping = (slot_mapping if slot_mapping.is_cpu else slot_mapping.cpu()).numpy()
    try:
        values = np.asarray(slot_mapping)
    except ValueError:
        raise ValueError("slot_mapping must be one-dimensional, found sequences of different lengths inside") from None
    if values.shape != (length,):
        raise ValueError(
            f"slot_mapping must have one slot for each of {length} tokens, got shape {tuple(values.shape)}"
        )
    if values.dtype.kind not in "iu":
        raise ValueError(f"slot_mapping must be integers, got {values.dtype}")
    return values.astype(np.int64, copy=False)


def check_slot_range(values: npt.NDArray[np.int64], *, first: int, slots: int) -> None:
    """Refuses a ``slot_mapping`` that from index ``first`` on holds anything but slots from 0 to ``slots - 1``."""
    used = values[first:]
    if used.size and int(used.view(np.uint64).max()) >= slots:  # of negative ones, too
        index = first + int(np.flatnonzero((used < 0) | (used >= slots))[0])
        raise ValueError(f"slot_mapping[{index}] is {values[index]}, there are slots 0 to {slots - 1}")


def checked_seconds(name: str, value: object) -> float:
    """A number of seconds that the wire can carry, or a ``ValueError`` naming the argument."""
    if (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and 0 <= value <= MAX_SECONDS
    ):
        return float(value)
    raise ValueError(f"{name} must be seconds from 0 to {MAX_SECONDS:.0f}, got {value!r}")


def checked_blocks(block_ids: object, *, chunks: int, per_chunk: int, num_blocks: int) -> npt.NDArray[np.int64]:
    """``block_ids`` as int64 ``[chunks, per_chunk]``, or a ``ValueError`` naming it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(block_ids, torch.Tensor):
        block_ids = block_ids.detach().cpu().numpy()
    values = np.asarray(block_ids)
    if values.size == chunks * per_chunk == 0:
        return np.empty((chunks, per_chunk), np.int64)
    if values.dtype.kind not in "iu" or values.shape not in ((chunks, per_chunk), (chunks * per_chunk,)):
        raise ValueError(
            f"block_ids must be integers, {per_chunk} for each of {chunks} keys, got {values.dtype} of shape {values.shape}"
        )
    if int(values.min()) < 0 or int(values.max()) >= num_blocks:
        raise ValueError(f"block_ids must be from 0 to {num_blocks - 1}, found {values.min()} to {values.max()}")
    return values.astype(np.int64, copy=False).reshape(chunks, per_chunk)


def check_distinct(name: str, block_ids: npt.NDArray[np.int64]) -> None:
    """Refuses a load that would write a block twice; ``name`` is the argument the blocks come from."""
    if len(set(block_ids.ravel().tolist())) < block_ids.size:
        in_order = np.sort(block_ids, axis=None)
        twice = in_order[1:][in_order[1:] == in_order[:-1]]
        raise ValueError(f"{name} names block {twice[0]} twice; a load writes each block once")


def check_keys(name: str, keys: object) -> None:
    """Refuses anything but a sequence of 16-byte keys; no Python code per key."""
    if isinstance(keys, JoinedKeys):
        return
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        raise ValueError(f"{name} must be a sequence of chunk keys, got {type(keys).__name__}")
    try:
        whole = b"".join(keys)
    except TypeError:
        whole = b""
    if len(whole) != KEY_BYTES * len(keys) or not {KEY_BYTES}.issuperset(map(len, keys)):
        raise ValueError(f"{name} must hold chunk keys ({KEY_BYTES} bytes each) only")


def check_key(name: str, key: object) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"{name} must be a chunk key ({KEY_BYTES} bytes), got {type(key).__name__} {key!r:.80}")
