"""What others can see of the pool through vLLM: metrics, KV events; and what vLLM can tell it: to be empty."""

from __future__ import annotations

import pytest

from tests.vllm.conftest import CHUNK_SIZE, Trio

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

BLOCKS_PER_CHUNK = CHUNK_SIZE // 32


def test_metrics_and_events_say_what_was_stored_and_reset_takes_it_back(trio: Trio, prompt: list[int]) -> None:
    text = prompt[1400:2100]
    before = trio.first.ask("metrics")
    trio.first.ask("events")
    expected = trio.first.generate(text)
    trio.first.ask("stats")
    trio.first.generate(prompt[:40])  # vLLM asks for events and counts with each step
    after = trio.first.ask("metrics")
    assert after["vllm:vcache_stored_chunks"] - before["vllm:vcache_stored_chunks"] == 2
    assert after["vllm:vcache_lookups"] - before["vllm:vcache_lookups"] == 1
    assert after["vllm:vcache_errors"] == 0
    assert trio.first.ask("events")["events"] == [["BlockStored", "VCACHE", BLOCKS_PER_CHUNK]] * 2

    before = trio.second.ask("metrics")
    assert trio.second.generate(text).tokens == expected.tokens
    after = trio.second.ask("metrics")
    assert after["vllm:vcache_loaded_chunks"] - before["vllm:vcache_loaded_chunks"] == 2

    assert trio.first.ask("forget", connector=True) == {"done": True}
    assert trio.host.entries() == 0
    trio.first.generate(prompt[:40])
    taken_back = trio.first.ask("events")["events"]
    assert {(kind, medium) for kind, medium, _ in taken_back} == {("BlockRemoved", "VCACHE")}
    trio.second.forget()
    again = trio.second.generate(text)
    assert (again.loaded, again.tokens) == (0, expected.tokens)
