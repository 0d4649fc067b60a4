"""The cache may fail, serving may not: whatever happens to the pool, vLLM answers as it does alone."""

from __future__ import annotations

import time

import pytest

from tests.vllm.conftest import CHUNK_SIZE, PATIENCE_S, Engine, Host, Trio
from tests.vllm.serving import LOADING
from vcache.server_query import fetch_stats

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_records_retired_between_lookup_and_load_make_vllm_compute_them(trio: Trio, prompt: list[int]) -> None:
    text = prompt[1150:2250]
    expected = trio.alone.generate(text)
    trio.first.generate(text)
    trio.first.ask("stats")
    trio.second.ask("pause_next_load")
    trio.second.tell("generate", prompts=[text], max_tokens=24)
    trio.second.child.expect(LOADING, PATIENCE_S)
    trio.host.retire_records()
    trio.host.zero_payloads()
    trio.second.child.tell("go on")
    assert trio.second.answer().tokens == expected.tokens
    stats = trio.second.ask("stats")
    assert stats["validation_failures"] > 0
    assert stats["connector_failed_chunks"] == 4

    # And what it computed after the failure is not offered to others, nor are failed blocks to itself.
    assert trio.second.generate(text).tokens == expected.tokens


def test_a_request_aborted_in_flight_leaves_nothing_behind(trio: Trio, prompt: list[int]) -> None:
    text = prompt[1250:2350]
    expected = trio.alone.generate(text)
    assert trio.first.ask("abort", prompt=text, steps=1) == {"unfinished": False}  # while it computes and stores
    trio.first.generate(text)
    trio.first.ask("stats")
    assert trio.second.ask("abort", prompt=text, steps=1) == {"unfinished": False}  # after it has loaded
    trio.second.forget()  # possible only when no block is held any more
    assert trio.second.generate(text).tokens == expected.tokens
    trio.second.ask("stats")
    stats = fetch_stats(trio.host.config, timeout_s=30)
    assert (stats.leases, stats.reservations) == (0, 0)


def test_serving_outlives_whatever_happens_to_the_pool(host: Host, trio: Trio, prompt: list[int]) -> None:
    """One engine: no server at first, then a pool, a server that restarts, and a pool killed between lookup and load."""
    engine = host.engine(
        "cpu:0",
        connector={"client": {"connect_timeout": "500ms", "call_timeout": "30s"}},
        dtype="float32",
        step_tokens=512,
    )

    text = prompt[:600]
    answer = engine.generate(text)
    assert (answer.loaded, answer.tokens) == (0, trio.alone.generate(text).tokens)

    host.start_pool()
    await_server(engine)
    text = prompt[600:1200]
    expected = trio.alone.generate(text)
    assert engine.generate(text).tokens == expected.tokens
    engine.ask("stats")
    engine.forget()
    assert engine.generate(text).loaded == 2 * CHUNK_SIZE

    host.restart_server()
    await_server(engine)
    host.await_pool(lambda stats: stats.entries == 2)  # as the donors hand them over
    for _ in range(10):  # scheduler and worker find the new server each in its own time; until both have, it is a miss
        engine.forget()
        answer = engine.generate(text)
        assert answer.tokens == expected.tokens
        if answer.loaded:
            break
    assert answer.loaded == 2 * CHUNK_SIZE

    engine.forget()
    engine.ask("pause_next_load")
    engine.tell("generate", prompts=[text], max_tokens=24)
    engine.child.expect(LOADING, PATIENCE_S)
    host.retire_records()
    host.zero_payloads()
    assert host.server is not None
    for process in (host.server, *host.donors):
        process.kill()
    engine.child.tell("go on")
    assert engine.answer().tokens == expected.tokens

    text = prompt[1200:1800]
    assert engine.generate(text).tokens == trio.alone.generate(text).tokens


def await_server(engine: Engine) -> None:
    """Waits until the engine has found the server by itself."""
    deadline = time.monotonic() + PATIENCE_S
    while not engine.ask("stats")["server_available"]:
        assert time.monotonic() < deadline, engine.child.report()
