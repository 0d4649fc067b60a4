"""Tokens as callers have them, in lists, arrays or tensors, and as they are hashed: little-endian uint32."""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    Tokens = Sequence[int] | npt.NDArray[Any] | torch.Tensor

MAX_TOKEN: Final = (1 << 31) - 1
#: Up to so many numbers lists of Python are faster than arrays: a copy has swept the caches since the last call, and an operation
#: of numpy or torch on cold ones takes 30 to 70 us, whatever its size.
FEW: Final = 1024
#: Seen as these, negative numbers are higher than any that is allowed, so that one comparison finds both.
_UNSIGNED: Final = {np.dtype(name): np.dtype(f"u{name[-1]}") for name in ("<i4", "<i8", "<u4", "<u8")}

# A list becomes uint32 in one C loop; where "I" has another width or order the bytes would not be the key's.
if array("I").itemsize != 4 or sys.byteorder != "little":
    raise ImportError("VCache needs a little-endian machine whose unsigned int has 32 bits")


def packed_tokens(tokens: Tokens) -> bytes | memoryview:
    """The tokens as little-endian uint32, for hashing; never element by element in Python.

    A list costs one pass of ``array.array`` (9 ns a token), a long int32 array or tensor one comparison and no copy. Raises
    ``ValueError`` naming ``tokens`` for anything empty, not one-dimensional, not integers, negative or above int32. Among
    the elements of a list, bools pass for the integers they are, save at its start: looking at each type would cost three
    times the hashing.
    """
    values = _list_values(tokens) if isinstance(tokens, (list, tuple)) else _array_values(tokens)
    if not len(values):
        raise ValueError("tokens must not be empty")
    if isinstance(values, array):
        highest = max(values) if len(values) <= FEW else int(np.frombuffer(values, dtype=np.uint32).max())
        if highest > MAX_TOKEN:
            raise ValueError(f"tokens must fit int32 (at most {MAX_TOKEN}), found {highest}")
        return memoryview(values).cast("B")
    unsigned = _UNSIGNED.get(values.dtype)
    if unsigned is None or int(values.view(unsigned).max()) > MAX_TOKEN:
        low, high = int(values.min()), int(values.max())
        if low < 0:
            raise ValueError(f"tokens must not be negative, found {low}")
        if high > MAX_TOKEN:
            raise ValueError(f"tokens must fit int32 (at most {MAX_TOKEN}), found {high}")
    return np.ascontiguousarray(values, dtype="<u4").data.cast("B")


def _list_values(tokens: Sequence[int]) -> array[int]:
    if tokens and isinstance(tokens[0], (bool, np.bool_)):
        raise ValueError("tokens must be integers, found bool")
    try:
        return array("I", tokens)
    except OverflowError:
        wrong = next(t for t in tokens if not 0 <= t < 1 << 32)
        raise ValueError(
            f"tokens must not be negative, found {wrong}"
            if wrong < 0
            else f"tokens must fit int32 (at most {MAX_TOKEN}), found {wrong}"
        ) from None
    except (TypeError, ValueError):
        strange = next((token for token in tokens if not _is_index(token)), None)
        if getattr(strange, "ndim", 0) or (isinstance(strange, Sequence) and not isinstance(strange, (str, bytes))):
            raise ValueError("tokens must be one-dimensional, found a sequence inside") from None
        raise ValueError(f"tokens must be integers, found {type(strange).__name__}") from None


def _is_index(token: object) -> bool:
    try:
        operator.index(token)  # type: ignore[arg-type] # whether it can is the question
    except (TypeError, ValueError):
        return False
    return True


def _array_values(tokens: object) -> npt.NDArray[Any] | array[int]:
    torch = sys.modules.get("torch")  # a tensor can only come from a process that has loaded it
    if torch is not None and isinstance(tokens, torch.Tensor):
        if tokens.layout != torch.strided or tokens.is_meta:
            raise ValueError(f"tokens must be a dense tensor with values, got {tokens.layout} on {tokens.device}")
        if tokens.dtype == torch.bool or tokens.dtype.is_floating_point or tokens.dtype.is_complex:
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.dim() == 1 and tokens.numel() <= FEW:
            return _list_values(tokens.tolist())
        tokens = (tokens if tokens.is_cpu else tokens.cpu()).numpy()
    elif isinstance(tokens, array):
        tokens = np.asarray(tokens)
    elif isinstance(tokens, Sequence) and not isinstance(tokens, (str, bytes, bytearray, memoryview)):
        return _list_values(list(tokens))
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"tokens must be a list of ints, a numpy array or a torch tensor, got {type(tokens).__name__}")
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one-dimensional, got shape {tuple(tokens.shape)}")
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    return tokens
