"""VCacheEngine: the public API. Tokens, masks and slots in; hits, stored chunks and loaded blocks out.

Bad arguments raise ``ValueError`` naming the argument, and nothing is stored. Everything else that can go wrong (no server, a
dead donor, a full pool) is a miss, a counter and a line in the log. Not here: moving chunks by key and block
(``block_cache.py``), the pool, the copies.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from vcache.arguments import (
    check_distinct,
    check_key,
    check_keys,
    checked_blocks,
    checked_seconds,
    pin_seconds,
)
from vcache.block_cache import BlockCache
from vcache.chunk_plan import plan_chunks
from vcache.completions import Completions
from vcache.config import DEFAULT_ORIGIN, VCacheConfig
from vcache.construction import await_pool, check_construction, device_of
from vcache.devices import device_name
from vcache.donation import donation_bytes, open_donation
from vcache.keys import ChunkKey, ModelSpec, chunk_keys, parse_key, tenant_of
from vcache.kv_tensors import KVTensors, promised_payload_bytes
from vcache.log import configure
from vcache.moving_up import MovesUp
from vcache.pending import KeyHits, PendingRetrieve, PendingStore
from vcache.pool.client import PoolClient
from vcache.prefetch import PrefetchHandle
from vcache.promotion import Promotion
from vcache.stats import Counters, StatsValue
from vcache.store_tier import StoreTier, open_store_tier

if TYPE_CHECKING:
    from vcache.arguments import Mask
    from vcache.paged_kv import KVCaches, PagedKV
    from vcache.pool.donor import Donor
    from vcache.tokens import Tokens

logger = logging.getLogger("vcache.engine")

Int64Array = npt.NDArray[np.int64]
#: How long ``close`` waits for calls under way, and for readers of a donated segment.
CLOSE_TIMEOUT_S: Final = 10.0
#: How long ``flush`` waits unless told.
FLUSH_TIMEOUT_S: Final = 60.0
#: What a removal answers that was not confirmed.
UNCONFIRMED: Final = -1


class VCacheEngine:
    """Stores, finds and loads a serving process's KV by its tokens.

    A *worker* owns KV tensors and moves chunks; with ``donate`` it also gives memory of its device to the pool. A
    *scheduler* only looks things up: it touches no device and maps no segment. Thread-safe; a context manager.
    """

    def __init__(
        self,
        config: VCacheConfig | None = None,
        *,
        model: ModelSpec,
        role: Literal["worker", "scheduler"] = "worker",
        rank: int = 0,
        device: str | torch.device | None = None,
        kv_caches: KVCaches | PagedKV | None = None,
        donate: int | str | None = None,
    ) -> None:
        """Waits at most ``client.connect_timeout`` for the server, then works as an empty cache until it is there.

        rank: of ``model.ranks``, this process's part of every chunk.
        device: of the KV tensors (default: that of ``kv_caches``, else the current GPU, else host memory).
        kv_caches: the tensors of calls that name none (also: ``register_kv_caches``).
        donate: bytes of the device to give to the pool for this engine's life ("8GiB"; "auto": ``segment.size``).

        Raises ``ConfigError`` or ``ValueError`` for a configuration or tensors that cannot work, ``CapacityError`` when there
        is not as much memory as ``donate`` asks for, ``UnavailableError`` when that of the GPU cannot be shared, or a process
        that is suspended holds the runtime directory's lock.
        """
        self.config = config if config is not None else VCacheConfig.load()
        self.model = model
        self.role = role
        self.rank = rank
        check_construction(self.config, model, role, rank, device=device, kv_caches=kv_caches, donate=donate)
        if self.config.origin("log_level") != DEFAULT_ORIGIN:  # otherwise the application's logging is left alone
            configure(self.config.log_level, f"{role} {rank}")
        self._kv = KVTensors(model)
        kv = self._kv.register(kv_caches) if kv_caches is not None else None
        where = device_of(device, kv) if role == "worker" else None
        donated_bytes = donation_bytes(self.config, donate) if donate is not None else 0
        self._client = PoolClient(
            self.config,
            device=device_name(where) if where is not None else "",
            writes=role == "worker",
            name=f"{role} {rank}/{model.ranks} pid {os.getpid()}",
        )
        self._donor: Donor | None = None
        self._below: StoreTier | None = None
        self._promotion: Promotion | None = None
        counters = Counters()
        try:
            self._below = open_store_tier(
                self.config, self._client, model, rank=rank, moves=role == "worker", counters=counters
            )
        except BaseException:
            self._client.close()
            raise
        if where is not None:
            moves = MovesUp(self._client, self._below.store if self._below is not None else None, model, rank)
            self._promotion = Promotion(moves, self.config.promotion, device=where)
        self._completions = Completions(where) if where is not None and where.type == "cuda" else None
        self._cache = BlockCache(
            self._client,
            self._below,
            self._promotion,
            model=model,
            rank=rank,
            counters=counters,
            completions=self._completions,
        )
        self._closing = threading.Lock()
        try:
            if donated_bytes and where is not None:
                self._donor = open_donation(
                    self.config,
                    self._client,
                    model,
                    device=where,
                    nbytes=donated_bytes,
                    payload_bytes=self._payload_bytes(),
                )
        except BaseException:
            self.close(0.0)
            raise
        await_pool(self.config, self._client, self._donor)

    # --- the five calls ---------------------------------------------------------------------------------------------

    def lookup(
        self, tokens: Tokens, *, salt: str = "", pin: float = 0.0, extra_keys: Sequence[str | bytes] = ()
    ) -> int:
        """Leading tokens present with all ranks' shards, in the pool or going on in the store; whole chunks.

        ``pin``: seconds for which the chunks found in the pool are kept from eviction.
        """
        keys = self.keys_of(tokens, salt=salt, extra_keys=extra_keys)
        return self._cache.lookup(keys, pin_s=pin_seconds(pin)).hits * self.model.chunk_size

    def store(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        kvcaches: KVCaches | PagedKV | None = None,
        slot_mapping: torch.Tensor | npt.NDArray[Any] | None = None,
        offset: int = 0,
        *,
        salt: str = "",
        pin: float = 0.0,
        extra_keys: Sequence[str | bytes] = (),
    ) -> None:
        """Stores the whole chunks of ``tokens`` that the pool has not, as far as there is room for them.

        mask: bool, one per token, true where a token is to be stored; false only on a leading run of whole chunks, which
            are taken to be stored already. Default: true from ``offset`` on.
        kvcaches: the tensors that hold the KV (default: the registered ones).
        slot_mapping: integers; ``slot_mapping[i]`` is the slot of token ``offset + i``, up to the last token. Each block's
            slots are whole and in order.
        pin: seconds for which the chunks are kept from eviction.

        When it returns the bytes are copied and committed, and readers find them as soon as the server has read its mail. On a GPU
        it only enqueues, on the current stream: what that stream does next may change the blocks, and readers find the chunks once
        the device has copied them. This engine's other calls wait for that; so does ``flush``.
        """
        kv = self._kv_of(kvcaches)
        keys = self.keys_of(tokens, salt=salt, extra_keys=extra_keys)
        plan = plan_chunks(self.model, kv, keys, len(tokens), mask=mask, slot_mapping=slot_mapping, offset=offset)
        pending = self._cache.reserve_store(
            kv, plan.keys, parent=plan.parent, tenant=tenant_of(salt), pin_s=pin_seconds(pin)
        )
        pending.copy_from(plan.block_ids)
        self._cache.end_store(pending)

    def retrieve(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        kvcaches: KVCaches | PagedKV | None = None,
        slot_mapping: torch.Tensor | npt.NDArray[Any] | None = None,
        *,
        salt: str = "",
        pin: float = 0.0,
        extra_keys: Sequence[str | bytes] = (),
    ) -> torch.Tensor:
        """Loads the leading run of chunks that are there; bool ``[len(tokens)]``, true for the tokens this call loaded.

        mask: bool, one per token, true where a token is wanted; false only on a leading run of whole chunks, whose KV the
            caller has already (they stay false in the result). Default: all true.
        kvcaches, slot_mapping: as for ``store``, with ``slot_mapping[i]`` the slot of token ``i``. No block twice.
        pin: seconds for which the chunks loaded are kept from eviction.

        A chunk that changed while it was read ends the run. The result is in host memory. Blocks of tokens that are false
        in it may have been overwritten.
        """
        kv = self._kv_of(kvcaches)
        keys = self.keys_of(tokens, salt=salt, extra_keys=extra_keys)
        plan = plan_chunks(self.model, kv, keys, len(tokens), mask=mask, slot_mapping=slot_mapping, offset=0)
        check_distinct("slot_mapping", plan.block_ids)
        pin_s = pin_seconds(pin)
        pending = self._cache.begin_retrieve(kv, plan.keys, plan.block_ids, parent=plan.parent, tenant=tenant_of(salt))
        chunks = pending.complete()
        if pin_s and chunks:
            self._cache.pin(plan.keys[:chunks], pin_s)
        loaded = np.zeros(len(tokens), dtype=np.bool_)
        loaded[plan.skipped_tokens : plan.skipped_tokens + chunks * self.model.chunk_size] = True
        return torch.from_numpy(loaded)

    def prefetch(
        self,
        tokens: Tokens,
        kvcaches: KVCaches | PagedKV | None = None,
        *,
        salt: str = "",
        extra_keys: Sequence[str | bytes] = (),
    ) -> PrefetchHandle:
        """Begins to bring this rank's part of a prompt from the store into the pool, where the pool's run of it ends.

        kvcaches: tensors of the form that will be loaded into (default: the registered ones); they are not touched.

        In the background, a few chunks at a time; the handle can be waited for, awaited or cancelled.
        """
        kv = self._kv_of(kvcaches)
        keys = self.keys_of(tokens, salt=salt, extra_keys=extra_keys)
        return self._cache.prefetch(kv, keys, parent=None, tenant=tenant_of(salt))

    def contains(self, cache_key: ChunkKey | bytes | str) -> int:
        """Where a chunk is: 0 in the pool, 1 in the store, -1 nowhere. Takes a key or its text form."""
        if isinstance(cache_key, str):
            cache_key = parse_key(cache_key)
        check_key("cache_key", cache_key)
        return self._cache.contains(ChunkKey(cache_key))

    def get_stats(self) -> dict[str, StatsValue]:
        """Counters of this engine and the server's state; every key is in ``docs/python-api.md``."""
        return self._cache.stats()

    # --- for integrations, by key and block --------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: KVCaches | PagedKV) -> PagedKV:
        """Makes these the tensors of calls that name none. ``ValueError`` says which does not fit the model, and why."""
        self._needs_worker("register_kv_caches")
        return self._kv.register(kv_caches)

    def keys_of(self, tokens: Tokens, *, salt: str = "", extra_keys: Sequence[str | bytes] = ()) -> list[ChunkKey]:
        """Keys of the whole chunks of ``tokens``."""
        return chunk_keys(
            tokens,
            chunk_size=self.model.chunk_size,
            fingerprint=self.model.fingerprint(),
            salt=salt,
            extra_keys=extra_keys,
        )

    def lookup_keys(self, keys: Sequence[ChunkKey], lease_s: float = 0.0, *, waits: bool = True) -> KeyHits:
        """As ``lookup``; with ``lease_s`` those in the pool cannot be evicted for so long (``release`` ends it).

        waits: for the server to grant the lease. Otherwise, where the server is on this host, what is there is read from shared
            memory and the lease asked for behind it: no round trip, and what is evicted before the server reads of it is a
            miss of whoever loads it.
        """
        check_keys("keys", keys)
        return self._cache.lookup(keys, lease_s=checked_seconds("lease_s", lease_s), waits=waits)

    def release(self, lease: int) -> None:
        """Ends a lease of ``lookup_keys``. Asynchronous; 0 and leases that ran out are harmless."""
        self._cache.release(lease)

    def begin_store(
        self,
        keys: Sequence[ChunkKey],
        block_ids: npt.ArrayLike,
        parent: ChunkKey | None = None,
        *,
        salt: str = "",
        pin: float = 0.0,
    ) -> PendingStore:
        """Starts to store chunks from the registered tensors: ``block_ids`` is ``[len(keys), blocks per chunk]``.

        ``keys`` are consecutive chunks of a prompt, ``parent`` the key before them (None at its start). On a GPU this only
        enqueues on the current stream. The blocks must not change until ``complete``, which must be called.
        """
        _, blocks = self._blocks_of(keys, block_ids)
        pending = self.reserve_store(keys, parent, salt=salt, pin=pin)
        pending.copy_from(blocks)
        return pending

    def reserve_store(
        self, keys: Sequence[ChunkKey], parent: ChunkKey | None = None, *, salt: str = "", pin: float = 0.0
    ) -> PendingStore:
        """The part of ``begin_store`` that asks the server; its result's ``copy_from`` is the part that does not."""
        check_keys("keys", keys)
        if parent is not None:
            check_key("parent", parent)
        kv, tenant, pin_s = self._kv_of(None), tenant_of(salt), pin_seconds(pin)
        return self._cache.reserve_store(kv, keys, parent=parent, tenant=tenant, pin_s=pin_s)

    def begin_retrieve(
        self, keys: Sequence[ChunkKey], block_ids: npt.ArrayLike, parent: ChunkKey | None = None, *, salt: str = ""
    ) -> PendingRetrieve:
        """Starts to load the leading run of ``keys`` that is there into blocks of the registered tensors.

        ``parent``, ``salt``: as they were stored with; a chunk that is promoted is filed under them.

        On a GPU this only enqueues on the current stream. The blocks hold nothing one may use until ``complete``, which
        must be called, has said how many leading chunks are valid.
        """
        kv, blocks = self._blocks_of(keys, block_ids)
        check_distinct("block_ids", blocks)
        if parent is not None:
            check_key("parent", parent)
        return self._cache.begin_retrieve(kv, keys, blocks, parent=parent, tenant=tenant_of(salt))

    def prefetch_keys(
        self, keys: Sequence[ChunkKey], parent: ChunkKey | None = None, *, salt: str = ""
    ) -> PrefetchHandle:
        """As ``prefetch``, for consecutive chunks after ``parent`` and the registered tensors."""
        check_keys("keys", keys)
        if parent is not None:
            check_key("parent", parent)
        return self._cache.prefetch(self._kv_of(None), keys, parent=parent, tenant=tenant_of(salt))

    def pin_keys(self, keys: Sequence[ChunkKey], pin_s: float) -> int:
        """Keeps present chunks from eviction for ``pin_s`` seconds; how many."""
        check_keys("keys", keys)
        return self._cache.pin(keys, checked_seconds("pin_s", pin_s))

    def unpin_keys(self, keys: Sequence[ChunkKey]) -> int:
        """Ends pins before their time; how many."""
        check_keys("keys", keys)
        return self._cache.unpin(keys)

    def remove_keys(self, keys: Sequence[ChunkKey]) -> int:
        """Removes chunks from the pool and the store; how many the pool had. Removed from the pool means gone.

        Waits for stores of them that are under way, the caller's own among them; what those store is not found.
        -1: the server or the store did not confirm it in time, so some may still be there. What another process is writing to
        the store, or promoting from it, at the moment may appear after.
        """
        check_keys("keys", keys)
        removed = self._cache.remove(keys)
        return UNCONFIRMED if removed is None else removed

    def clear(self, *, salt: str | None = None) -> int:
        """Removes every chunk of the tenant that ``salt`` names, or (None) of all, from the pool; how many.

        Waits for stores as ``remove_keys`` does. -1: the server did not confirm it in time. The store keeps what it has.
        """
        removed = self._cache.clear(None if salt is None else tenant_of(salt))
        return UNCONFIRMED if removed is None else removed

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """A barrier behind what was stored before: when it returns true, any other client finds that in the pool, and the
        store below has it or it was dropped. False: the server did not answer, or the store was not done in time.
        """
        return self._cache.flush(checked_seconds("timeout_s", timeout_s))

    # --- life --------------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Waits for calls under way, writes to the store and readers of the donated segment, then lets go of everything.

        The calls may take half of the time, the writes half of what is left then. Afterwards the engine is an empty cache. Where
        a call has not ended by then (a store that was begun and never completed is one), the session and what it has mapped
        stay, until this is called again or the process ends. Twice is harmless.
        """
        deadline = time.monotonic() + checked_seconds("timeout_s", timeout_s)
        are_over = self._cache.close(timeout_s / 2)
        with self._closing:
            self._hand_back(max(0.0, deadline - time.monotonic()))
            if are_over:  # until then leases must last, and memory stay where a copy may be at work
                self._client.close()
                self._kv.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- beneath -----------------------------------------------------------------------------------------------------

    def _payload_bytes(self) -> int:
        """One shard's bytes, or 0 while nothing says so."""
        kv = self._kv.registered
        return kv.payload_bytes(self.model.blocks_per_chunk) if kv is not None else promised_payload_bytes(self.model)

    def _hand_back(self, timeout_s: float) -> None:
        """Ends everything beside the session. Calls still under way find what they use closed, not gone. Twice is harmless."""
        deadline = time.monotonic() + timeout_s
        if self._completions is not None:
            self._completions.close()
        if self._promotion is not None:
            self._promotion.close(timeout_s / 4)
        if self._below is not None:  # before the client: it reads what it writes from the pool
            self._below.close(timeout_s / 2)
        if self._donor is not None:
            self._donor.close(max(0.0, deadline - time.monotonic()))

    def _needs_worker(self, call: str) -> None:
        if self.role != "worker":
            raise ValueError(f"{call} needs role='worker': a scheduler has no KV tensors")

    def _kv_of(self, kvcaches: KVCaches | PagedKV | None) -> PagedKV:
        self._needs_worker("moving chunks")
        return self._kv.mapped(kvcaches)

    def _blocks_of(self, keys: Sequence[ChunkKey], block_ids: npt.ArrayLike) -> tuple[PagedKV, Int64Array]:
        check_keys("keys", keys)
        kv = self._kv_of(None)
        per_chunk = self.model.blocks_per_chunk
        return kv, checked_blocks(block_ids, chunks=len(keys), per_chunk=per_chunk, num_blocks=kv.num_blocks)
