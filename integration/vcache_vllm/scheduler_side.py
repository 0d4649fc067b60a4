"""The connector in vLLM's scheduler: what of a prompt is in the pool, and which chunks the worker is to load and to store.

No GPU is touched here and no request waits: a lookup is one round trip with a deadline. What the scheduler believes of the
pool is only ever a hint, the worker finds out what is true when it loads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from vcache.engine import VCacheEngine
from vcache.keys import ChunkKey, ModelSpec
from vcache_vllm.metadata import LoadOrder, StepOrders, StepReport, StoreOrder, block_ids

#: How long a lookup's answer is believed for a request that keeps waiting; at most half the lease on what it found.
LOOKUP_VALID_S: Final = 1.0
#: vLLM's placeholder for a block that is not there.
NULL_BLOCK: Final = 0


@dataclass
class Prompt:
    """What is known of one request. ``keys`` are those of the prompt's full chunks."""

    keys: list[ChunkKey]
    salt: str
    hits: int = 0
    lease: int = 0
    valid_until: float = 0.0
    local_tokens: int = 0  # as vLLM said when it last asked
    handed_over: int = 0  # leading chunks that are in the pool or were given to the worker to store
    may_store: bool = True


class SchedulerSide:
    """State by request id, from the first lookup until the request has finished."""

    def __init__(
        self,
        engine: VCacheEngine,
        model: ModelSpec,
        *,
        lease_s: float,
        loads: bool,
        stores: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._block_size = model.block_size
        self._chunk_size = model.chunk_size
        self._per_chunk = model.blocks_per_chunk
        self._lease_s = lease_s
        self._valid_s = min(LOOKUP_VALID_S, lease_s / 2)
        self._loads = loads
        self._stores = stores
        self._clock = clock
        self._prompts: dict[str, Prompt] = {}
        self._to_load: dict[str, LoadOrder] = {}
        self._failures_seen = 0

    def loadable_tokens(self, request: Any, local_tokens: int) -> int:
        """Tokens beyond ``local_tokens`` that can be loaded: whole blocks, and never the last token of the prompt.

        Asking again changes nothing: the answer and its lease are remembered, and renewed when they get old.
        """
        prompt = self._prompt_of(request)
        if prompt is None or not self._loads or request.skip_reading_prefix_cache:
            return 0
        prompt.local_tokens = local_tokens
        most: int = (request.num_tokens - 1) // self._block_size * self._block_size
        if min(len(prompt.keys) * self._chunk_size, most) <= local_tokens:
            return 0
        self._look_up(prompt)
        # Where vLLM has the first blocks of a chunk, the worker needs the chunk after it too: see WorkerSide.
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
            order = LoadOrder(request_id, keys, blocks.reshape(len(keys), self._per_chunk), kept)
        else:
            order = LoadOrder(request_id, (), block_ids(table[first * self._per_chunk + kept :]))
        self._to_load[request_id] = order
        prompt.handed_over = max(prompt.handed_over, prompt.hits)

    def passed_over(self, request_id: str) -> None:
        """The request goes on without loading anything."""
        if (prompt := self._prompts.get(request_id)) is not None:
            self._release(prompt)

    def stores_of(self, output: Any) -> tuple[StoreOrder, ...]:
        """The chunks that the step vLLM just scheduled will complete."""
        return tuple(self._store_orders(output)) if self._stores else ()

    def orders(self, output: Any, stores: tuple[StoreOrder, ...]) -> StepOrders:
        """The orders of the step that vLLM just scheduled. A load once promised is never left out."""
        loads = tuple(self._to_load.pop(name) for name in list(self._to_load) if name in output.num_scheduled_tokens)
        return StepOrders(loads, stores, self._failures_seen)

    def step_done(self, report: StepReport | None, invalid_blocks: set[int], evict: Callable[[set[int]], None]) -> None:
        """The worker's account of a step. ``evict`` takes blocks out of vLLM's own prefix cache.

        After a failed load, the requests alive have computed on garbage until vLLM started them again, and blocks they share
        may be recomputed at different times. None of them stores any more: losing entries is fine, a wrong byte is not.
        vLLM leaves the failed blocks in its prefix cache while they are recomputed; without ``evict`` a later request could
        take them for whole, and then offer them to everybody.
        """
        if report is not None:
            for request_id in report.loaded:
                if (prompt := self._prompts.get(request_id)) is not None:
                    self._release(prompt)
            self._failures_seen = max(self._failures_seen, report.failures)
        if invalid_blocks:
            evict(invalid_blocks)
            for prompt in self._prompts.values():
                prompt.may_store = False

    def finished(self, request_id: str) -> None:
        """The request is over, or was aborted."""
        self._to_load.pop(request_id, None)
        if (prompt := self._prompts.pop(request_id, None)) is not None:
            self._release(prompt)

    def _prompt_of(self, request: Any) -> Prompt | None:
        """The request's state; None for a request whose KV depends on more than its tokens and salt."""
        known = self._prompts.get(request.request_id)
        if known is not None:
            return known
        if request.lora_request or request.mm_features or request.prompt_embeds is not None:
            return None
        whole = request.num_prompt_tokens // self._chunk_size * self._chunk_size
        salt = request.cache_salt or ""
        keys = self._engine.keys_of(request.all_token_ids[:whole], salt=salt) if whole else []
        prompt = self._prompts[request.request_id] = Prompt(keys, salt)
        return prompt

    def _look_up(self, prompt: Prompt) -> None:
        now = self._clock()
        if now < prompt.valid_until:
            return
        self._release(prompt)
        found = self._engine.lookup_keys(prompt.keys, lease_s=self._lease_s)
        prompt.hits, prompt.lease, prompt.valid_until = found.hits, found.lease, now + self._valid_s

    def _release(self, prompt: Prompt) -> None:
        if prompt.lease:
            self._engine.release(prompt.lease)
        prompt.lease, prompt.valid_until = 0, 0.0

    def _store_orders(self, output: Any) -> Iterator[StoreOrder]:
        per_chunk = self._per_chunk
        for request_id, computed in _computed_tokens(output):
            prompt = self._prompts.get(request_id)
            if prompt is None or not prompt.may_store:
                continue
            full = min((computed + output.num_scheduled_tokens[request_id]) // self._chunk_size, len(prompt.keys))
            done, prompt.handed_over = prompt.handed_over, max(full, prompt.handed_over)
            if full <= done:
                continue
            (table,) = output.kv_connector_block_state.get_block_ids(request_id)
            blocks = block_ids(table[done * per_chunk : full * per_chunk])
            if (blocks == NULL_BLOCK).any():
                continue
            yield StoreOrder(
                request_id,
                tuple(prompt.keys[done:full]),
                prompt.keys[done - 1] if done else None,
                blocks.reshape(full - done, per_chunk),
                prompt.salt,
            )


def _computed_tokens(output: Any) -> Iterator[tuple[str, int]]:
    """Each scheduled request with the tokens whose KV is there before this step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
