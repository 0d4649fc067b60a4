"""Memory that torch did not allocate, as a tensor on the device of one's choice.

torch looks up which device memory belongs to when it comes by ``__cuda_array_interface__``: memory of a peer becomes a tensor of
that peer's device, whose every use would make a context there (0.5 GB) and launch there, or a copy if one asks for another device.
By DLPack the device is what the producer says. (https://dmlc.github.io/dlpack/latest/c_api.html, version 0)
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_CPU: Final = 1
_CUDA: Final = 2
_UNSIGNED: Final = 1


class _Tensor(ctypes.Structure):
    """``DLManagedTensor``, and behind it the one number that its shape is."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),  # none: contiguous
        ("byte_offset", ctypes.c_uint64),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("extent", ctypes.c_int64),
    )


_libc: Final = ctypes.CDLL(None)
_libc.calloc.restype = ctypes.c_void_p
_libc.calloc.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
_new_capsule: Final = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_over(address: int, nbytes: int, *, cuda_ordinal: int | None) -> torch.Tensor:
    """uint8 ``[nbytes]`` at ``address``, no copy, on ``cuda:<ordinal>`` or (``None``) the host. It owns nothing."""
    import torch

    # The description has to live as long as the last tensor that shares its storage, perhaps until after Python's end: it is
    # libc's memory, and libc's free is what the last tensor calls.
    at = _libc.calloc(1, ctypes.sizeof(_Tensor))
    described = _Tensor.from_address(at)
    described.data = address
    described.device_type = _CPU if cuda_ordinal is None else _CUDA
    described.device_id = cuda_ordinal or 0
    described.ndim = 1
    described.type_code, described.type_bits, described.type_lanes = _UNSIGNED, 8, 1
    described.shape = at + _Tensor.extent.offset
    described.extent = nbytes
    described.deleter = ctypes.cast(_libc.free, ctypes.c_void_p).value
    with torch.inference_mode(False):  # what is made in that mode cannot be written outside of it
        return torch.utils.dlpack.from_dlpack(_new_capsule(at, b"dltensor", None))
