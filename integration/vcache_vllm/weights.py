"""What tells the weights in local files apart: a digest that is the same wherever they lie and whenever they were copied there.

To read all of large weights would take minutes, at each start of an engine and on each rank. Training, merging and quantising change
a tensor throughout or not at all, so something of *every* tensor is read, and all of those that are small or are trained by rows.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

_SAFETENSORS: Final = ".safetensors"
_WEIGHTS: Final = (_SAFETENSORS, ".bin", ".pt", ".pth", ".gguf", ".tensors")
#: What vLLM reads besides: code, and settings other than ``config.json``, which it has made its configuration of.
_CODE: Final = ".py"
_SETTINGS: Final = "_config.json"
_OTHER_SETTINGS: Final = ("generation_config.json", "tokenizer_config.json")
#: Up to this a tensor is read whole: norms, biases, scales.
_SMALL_BYTES: Final = 64 << 10
#: Of a larger one a page at its begin, one at its end, and more in between: several of each of many experts in one tensor.
_PAGE_BYTES: Final = 4 << 10
_STRIDE_BYTES: Final = 4 << 20
#: In the names of embeddings, of which the rows of a few tokens may be all that was trained.
_EMBEDDINGS: Final = ("emb", "wte")
#: The bound of the format itself.
_MAX_HEADER_BYTES: Final = 100_000_000
_READ_BYTES: Final = 1 << 20
#: Files read at a time: they are waited for, or hashed without Python's lock.
_THREADS: Final = 8

#: Where bytes lie in a file: their begin, and their end.
_Stretch = tuple[int, int]


class _Tensor(msgspec.Struct):
    """Of an entry in a safetensors header, what counts here; offsets begin behind the header."""

    data_offsets: tuple[int, int]


def weights_digest(path: Path) -> str:
    """A digest of the weights at ``path``, a file or a directory; empty when there are none. Raises ``OSError``.

    Of a directory: the weights that lie directly in it (all its files, if none looks like weights), and code and settings beside
    them. ``docs/vllm.md`` says what of a file is read.
    """
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    weights = [file for file in files if file.suffix in _WEIGHTS] or files
    if not weights:
        return ""
    # vLLM takes no others where there are some of these.
    rest = "sampled" if any(file.suffix == _SAFETENSORS for file in weights) else "whole"
    beside = [file for file in files if file not in weights and _decides_computation(file)]
    with ThreadPoolExecutor(_THREADS, "vcache-weights") as threads:
        digests = [
            *threads.map(partial(_file_digest, otherwise=rest), weights),
            *threads.map(partial(_file_digest, otherwise="whole"), beside),
        ]
    whole = hashlib.sha256()
    for file, digest in zip(weights + beside, digests, strict=True):
        whole.update(f"{file.name}\0".encode() + digest)
    return f"weights:{whole.hexdigest()}"


def _decides_computation(file: Path) -> bool:
    return file.suffix == _CODE or (file.name.endswith(_SETTINGS) and file.name not in _OTHER_SETTINGS)


def _file_digest(file: Path, otherwise: str) -> bytes:
    """``otherwise``: how a file is read whose tensors are not known, "whole" or "sampled"."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as data:
        if file.suffix == _SAFETENSORS:
            stretches = _of_tensors(data, size) or [(0, size)]
        else:
            stretches = [(0, size)] if otherwise == "whole" else _pages(0, size)
        for begin, end in stretches:
            data.seek(begin)
            while begin < end and (piece := data.read(min(end - begin, _READ_BYTES))):
                digest.update(piece)
                begin += len(piece)
    return digest.digest()


def _of_tensors(data: BinaryIO, size: int) -> list[_Stretch]:
    """What is read of a safetensors file; nothing when it is none: its tensors are to fill it, without overlap or gap."""
    header_bytes = int.from_bytes(data.read(8), "little")
    begin = 8 + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or begin > size:
        return []
    try:
        entries = msgspec.json.decode(data.read(header_bytes), type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        found = [(msgspec.json.decode(entry, type=_Tensor).data_offsets, name) for name, entry in entries.items()]
    except (ValueError, RecursionError):
        return []
    stretches, filled = [(0, begin)], 0
    for (first, last), name in sorted(found):
        if not filled == first <= last <= size - begin:
            return []
        filled = last
        stretches += _of_tensor(name, begin + first, begin + last)
    return stretches if begin + filled == size else []


def _of_tensor(name: str, begin: int, end: int) -> list[_Stretch]:
    return [(begin, end)] if any(part in name.lower() for part in _EMBEDDINGS) else _pages(begin, end)


def _pages(begin: int, end: int) -> list[_Stretch]:
    """All of it if it is small; else pages at even distances, the first at its begin and the last at its end."""
    nbytes = end - begin
    if nbytes <= _SMALL_BYTES:
        return [(begin, end)]
    steps = max(2, -(-nbytes // _STRIDE_BYTES))
    starts = (begin + (nbytes - _PAGE_BYTES) * step // steps for step in range(steps + 1))
    return [(start, start + _PAGE_BYTES) for start in starts]
