"""KV events of the pool, for routers that send a request where its prefix is: medium ``VCACHE``.

A chunk is announced as vLLM announces its own blocks (their hashes, tokens and parent), once it is committed. The pool does not
say when it evicts: a chunk announced here is taken back when a lookup finds it gone, or when the pool is cleared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from vcache.keys import ChunkKey

MEDIUM: Final = "VCACHE"
#: Chunks remembered, the last ones used: beyond, their end is not announced.
MOST_REMEMBERED: Final = 65_536


class PoolEvents:
    """What was announced, and what is to be."""

    def __init__(self, *, chunk_size: int, block_size: int) -> None:
        self._chunk_size = chunk_size
        self._block_size = block_size
        self._per_chunk = chunk_size // block_size
        self._planned: OrderedDict[ChunkKey, BlockStored] = OrderedDict()
        self._announced: OrderedDict[ChunkKey, list[Any]] = OrderedDict()
        self._events: list[KVCacheEvent] = []

    def planned(self, request: Any, keys: Sequence[ChunkKey], first: int) -> None:
        """Chunks ``first`` and following of a request were ordered to be stored."""
        hashes = request.block_hashes
        for chunk, key in enumerate(keys, first):
            start, end = chunk * self._per_chunk, (chunk + 1) * self._per_chunk
            if end > len(hashes):
                return
            lora = request.lora_request
            self._planned[key] = BlockStored(
                block_hashes=[maybe_convert_block_hash(value) for value in hashes[start:end]],
                parent_block_hash=maybe_convert_block_hash(hashes[start - 1]) if start else None,
                token_ids=list(request.all_token_ids[chunk * self._chunk_size : (chunk + 1) * self._chunk_size]),
                block_size=self._block_size,
                lora_id=lora.adapter_id if lora is not None else None,
                medium=MEDIUM,
                lora_name=lora.name if lora is not None else None,
            )
        _shorten(self._planned)

    def stored(self, keys: Iterable[ChunkKey]) -> None:
        """These are in the pool now."""
        for key in keys:
            event = self._planned.pop(key, None)
            if event is not None:
                self._announced[key] = event.block_hashes
                self._events.append(event)
        _shorten(self._announced)

    def gone(self, keys: Iterable[ChunkKey]) -> None:
        """A lookup did not find these."""
        hashes = [value for key in keys for value in self._announced.pop(key, ())]
        if hashes:
            self._events.append(BlockRemoved(block_hashes=hashes, medium=MEDIUM))

    def cleared(self) -> None:
        """Nothing is in the pool any more."""
        self._planned.clear()
        self.gone(list(self._announced))

    def take(self) -> list[KVCacheEvent]:
        taken, self._events = self._events, []
        return taken


def _shorten(remembered: OrderedDict[ChunkKey, Any]) -> None:
    while len(remembered) > MOST_REMEMBERED:
        remembered.popitem(last=False)
