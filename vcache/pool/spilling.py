"""A donor's way to the store below: payloads of its segment written there before they are evicted (``store.write_policy: evicted``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vcache.errors import ConfigError, VCacheError
from vcache.failures import FailureLog
from vcache.pool.victims import Victim, still_valid

if TYPE_CHECKING:
    from vcache.config import VCacheConfig
    from vcache.pool.segment import Segment
    from vcache.store.base import Shard
    from vcache.store.guard import GuardedStore

logger = logging.getLogger(__name__)

#: How long a round waits for staging memory that an overdue write still holds.
_PATIENCE_S: Final = 1.0


def open_spiller(config: VCacheConfig) -> Spiller | None:
    """For a donor that the configuration tells to write to a store; ``None`` for others. The store itself is opened by the
    first order: until then it costs nothing."""
    is_told = config.store.write_policy == "evicted" and config.store.resolved_kind != "none"
    return Spiller(config) if is_told else None


class Spiller:
    """Owns a store. For one thread, except ``close``. Nothing here raises because the store is away."""

    def __init__(self, config: VCacheConfig) -> None:
        self._config = config
        self._store: GuardedStore | None = None
        self._is_refused = False
        self._failures = FailureLog(logger)

    def spill(self, segment: Segment, victims: Sequence[Victim]) -> set[int]:
        """Writes payloads of ``segment``; the generations of those that the store has now, whole."""
        store = self._open()
        if store is None or not store.available:
            return set()
        from vcache.store.base import Shard

        shards = [Shard(victim.key, victim.rank, victim.ranks, victim.layout) for victim in victims]
        present = store.contains(shards)
        done = {victim.generation for victim, there in zip(victims, present, strict=True) if there}
        missing = [index for index, there in enumerate(present) if not there]
        while missing:
            count = self._write(
                store, segment, [victims[index] for index in missing], [shards[index] for index in missing], done
            )
            if not count:
                break
            missing = missing[count:]
        return done

    def close(self, timeout_s: float) -> None:
        """Harmless when called twice."""
        if self._store is not None:
            self._store.close(timeout_s)

    def _open(self) -> GuardedStore | None:
        if self._store is None and not self._is_refused:
            from vcache.store import open_store  # loads torch

            try:
                self._store = open_store(self._config.store)
            except ConfigError as error:  # no later attempt does better
                self._is_refused = True
                logger.warning(
                    "what is evicted is lost, not written to the store, until this process is started anew: %s",
                    str(error),  # a record that a handler keeps would keep the error, and that the staging memory
                )
            except VCacheError as error:
                self._failures.record("open the store", error)
        return self._store

    def _write(
        self,
        store: GuardedStore,
        segment: Segment,
        victims: Sequence[Victim],
        shards: Sequence[Shard],
        done: set[int],
    ) -> int:
        """Writes the first few of ``victims``, as many as staging memory takes; how many were dealt with."""
        from vcache.store.base import Put

        blocks = store.staging.take([victim.nbytes for victim in victims], wait_s=_PATIENCE_S)
        chosen = victims[: len(blocks)]
        try:
            for victim, block in zip(chosen, blocks, strict=True):
                block.tensor.copy_(segment.tensor[victim.offset : victim.offset + victim.nbytes])
            valid = still_valid(segment, chosen).tolist()
        except BaseException:
            for block in blocks:
                block.release()
            raise
        kept = []
        for victim, shard, block, whole in zip(chosen, shards, blocks, valid, strict=False):
            if whole:
                kept.append((victim, shard, block))
            else:
                block.release()
        results = store.put_blocks([shard for _, shard, _ in kept], [block for _, _, block in kept])
        for (victim, _, _), put in zip(kept, results, strict=True):
            if put in (Put.STORED, Put.EXISTS):
                done.add(victim.generation)
        return len(blocks)
