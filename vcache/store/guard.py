"""The guard around a store: whatever the store does, its callers get an answer within the deadline and never an exception.

Own threads, a deadline per call, retries of what is transient, a circuit breaker with probes, counters. What it does not
do: decide what is worth storing, or know any kind of store.

Ownership. The store only ever sees blocks of staging memory that the guard took. When a call is overdue, its blocks stay
its own until it returns; the caller's memory was never lent out, so a late write cannot reach it.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from vcache.errors import CorruptionError
from vcache.failures import FailureLog
from vcache.in_flight import InFlight
from vcache.keys import ChunkKey
from vcache.protocol import KEY_BYTES
from vcache.store.base import Got, Put, Shard, Store
from vcache.store.breaker import Breaker, Circuit
from vcache.store.calls import Call, Ended, News, Workers
from vcache.store.loaded import Arrivals, Loaded

if TYPE_CHECKING:
    import torch

    from vcache.store.staging import Block, Staging
    from vcache.store_config import GuardConfig

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: No chunk has this key (it would be a SHA-256 of zeros). Asking for it costs a store what any lookup costs.
PROBE: Final = Shard(ChunkKey(bytes(KEY_BYTES)), 0)

#: What ``stats`` answers besides the store's own counters. ``docs/stores.md`` documents every name; a test keeps them equal.
GUARD_VALUES: Final = {
    "store_circuit": "closed: in use; open: skipped, being probed; half_open: one call at a time is let through",
    "store_available": "whether calls go through",
    "store_made_calls": "calls made to the store",
    "store_failed_calls": "of these, failed as a whole",
    "store_overdue_calls": "of these, given up on at their deadline",
    "store_skipped_calls": "calls not made: the circuit was open, or the guard closed",
    "store_unbegun_calls": "calls not made: all threads were busy until the deadline",
    "store_busy_threads": "calls now queued or running, hung ones included",
    "store_opened": "times the circuit opened",
    "store_probes": "probes of a store whose circuit was open",
    "store_retries": "calls repeated because what failed was transient",
    "store_no_staging": "shards not read or written because staging memory was full",
    "store_invalid": "objects whose header or checksum was wrong: missed, and removed",
    "store_failed_reads": "shards that the store may have but did not deliver",
    "store_full": "shards not written because the store was full",
    "store_failed_writes": "shards not written for any other reason",
}
_MOMENTARY: Final = frozenset({"store_circuit", "store_available", "store_busy_threads"})


class GuardedStore:
    """A ``Store`` that answers in time and raises nothing (programming errors in its arguments excepted). Thread-safe."""

    def __init__(self, store: Store, staging: Staging, config: GuardConfig, *, name: str) -> None:
        """Takes ``store`` and ``staging`` over: ``close`` ends both."""
        self._store = store
        self.staging: Final = staging
        self._config = config
        self.name: Final = name
        self._lock = threading.Lock()
        self._counts = {name: 0 for name in GUARD_VALUES if name not in _MOMENTARY}
        self._breaker = Breaker(
            failures=config.failures, first_delay_s=config.probe_interval, longest_delay_s=config.max_probe_interval
        )
        self._opened_at = 0.0
        self._prober: threading.Thread | None = None
        self._closing = threading.Event()
        self._inside = InFlight()
        # Writes have threads of their own, so that a store that is slow to write does not keep readers waiting.
        self._readers = Workers(f"vcache-{name}-read", config.threads)
        self._writers = Workers(f"vcache-{name}-write", config.write_threads)
        self._failures = FailureLog(logger)

    @property
    def write_timeout_s(self) -> float:
        """The deadline of a write."""
        return self._config.write_timeout

    @property
    def available(self) -> bool:
        """Whether a call would go through now. Without a lock: for a quick look before preparing a call."""
        return self._breaker.circuit is not Circuit.OPEN and not self._closing.is_set()

    def contains(self, shards: Sequence[Shard]) -> Sequence[bool]:
        """As ``Store.contains``; nothing is there when the store does not answer in time."""
        if not shards:
            return []
        with self._entered() as entered:
            work = partial(_one_each, shards, self._store.contains)
            answer = self._call("contains", self._readers, work) if entered else None
        return answer or [False] * len(shards)

    def load(
        self,
        shards: Sequence[Shard],
        sizes: Sequence[int],
        *,
        patience_s: float = 0.0,
        arrived: Callable[[Loaded], None] | None = None,
    ) -> Loaded:
        """Reads shards whose payloads have ``sizes`` into staging memory, without a further copy.

        ``patience_s``: for what nobody waits for. Such a call waits so long for staging memory, and uses the threads of
        the writes, so that it keeps no reader waiting.

        ``arrived`` is called in between, with what this will return: some more of it are loaded, and may be used until
        it returns. Those buffers may be gone afterwards, since the call as a whole can still be overdue. What it raises is
        raised here, when the store is done.
        """
        with self._entered() as entered:
            if not entered or not self.available:
                self._count(store_skipped_calls=1)
                return Loaded([Got.FAILED] * len(shards), [None] * len(shards))
            blocks: list[Block | None] = [*self.staging.take(sizes, wait_s=patience_s)]
            self._count(store_no_staging=len(shards) - len(blocks))
            loaded = Loaded([Got.FAILED] * len(blocks), blocks)
            arrivals = Arrivals(loaded, arrived) if arrived is not None else None
            self._read(shards[: len(blocks)], loaded, self._writers if patience_s else self._readers, arrivals)
        if arrivals is not None and arrivals.error is not None:
            loaded.release()
            raise arrivals.error
        return loaded

    def get_into(self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Got]:
        """As ``Store.get_into``, by way of staging memory; in several rounds when that is small. The deadline is each round's."""
        results: list[Got] = []
        while len(results) < len(shards):
            first = len(results)
            with self.load(shards[first:], [buffer.nbytes for buffer in buffers[first:]]) as loaded:
                for index, got in enumerate(loaded.results):
                    if got is Got.LOADED:
                        buffers[first + index].copy_(loaded.buffer(index))
                results += loaded.results
                if (
                    not len(loaded) or Got.LOADED not in loaded.results
                ):  # no room, or no answer: more rounds would not help
                    results += [Got.FAILED] * (len(shards) - len(results))
        return results

    def put_from(self, shards: Sequence[Shard], buffers: Sequence[torch.Tensor]) -> Sequence[Put]:
        """As ``Store.put_from``; the buffers are copied first."""
        results: list[Put] = []
        while len(results) < len(shards):
            first = len(results)
            blocks = self.staging.take([buffer.nbytes for buffer in buffers[first:]])
            for block, buffer in zip(blocks, buffers[first:], strict=False):
                block.tensor.copy_(buffer)
            results += self.put_blocks(shards[first : first + len(blocks)], blocks)
            if not blocks:
                self._count(store_no_staging=len(shards) - len(results))
                results += [Put.FAILED] * (len(shards) - len(results))
        return results

    def put_blocks(self, shards: Sequence[Shard], blocks: Sequence[Block]) -> Sequence[Put]:
        """Stores the payloads in ``blocks``, of which this takes over the caller's hold, whatever happens."""
        if not shards:
            return []
        results = [Put.FAILED] * len(shards)
        left: list[int] = list(range(len(shards)))
        with self._entered() as entered:
            for attempt in range(self._config.retries + 1 if entered else 0):
                tried = self._put_once([shards[index] for index in left], [blocks[index] for index in left])
                for index, put in zip(left, tried, strict=True):
                    results[index] = put
                left = [index for index in left if results[index] is Put.FULL]
                if not left or attempt == self._config.retries or not self._pause(attempt):
                    break
                self._count(store_retries=1)
        for block in blocks:
            block.release()
        self._count(store_full=results.count(Put.FULL), store_failed_writes=results.count(Put.FAILED))
        return results

    def remove(self, shards: Sequence[Shard]) -> int | None:
        """As ``Store.remove``; ``None`` also when the store does not answer. A write given up on may still come after this."""
        if not shards:
            return 0
        timeout_s = self._config.write_timeout
        with self._entered() as entered:
            work = partial(self._store.remove, shards)
            return self._call("remove", self._writers, work, timeout_s=timeout_s) if entered else None

    def stats(self) -> dict[str, int | bool | str]:
        """``GUARD_VALUES``, and the store's own counters."""
        return {
            **self.counters(),
            "store_circuit": self._breaker.circuit.value,
            "store_available": self.available,
            "store_busy_threads": self._readers.busy + self._writers.busy,
        }

    def counters(self) -> Mapping[str, int]:
        """Those of ``stats`` that only grow."""
        with self._lock:
            return {**self._counts, **self._store.counters()}

    def close(self, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
        self._inside.close(timeout_s)
        if not first:
            return
        self._readers.close()
        self._writers.close()
        left_s = max(0.1, deadline - time.monotonic())
        last = Call(lambda: self._store.close(left_s), lambda: None)
        closer = Workers(f"vcache-{self.name}-close", 1)
        if closer.submit(last).wait(left_s) is not Ended.DONE:
            logger.warning("store %s: did not close within %.1f s", self.name, timeout_s)
        elif last.error is not None:
            self._failures.record(f"close of store {self.name}", last.error)
        closer.close()
        self.staging.close()

    def _read(self, shards: Sequence[Shard], loaded: Loaded, workers: Workers, arrivals: Arrivals | None) -> None:
        """Fills ``loaded``; puts ``None`` for blocks that hold nothing or are no longer ours. Retries what is transient."""
        results, blocks = loaded.results, loaded.blocks
        deadline = time.monotonic() + self._config.timeout
        left = list(range(len(shards)))
        for attempt in range(self._config.retries + 1 if shards else 0):
            asked = [shards[index] for index in left]
            lent = [block for index in left if (block := blocks[index]) is not None]
            news: News = queue.SimpleQueue()
            work = partial(_one_each, asked, self._store.get_into, [block.tensor for block in lent])
            if arrivals is not None:
                work = partial(work, arrivals.of(left, news))
            for index in left:
                results[index] = Got.FAILED
            answer = self._call("get", workers, work, lent, timeout_s=deadline - time.monotonic(), news=news)
            for position, index in enumerate(left):
                if answer is not None:
                    results[index] = answer[position]
                else:
                    blocks[index] = None  # released by the call, whenever it ends
            left = [index for index in left if results[index] is Got.INTERRUPTED]
            if not left or attempt == self._config.retries or not self._pause(attempt, deadline):
                break
            self._count(store_retries=1)
        for index, (got, block) in enumerate(zip(results, blocks, strict=True)):
            if got is not Got.LOADED and block is not None:
                block.release()
                blocks[index] = None
        lost = results.count(Got.FAILED) + results.count(Got.INTERRUPTED)
        self._count(store_invalid=results.count(Got.INVALID), store_failed_reads=lost)

    def _put_once(self, shards: Sequence[Shard], blocks: Sequence[Block]) -> Sequence[Put]:
        """One attempt. The caller keeps its hold on ``blocks``; the call has one of its own."""
        for block in blocks:
            block.hold()
        work = partial(_one_each, shards, self._store.put_from, [block.tensor for block in blocks])
        answer = self._call("put", self._writers, work, blocks, timeout_s=self._config.write_timeout)
        if answer is None:
            return [Put.FAILED] * len(shards)
        for block in blocks:
            block.release()
        return answer

    def _call(
        self,
        operation: str,
        workers: Workers,
        work: Callable[[], Result],
        lent: Sequence[Block] = (),
        *,
        timeout_s: float | None = None,
        news: News | None = None,
    ) -> Result | None:
        """The result of ``work``, or ``None``: then one hold on each block of ``lent`` is (or will be) given back.

        ``news``: see ``Call``.
        """

        def give_back() -> None:
            for block in lent:
                block.release()

        with self._lock:
            admitted = self._breaker.admit()
            self._counts["store_made_calls" if admitted else "store_skipped_calls"] += 1
        if not admitted:
            give_back()
            return None
        call = workers.submit(Call(work, give_back, news))
        ended = call.wait(self._config.timeout if timeout_s is None else timeout_s)
        if ended is Ended.DONE and call.error is None:
            self._succeeded()
            return call.result
        if ended is Ended.UNBEGUN:
            with self._lock:
                self._breaker.withdrawn()
                self._counts["store_made_calls"] -= 1
                self._counts["store_unbegun_calls"] += 1
        elif ended is Ended.OVERDUE:
            self._failed(operation, TimeoutError("no answer within the deadline"), store_overdue_calls=1)
        else:
            give_back()
            assert call.error is not None
            self._failed(operation, call.error, store_failed_calls=1)
        return None

    def _succeeded(self) -> None:
        with self._lock:
            before = self._breaker.circuit
            self._breaker.succeeded()
            recovered = before is Circuit.HALF_OPEN and self._breaker.circuit is Circuit.CLOSED
            out_s = time.monotonic() - self._opened_at
        if recovered:
            logger.info("store %s: in use again after %.1f s; circuit closed", self.name, out_s)

    def _failed(self, operation: str, error: BaseException, **counts: int) -> None:
        self._count(**counts)
        now = time.monotonic()
        with self._lock:
            before = self._breaker.circuit
            self._breaker.failed(now)
            opened = self._breaker.circuit is Circuit.OPEN and before is not Circuit.OPEN
            if opened:
                self._counts["store_opened"] += 1
                self._opened_at = self._opened_at if before is Circuit.HALF_OPEN else now
                start = self._prober is None and not self._closing.is_set()
                if start:
                    self._prober = threading.Thread(target=self._probe, name=f"vcache-{self.name}-probe", daemon=True)
                    self._prober.start()
        self._failures.record(f"{operation} of store {self.name}", error)
        if opened:
            logger.warning("store %s: circuit open; lookups skip it until a probe succeeds (%s)", self.name, error)

    def _probe(self) -> None:
        """Knocks until the store answers. Runs in a thread of its own that may hang with the store: one, not many."""
        while True:
            with self._lock:
                if self._breaker.circuit is not Circuit.OPEN or self._closing.is_set():
                    self._prober = None
                    return
                wait_s = self._breaker.probe_due - time.monotonic()
            if self._closing.wait(max(0.0, wait_s)):
                continue
            started = time.monotonic()
            error: Exception | None = None
            try:
                self._store.contains([PROBE])
            except Exception as raised:
                error = raised
            now = time.monotonic()
            late = now - started > self._config.timeout
            with self._lock:
                self._counts["store_probes"] += 1
                if error is None and not late:
                    self._breaker.probe_succeeded()
                else:
                    self._breaker.probe_failed(now)
            logger.debug("store %s: probe %s", self.name, error or ("late" if late else "succeeded"))

    def _pause(self, attempt: int, deadline: float | None = None) -> bool:
        """Waits before a retry, doubling and with jitter; ``False`` when there is no time left for one, or on closing."""
        delay_s = self._config.retry_delay * 2**attempt * random.uniform(0.5, 1.0)
        if deadline is not None and time.monotonic() + delay_s >= deadline:
            return False
        return not self._closing.wait(delay_s)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    @contextmanager
    def _entered(self) -> Iterator[bool]:
        entered = self._inside.enter()
        try:
            yield entered
        finally:
            if entered:
                self._inside.leave()


def _one_each(shards: Sequence[Shard], call: Callable[..., Sequence[Result]], *arguments: object) -> Sequence[Result]:
    """The store's answer to a batched call; one that does not answer for each shard has failed."""
    answer = call(shards, *arguments)
    if len(answer) != len(shards):
        raise CorruptionError(f"the store gave {len(answer)} answers for {len(shards)} shards")
    return answer
