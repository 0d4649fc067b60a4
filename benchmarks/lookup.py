"""How long it takes to ask how much of a prompt is there: 32,768 tokens, 128 chunks; all there, half, and none.

VCache as a scheduler uses it (hashing, and the index in memory shared with the server's process), LMCache's engine over its LocalCPU
backend (hashing, and a dictionary in the same process), Mooncake's ``batch_is_exist`` (a round trip to its master; the caller
has to have keys). Tokens come as a list of ints, as a tensor, and not at all: then the keys are known already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import numpy as np
import torch

from benchmarks.lmcache_peer import LMCacheEngine, PagedStorage, lmcache_engine
from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave, judge
from benchmarks.mooncake_peer import MooncakeClient, await_room, mooncake
from vcache.config import VCacheConfig
from vcache.demo.pool import Donation, start_pool
from vcache.demo.processes import Stage
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec

CHUNK_SIZE: Final = 256
CHUNKS: Final = 128
TOKENS: Final = CHUNKS * CHUNK_SIZE
BLOCK_SIZE: Final = 32
HEAD_SIZE: Final = 64
#: Chunks are small here: their bytes have no part in a lookup.
CHUNK_BYTES: Final = CHUNK_SIZE * 2 * HEAD_SIZE * 2
ROUNDS: Final = 61
CALLS: Final = 8  # timed as one: a call takes less than the clock and a thread's wake-up vary
VCACHE, LMCACHE, MOONCAKE = "VCache", "LMCache", "Mooncake"
BARS: Final = {
    ("list of ints", LMCACHE): Bar(0.9, Better.LOWER),
    ("tensor", LMCACHE): Bar(0.3, Better.LOWER),
    ("keys", LMCACHE): Bar(0.4, Better.LOWER),
    ("keys", MOONCAKE): Bar(0.5, Better.LOWER),
}
#: How many of the prompt's chunks are there.
PRESENT: Final = {"all hit": CHUNKS, "half hit": CHUNKS // 2, "miss": 0}

Ask = Callable[[], object]


def run(effort: Effort) -> list[Result]:
    """Microseconds a call. Raises ``RuntimeError`` when a contestant answers wrongly."""
    results = []
    with Stage() as stage, ExitStack() as peers:
        vcache = peers.enter_context(_filled_pool(stage))
        lmcache = peers.enter_context(_filled_lmcache())
        store = peers.enter_context(_filled_mooncake(stage))
        rounds = effort.rounds(ROUNDS)
        for name, present in PRESENT.items():
            prompt = _prompt(present)
            for form, asks in _forms(prompt, vcache, lmcache, store).items():
                for contestant, (ask, expected) in asks.items():
                    _check(contestant, form, ask(), expected(present))
                figures = interleave({who: _timed(ask) for who, (ask, _) in asks.items()}, rounds=rounds)
                case = f"{form}, {name}"
                bars = {VCACHE: BARS[form, LMCACHE]}
                results += compare("lookup", case, figures, unit="us", against=LMCACHE, bars=bars)
                if (form, MOONCAKE) in BARS:
                    bar = BARS[form, MOONCAKE]
                    results.append(judge("lookup", case, figures, VCACHE, unit="us", against=MOONCAKE, bar=bar))
    return results


def _prompt(present: int) -> torch.Tensor:
    """A prompt whose first ``present`` chunks were stored; all prompts but the first go on with tokens never seen."""
    tokens = torch.arange(TOKENS)
    tokens[present * CHUNK_SIZE :] += 100_000
    return tokens


def _forms(
    prompt: torch.Tensor, vcache: VCacheEngine, lmcache: LMCacheEngine, store: MooncakeClient
) -> dict[str, dict[str, tuple[Ask, Callable[[int], object]]]]:
    """For each form of the question, who is asked how, and what the answer for so many present chunks is."""
    as_list = prompt.tolist()
    keys = vcache.keys_of(prompt)
    hashes = [key.chunk_hash for _, _, key in lmcache.token_database.process_tokens(tokens=prompt)]
    lengths = [CHUNK_SIZE] * CHUNKS
    names = _names(prompt)

    def in_tokens(present: int) -> object:
        return present * CHUNK_SIZE

    return {
        "list of ints": {
            VCACHE: (lambda: vcache.lookup(as_list), in_tokens),
            LMCACHE: (lambda: lmcache.lookup(as_list), in_tokens),
        },
        "tensor": {
            VCACHE: (lambda: vcache.lookup(prompt), in_tokens),
            LMCACHE: (lambda: lmcache.lookup(prompt), in_tokens),
        },
        "keys": {
            VCACHE: (lambda: vcache.lookup_keys(keys).hits, lambda present: present),
            LMCACHE: (lambda: lmcache.lookup(hashes=hashes, offsets=lengths), in_tokens),
            MOONCAKE: (lambda: store.exist(names), lambda present: [1] * present + [0] * (CHUNKS - present)),
        },
    }


def _names(prompt: torch.Tensor) -> list[str]:
    """Keys for Mooncake, as long as a hash in hexadecimal digits."""
    return [f"{int(token):032x}" for token in prompt[::CHUNK_SIZE]]


def _timed(ask: Ask) -> Callable[[], float]:
    def figure() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            ask()
        return (time.perf_counter() - begin) / CALLS * 1e6

    return figure


def _check(contestant: str, form: str, answer: object, expected: object) -> None:
    if answer != expected:
        raise RuntimeError(f"{contestant} asked with {form} answers {answer!r:.80} instead of {expected!r:.80}")


@contextmanager
def _filled_pool(stage: Stage) -> Iterator[VCacheEngine]:
    """A scheduler's engine, and a pool in which another engine stored the prompt."""
    runtime_dir = stage.directory / "pool"
    runtime_dir.mkdir(mode=0o700)
    config = VCacheConfig(runtime_dir=str(runtime_dir), chunk_size=CHUNK_SIZE, block_size=BLOCK_SIZE)
    start_pool(stage, config, [Donation("cpu:0", 4 * CHUNKS * CHUNK_BYTES)])
    model = ModelSpec(
        model="benchmark",
        dtype="bfloat16",
        num_layers=1,
        num_kv_heads=1,
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        chunk_size=CHUNK_SIZE,
    )
    prompt = _prompt(CHUNKS)
    planes = [torch.zeros((TOKENS // BLOCK_SIZE, BLOCK_SIZE, 2 * HEAD_SIZE), dtype=torch.bfloat16)]
    with (
        VCacheEngine(config, model=model, kv_caches=planes) as worker,
        VCacheEngine(config, model=model, role="scheduler") as scheduler,
    ):
        worker.store(prompt, slot_mapping=torch.arange(TOKENS))
        worker.flush()
        yield scheduler


@contextmanager
def _filled_lmcache() -> Iterator[LMCacheEngine]:
    shape = (1, TOKENS // BLOCK_SIZE, BLOCK_SIZE, 2 * HEAD_SIZE)
    storage = PagedStorage(torch.zeros(shape, dtype=torch.bfloat16), np.arange(TOKENS // BLOCK_SIZE))
    kv_shape = (1, 2, CHUNK_SIZE, 1, HEAD_SIZE)
    with lmcache_engine(kv_shape=kv_shape, chunk_size=CHUNK_SIZE, nbytes=1 << 28, storage=storage) as engine:
        engine.store(_prompt(CHUNKS))
        yield engine


@contextmanager
def _filled_mooncake(stage: Stage) -> Iterator[MooncakeClient]:
    names = _names(_prompt(CHUNKS))
    with mooncake(stage, nbytes=1 << 28, in_process=True) as client:
        memory = torch.zeros(CHUNKS * CHUNK_BYTES, dtype=torch.uint8)
        client.register(memory)
        await_room(client, names[:1], memory, CHUNK_BYTES)
        client.put(names, memory, CHUNK_BYTES)
        yield client
        client.clear()
        client.unregister(memory)
