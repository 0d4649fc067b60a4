"""The engine's KV tensors against the model's description, mapped once per set of tensors and forgotten with them."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import torch

from vcache.block_axis import named_tensors
from vcache.keys import ModelSpec
from vcache.paged_kv import KVCaches, KVExpectation, PagedKV

logger = logging.getLogger("vcache.engine")

#: Identity of a set of tensors: how they are nested, and each one's object and address.
_Identity = tuple[object, ...]

_DTYPES: Final = {
    "half": torch.float16,
    "float": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


class KVTensors:
    """The ``PagedKV`` of each set of tensors that calls bring along. Thread-safe.

    A set is known by its tensor objects, which it does not keep alive: the mapping goes when one of them does. The
    registered set is kept.
    """

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._known: dict[_Identity, tuple[PagedKV, list[weakref.ref[torch.Tensor]]]] = {}
        self._registered: PagedKV | None = None
        self._kept: KVCaches | PagedKV | None = None

    def register(self, kv_caches: KVCaches | PagedKV) -> PagedKV:
        """Makes these the tensors of every call that names none. ``ValueError`` says which tensor does not fit, and why."""
        kv = self.mapped(kv_caches, argument="kv_caches")
        with self._lock:
            self._registered, self._kept = kv, kv_caches
        return kv

    def mapped(self, kvcaches: KVCaches | PagedKV | None, *, argument: str = "kvcaches") -> PagedKV:
        """The mapping of these tensors, or of the registered ones. ``ValueError`` as in ``register``.

        ``argument``: what the caller calls them.
        """
        if isinstance(kvcaches, PagedKV):
            _check_mapped(kvcaches, self._model, argument)
            return kvcaches
        if kvcaches is None:
            if self._registered is None:
                raise ValueError("kvcaches must be given: no KV tensors were registered")
            return self._registered
        tensors = list(_tensors(kvcaches))
        identity = (*_nesting(kvcaches), *((id(tensor), tensor.data_ptr()) for tensor in tensors))
        with self._lock:
            known = self._known.get(identity)
            if known is not None and all(
                ref() is tensor for ref, tensor in zip(known[1], tensors, strict=True)
            ):  # an id alone may by now be another object's
                return known[0]
        expected = expectation(self._model)
        kv = PagedKV(kvcaches, block_size=self._model.block_size, expect=expected, argument=argument)
        _check_dtypes(kvcaches, self._model, argument)
        forget = partial(_forget, weakref.ref(self), identity)
        with self._lock:
            self._known[identity] = (kv, [weakref.ref(tensor, forget) for tensor in tensors])
        logger.info("mapped KV tensors: %s", kv.describe())
        return kv

    @property
    def registered(self) -> PagedKV | None:
        return self._registered

    def clear(self) -> None:
        """Lets go of all mappings and all tensors; arguments are still checked against the form of the registered ones."""
        with self._lock:
            self._known.clear()
            self._kept = None
            if self._registered is not None:
                self._registered = self._registered.without_memory()


def _forget(owner: weakref.ref[KVTensors], identity: _Identity, _: object) -> None:
    tensors = owner()
    if tensors is not None:
        # No lock: this runs whenever a tensor dies, be it in a thread that holds it. One dict operation is atomic.
        tensors._known.pop(identity, None)


def _tensors(kvcaches: object) -> Iterator[torch.Tensor]:
    """Every dense tensor in order; anything else is left for ``PagedKV`` to name."""
    entries: Iterable[object] = ()
    if isinstance(kvcaches, torch.Tensor):
        entries = (kvcaches,)
    elif isinstance(kvcaches, Mapping):
        entries = kvcaches.values()
    elif isinstance(kvcaches, Sequence):
        entries = kvcaches
    for entry in entries:
        parts = entry if isinstance(entry, (tuple, list)) else (entry,)
        yield from (part for part in parts if isinstance(part, torch.Tensor) and part.layout == torch.strided)


def _nesting(kvcaches: object) -> tuple[object, ...]:
    """What besides the tensors decides how they are read: one whole, or layers of so many parts each."""
    if isinstance(kvcaches, torch.Tensor):
        return ("whole",)
    entries = kvcaches.values() if isinstance(kvcaches, Mapping) else kvcaches
    if not isinstance(entries, Iterable):
        return ()
    return tuple(len(entry) if isinstance(entry, (tuple, list)) else 1 for entry in entries)


def _check_mapped(kv: PagedKV, model: ModelSpec, argument: str) -> None:
    """Refuses a mapping made elsewhere whose blocks are not the model's."""
    if kv.block_size != model.block_size:
        raise ValueError(
            f"{argument} was mapped with blocks of {kv.block_size} tokens, the model description says {model.block_size}"
        )
    promised = promised_payload_bytes(model) // model.blocks_per_chunk
    if promised and kv.block_bytes != promised:
        raise ValueError(
            f"{argument} has {kv.block_bytes} bytes a block in all; by the model description it should have {promised}"
        )


def promised_payload_bytes(model: ModelSpec) -> int:
    """One shard's bytes as the model's description has them; 0 where it leaves them open."""
    expected = expectation(model)
    return (expected.num_layers or 0) * (expected.layer_block_bytes or 0) * model.blocks_per_chunk


def expectation(model: ModelSpec) -> KVExpectation:
    """What the model says of one rank's tensors.

    The bytes of a block are left open for layouts whose name starts with "opaque", and layers under pipeline parallelism,
    where engines divide them as they like.
    """
    layers = model.num_layers if model.pipeline_parallel_size == 1 else None
    dtype = cache_dtype(model)
    if dtype is None or model.kv_layout.startswith("opaque"):
        return KVExpectation(layers)
    heads = max(1, model.num_kv_heads // model.tensor_parallel_size)
    halves = 1 if model.kv_layout.startswith("MLA") else 2
    return KVExpectation(layers, halves * heads * model.head_size * model.block_size * dtype.itemsize)


def cache_dtype(model: ModelSpec) -> torch.dtype | None:
    """The dtype that the model's description names for its cache, or None when torch has none of that name."""
    name = model.dtype if model.kv_cache_dtype == "auto" else model.kv_cache_dtype
    name = name.removeprefix("torch.")
    found = _DTYPES.get(name) or getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _check_dtypes(kvcaches: KVCaches, model: ModelSpec, argument: str) -> None:
    """Refuses tensors of another dtype than the model's. Raw bytes (uint8, int8) may hold any: engines keep FP8 so."""
    dtype = cache_dtype(model)
    if dtype is None:
        return
    for item in named_tensors(kvcaches, KVExpectation(), argument=argument):
        raw = dtype.itemsize == 1 and item.tensor.dtype in (torch.uint8, torch.int8)
        if item.tensor.dtype != dtype and not raw:
            raise ValueError(f"{item.name} is {item.tensor.dtype}; by the model description it should be {dtype}")
