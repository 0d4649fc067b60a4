"""The connector in vLLM's scheduler: what a prompt finds in the pool, and which chunks the worker is to load and to store.

No GPU is touched here and no request waits: a lookup reads the server's index in shared memory, or, where the server is on
another host, is one round trip with a deadline. What the scheduler believes of the pool is only ever a hint, the worker finds
out what is true when it loads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vcache.joined_keys import JoinedKeys
from vcache.log import Interval, log_once_per
from vcache_vllm.counters import ConnectorCounters
from vcache_vllm.metadata import LoadOrder, StepOrders, StepReport, StoreOrder, block_ids
from vcache_vllm.prompt_keys import KeySource, PromptKeys, Undescribed

if TYPE_CHECKING:
    from vcache.engine import VCacheEngine
    from vcache.keys import ModelSpec
    from vcache_vllm.events import PoolEvents

logger: Final = logging.getLogger(__name__)
#: How long a lookup's answer is believed for a request that keeps waiting; at most half the lease on what it found.
LOOKUP_VALID_S: Final = 1.0
#: A cause for which requests are served without the pool is logged this often.
LOG_INTERVAL_S: Final = 30.0
#: vLLM's placeholder for a block that is not there.
NULL_BLOCK: Final = 0
NO_KEYS: Final = JoinedKeys()


@dataclass
class Prompt:
    """What is known of one request. ``chunks`` has the keys; None for a request that is served without the pool."""

    request: Any
    chunks: PromptKeys | None
    hits: int = 0
    lease: int = 0
    valid_until: float = 0.0
    local_tokens: int = 0  # as vLLM said when it last asked
    handed_over: int = 0  # leading chunks that are in the pool or were given to the worker to store
    may_store: bool = True
    preemptions: int = 0  # as of its last store

    @property
    def keys(self) -> JoinedKeys:
        return self.chunks.keys if self.chunks is not None else NO_KEYS


@dataclass(frozen=True, kw_only=True)
class SchedulerRules:
    """loads, stores: what this engine does (vLLM's ``kv_role``). The others as in ``ConnectorOptions``."""

    lease_s: float
    loads: bool
    stores: bool
    load_async: bool
    store_decoded: bool


class SchedulerSide:
    """State by request id, from the first lookup until the request has finished."""

    def __init__(
        self,
        engine: VCacheEngine,
        model: ModelSpec,
        source: KeySource,
        rules: SchedulerRules,
        counters: ConnectorCounters,
        events: PoolEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._block_size = model.block_size
        self._chunk_size = model.chunk_size
        self._per_chunk = model.blocks_per_chunk
        self._source = source
        self._rules = rules
        self._valid_s = min(LOOKUP_VALID_S, rules.lease_s / 2)
        self._counters = counters
        self._events = events
        self._clock = clock
        self._interval = Interval()
        self._prompts: dict[str, Prompt] = {}
        self._to_load: dict[str, LoadOrder] = {}
        self._storing: set[str] = set()  # requests that had stores ordered since they last got their blocks
        self._gone: set[str] = set()
        self._failures_seen = 0
        self._resets = 0

    def loadable_tokens(self, request: Any, local_tokens: int) -> int:
        """Tokens beyond ``local_tokens`` that can be loaded: whole blocks, and never the last token of the prompt.

        Asking again changes nothing: the answer and its lease are remembered, and renewed when they get old.
        """
        prompt = self._prompt_of(request)
        if prompt.chunks is None or not self._rules.loads or request.skip_reading_prefix_cache:
            return 0
        prompt.chunks.extend(self._sharable_tokens(request))
        prompt.local_tokens = local_tokens
        most: int = (request.num_tokens - 1) // self._block_size * self._block_size
        if min(len(prompt.keys) * self._chunk_size, most) <= local_tokens:
            return 0
        self._look_up(prompt)
        # Where vLLM has the first blocks of a chunk, the worker needs the chunk after it too: see Loads.
        least = -(-local_tokens // self._chunk_size) + 1
        if prompt.hits < least:
            return 0
        return max(0, min(prompt.hits * self._chunk_size, most) - local_tokens)

    def allocated(self, request_id: str, table: list[int], tokens: int) -> None:
        """Room was made for ``tokens`` tokens to be loaded, in the blocks that follow the local ones in ``table``.

        Whatever happens here, the promise made to vLLM is kept: the tokens are loaded, or reported as failed.
        """
        prompt = self._prompts[request_id]
        first, kept = divmod(prompt.local_tokens // self._block_size, self._per_chunk)
        blocks = block_ids(table[first * self._per_chunk : prompt.hits * self._per_chunk])
        keys = tuple(prompt.keys[first : prompt.hits])
        if len(blocks) == len(keys) * self._per_chunk and tokens <= len(blocks) * self._block_size:
            parent = prompt.keys[first - 1] if first else None
            salt = prompt.request.cache_salt or ""
            order = LoadOrder(request_id, keys, blocks.reshape(len(keys), self._per_chunk), kept, parent, salt)
        else:
            order = LoadOrder(request_id, (), block_ids(table[first * self._per_chunk + kept :]))
        self._to_load[request_id] = order
        prompt.handed_over = max(prompt.handed_over, prompt.hits)

    def passed_over(self, request_id: str) -> None:
        """The request goes on without loading anything more."""
        if (prompt := self._prompts.get(request_id)) is not None:
            self._release(prompt)

    def stores_of(self, output: Any) -> tuple[StoreOrder, ...]:
        """The chunks that the step vLLM just scheduled will complete."""
        return tuple(self._store_orders(output)) if self._rules.stores else ()

    def orders(self, output: Any, stores: tuple[StoreOrder, ...]) -> StepOrders:
        """The orders of the step that vLLM just scheduled. A load once promised is never left out."""
        # A request that loads in the background is in no step; the others are in the one that follows their promise.
        names = [name for name in self._to_load if self._rules.load_async or name in output.num_scheduled_tokens]
        loads = tuple(self._to_load.pop(name) for name in names)
        now, behind = ((), loads) if self._rules.load_async else (loads, ())
        gone, self._gone = frozenset(self._gone), set()
        return StepOrders(now, behind, stores, gone, self._failures_seen, self._resets)

    def step_done(self, report: StepReport | None, invalid_blocks: set[int], evict: Callable[[set[int]], None]) -> None:
        """The worker's account of a step. ``evict`` takes blocks out of vLLM's own prefix cache.

        After a load that failed before a forward pass, the requests alive have computed on garbage until vLLM started them
        again, and blocks they share may be recomputed at different times. None of them stores any more: losing entries is
        fine, a wrong byte is not. vLLM leaves the failed blocks in its prefix cache while they are recomputed; without
        ``evict`` a later request could take them for whole, and then offer them to everybody.
        """
        loaded = [
            prompt for name in (report.loaded if report is not None else ()) if (prompt := self._prompts.get(name))
        ]
        for prompt in loaded:
            self._release(prompt)
        if report is not None:
            if self._events is not None:
                self._events.stored(report.stored)
            self._failures_seen = max(self._failures_seen, report.failures)
        if (
            invalid_blocks and self._rules.load_async
        ):  # nothing was computed on them: what takes their place may be stored
            for prompt in loaded:
                prompt.handed_over = 0
        elif invalid_blocks:
            evict(invalid_blocks)
            for prompt in self._prompts.values():
                prompt.may_store = False

    def finished(self, request_id: str) -> None:
        """The request is over, or was aborted. What it loads in the background goes on until the worker says that it is over."""
        if not self._rules.load_async:
            self._to_load.pop(request_id, None)
        self._leave_blocks(request_id)
        if (prompt := self._prompts.pop(request_id, None)) is not None:
            self._release(prompt)

    def forget_lookups(self) -> None:
        """The pool was cleared: what was found in it is not there any more, what was ordered to be stored is out of date."""
        self._resets += 1
        for prompt in self._prompts.values():
            self._release(prompt)
            prompt.hits = prompt.handed_over = 0
        if self._events is not None:
            self._events.cleared()

    def _prompt_of(self, request: Any) -> Prompt:
        known = self._prompts.get(request.request_id)
        if known is not None:
            return known
        chunks = None
        try:
            chunks = self._source.of(request)
        except Undescribed as reason:
            self._counters.add(declined_requests=1)
            log_once_per(
                LOG_INTERVAL_S,
                str(reason),
                logger,
                logging.WARNING,
                "requests with %s neither load from the pool nor store into it",
                reason,
                memory=self._interval,
            )
        prompt = self._prompts[request.request_id] = Prompt(request, chunks)
        return prompt

    def _sharable_tokens(self, request: Any) -> int:
        tokens: int = request.num_tokens if self._rules.store_decoded else request.num_prompt_tokens
        return tokens

    def _look_up(self, prompt: Prompt) -> None:
        now = self._clock()
        if now < prompt.valid_until:
            return
        self._release(prompt)
        started = time.perf_counter()
        found = self._engine.lookup_keys(prompt.keys, lease_s=self._rules.lease_s, waits=False)
        self._counters.add(lookups=1, lookup_seconds=time.perf_counter() - started)
        prompt.hits, prompt.lease, prompt.valid_until = found.hits, found.lease, now + self._valid_s
        if self._events is not None:
            self._events.gone(prompt.keys[found.hits :])

    def _release(self, prompt: Prompt) -> None:
        if prompt.lease:
            self._engine.release(prompt.lease)
        prompt.lease, prompt.valid_until = 0, 0.0

    def _leave_blocks(self, request_id: str) -> None:
        if request_id in self._storing:
            self._storing.remove(request_id)
            self._gone.add(request_id)

    def _store_orders(self, output: Any) -> Iterator[StoreOrder]:
        per_chunk = self._per_chunk
        for request_id in [name for name in self._storing if self._was_preempted(name)]:
            self._leave_blocks(request_id)
        for request_id, computed in _computed_tokens(output):
            prompt = self._prompts.get(request_id)
            if prompt is None or prompt.chunks is None or not prompt.may_store:
                continue
            ready = computed + output.num_scheduled_tokens[request_id]
            prompt.chunks.extend(min(ready, self._sharable_tokens(prompt.request)))
            full = min(ready // self._chunk_size, len(prompt.keys))
            done, prompt.handed_over = prompt.handed_over, max(full, prompt.handed_over)
            if full <= done:
                continue
            (table,) = output.kv_connector_block_state.get_block_ids(request_id)
            blocks = block_ids(table[done * per_chunk : full * per_chunk])
            if (blocks == NULL_BLOCK).any():
                continue
            keys = prompt.keys[done:full]
            if self._events is not None:
                self._events.planned(prompt.request, keys, done)
            self._storing.add(request_id)
            prompt.preemptions = prompt.request.num_preemptions
            yield StoreOrder(
                request_id,
                tuple(keys),
                prompt.keys[done - 1] if done else None,
                blocks.reshape(full - done, per_chunk),
                prompt.request.cache_salt or "",
            )

    def _was_preempted(self, request_id: str) -> bool:
        prompt = self._prompts[request_id]
        return bool(prompt.request.num_preemptions != prompt.preemptions)


def _computed_tokens(output: Any) -> Iterator[tuple[str, int]]:
    """Each scheduled request with the tokens whose KV is there before this step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
