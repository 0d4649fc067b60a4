"""What a lookup costs vLLM's scheduler: a new request of 32,768 tokens, all of whose chunks are in the pool.

The connector's own scheduler side, on vLLM's own requests, whose blocks vLLM has hashed (as it does for its own prefix
cache): from the request to the number of tokens that can be loaded. With the server's index in shared memory the lease on them
is asked for and not waited for; without, as from another host, the lookup is a round trip. Beside them a bare ZeroMQ echo of the
same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Final

import zmq
from vcache_vllm.counters import ConnectorCounters
from vcache_vllm.prompt_keys import KeySource
from vcache_vllm.scheduler_side import SchedulerRules, SchedulerSide
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from benchmarks.measure import Bar, Better, Effort, Result, compare
from benchmarks.server_rates import UNIT, Caller, server_and_echo
from vcache import protocol
from vcache.engine import VCacheEngine
from vcache.keys import ModelSpec

CHUNK_SIZE: Final = 256
BLOCK_SIZE: Final = 16
CHUNKS: Final = 128
TOKENS: Final = CHUNKS * CHUNK_SIZE
CALLS: Final = 20  # in one round
ROUNDS: Final = 15
LEASE_S: Final = 60.0
HASH: Final = "sha256"
ECHO, NEAR, FAR = "bare ZeroMQ echo", "on the server's host", "on another host"
BAR: Final = Bar(1.6, Better.LOWER)
MODEL: Final = ModelSpec(
    model="benchmark",
    dtype="bfloat16",
    num_layers=1,
    num_kv_heads=1,
    head_size=64,
    block_size=BLOCK_SIZE,
    chunk_size=CHUNK_SIZE,
)


def run(effort: Effort) -> list[Result]:
    """Microseconds a request. Raises ``RuntimeError`` when a chunk is not found."""
    source = KeySource(MODEL, hash_name=HASH)
    requests = _requests()
    prompt = source.of(next(requests))
    prompt.extend(TOKENS)
    figures: dict[str, list[float]] = {ECHO: [], NEAR: [], FAR: []}
    with server_and_echo() as (context, config, echo_endpoint, _), ExitStack() as engines:
        caller = Caller(context, config.endpoint)
        caller.register(records=CHUNKS, nbytes=(CHUNKS + 1) * UNIT)
        caller.store(list(prompt.keys))
        echo: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        echo.connect(echo_endpoint)
        message = protocol.encode(protocol.Lookup(1, caller.session, caller.term, b"".join(prompt.keys), LEASE_S))
        rules = SchedulerRules(lease_s=LEASE_S, loads=True, stores=True, load_async=False, store_decoded=False)
        sides: dict[str, SchedulerSide] = {}
        for name, server in ((NEAR, {}), (FAR, {"shared_index": 0})):
            its_config = config.model_copy(update={"server": config.server.model_copy(update=server)})
            engine = engines.enter_context(VCacheEngine(its_config, model=MODEL, role="scheduler"))
            sides[name] = SchedulerSide(engine, MODEL, source, rules, ConnectorCounters())
        for _ in range(effort.rounds(ROUNDS) + 1):  # the first warms up
            figures[ECHO].append(_echo(echo, message))
            for name, side in sides.items():
                figures[name].append(_look_up(side, [next(requests) for _ in range(CALLS)]))
    figures = {name: taken[1:] for name, taken in figures.items()}
    case = f"{TOKENS:,}-token prompt, all hit, from vLLM's block hashes"
    return compare("scheduler: lookup", case, figures, unit="us", against=ECHO, bars={NEAR: BAR})


def _echo(socket: zmq.Socket[bytes], message: bytes) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        socket.send(message)
        socket.recv()
    return (time.perf_counter() - begin) / CALLS * 1e6


def _look_up(side: SchedulerSide, requests: list[Request]) -> float:
    begin = time.perf_counter()
    found = [side.loadable_tokens(request, 0) for request in requests]
    seconds = time.perf_counter() - begin
    for request in requests:
        side.finished(request.request_id)
    if set(found) != {TOKENS - BLOCK_SIZE}:  # never the last token, so never the last block
        raise RuntimeError(f"of {TOKENS} tokens {min(found)} were found")
    return seconds / CALLS * 1e6


def _requests() -> Iterator[Request]:
    """One request after the other for the same prompt, hashed by vLLM."""
    hash_function = get_hash_fn_by_name(HASH)
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
    tokens = list(range(TOKENS))
    for number in count():
        yield Request(f"request {number}", tokens, SamplingParams(max_tokens=1), None, block_hasher=hasher)
