"""What the two instructions do that the kernels on records use: Triton's interpreter knows no assembly."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vcache.pool.record_kernels import LOAD_ACQUIRE, STORE_RELEASE


@contextmanager
def interpreted_assembly() -> Iterator[None]:
    """Has the interpreter run them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_inline_asm", _assembly)
        yield


def _assembly(
    self: object, text: str, constraints: str, values: list[Any], types: Any, is_pure: bool, pack: int
) -> Any:
    addresses, *others, wanted = (value.data.ravel() for value in values)
    result = np.zeros(values[0].data.shape, dtype=np.int64 if text == LOAD_ACQUIRE.value else np.int32)
    for at in np.flatnonzero(wanted).tolist():
        word = ctypes.c_int64.from_address(int(addresses[at]))
        if text == LOAD_ACQUIRE.value:
            result.ravel()[at] = word.value
        else:
            assert text == STORE_RELEASE.value
            word.value = int(others[0][at])
    return SimpleNamespace(get_result=lambda _: TensorHandle(result, types[0].scalar))
