"""A prefill engine and a decode engine that share only the pool, and loads beside vLLM's steps (``load_async``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.vllm.conftest import CHUNK_SIZE, PATIENCE_S, Engine, Trio
from tests.vllm.serving import LOADING
from vcache.server_query import fetch_stats

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


class Pair(NamedTuple):
    """prefill only stores, and is served by vLLM's own engine process; decode only loads, in the background."""

    prefill: Engine
    decode: Engine


@pytest.fixture(scope="module")
def pair(trio: Trio) -> Iterator[Pair]:
    options: dict[str, Any] = {"dtype": "float32", "step_tokens": 512}
    prefill = trio.host.engine("cpu:0", role="kv_producer", processes=True, plugin=True, **options)
    decode = trio.host.engine("cpu:1", {"load_async": True}, role="kv_consumer", plugin=True, **options)
    yield Pair(prefill, decode)
    for engine in (prefill, decode):
        engine.stop()


def prefilled(pair: Pair, trio: Trio, text: list[int]) -> None:
    """Has ``text`` computed by the prefill engine, and waits until the pool has it."""
    expected = trio.host.entries() + len(text) // CHUNK_SIZE
    pair.prefill.generate(text, max_tokens=1)
    trio.host.await_pool(lambda stats: stats.entries == expected)


def test_the_decode_engine_computes_only_what_is_not_a_whole_chunk(pair: Pair, trio: Trio, prompt: list[int]) -> None:
    texts = [prompt[start : start + 800] for start in (20, 820)]
    for text in texts:
        prefilled(pair, trio, text)
    expected = trio.alone.generate(*texts)
    entries = trio.host.entries()
    answer = pair.decode.generate(*texts)
    assert (answer.loaded, answer.computed, answer.tokens) == (2 * 768, 2 * 32, expected.tokens)

    # Neither does the other's work.
    other = prompt[1620:2220]
    assert pair.decode.generate(other).tokens == trio.alone.generate(other).tokens
    pair.decode.ask("stats")
    assert trio.host.entries() == entries
    pair.prefill.forget()
    assert pair.prefill.generate(texts[0]).loaded == 0


def test_a_background_load_begins_after_what_vllm_has_itself(pair: Pair, trio: Trio, prompt: list[int]) -> None:
    text = prompt[30:1130]
    prefilled(pair, trio, text)
    pair.decode.generate(text[:300])
    answer = pair.decode.generate(text)
    assert (answer.cached, answer.loaded) == (288, 1024 - 288)
    assert answer.tokens == trio.alone.generate(text).tokens


def test_a_background_load_that_fails_is_computed(pair: Pair, trio: Trio, prompt: list[int]) -> None:
    text, beside = prompt[40:1140], prompt[2200:2300]
    prefilled(pair, trio, text)
    expected = trio.alone.generate(text, beside)
    pair.decode.ask("pause_next_load")
    pair.decode.tell("generate", prompts=[text, beside], max_tokens=24)
    pair.decode.child.expect(LOADING, PATIENCE_S)
    trio.host.retire_records()
    trio.host.zero_payloads()
    pair.decode.child.tell("go on")
    assert pair.decode.answer().tokens == expected.tokens
    assert pair.decode.ask("stats")["connector_failed_chunks"] == 4


def test_a_request_aborted_while_it_loads_gives_its_blocks_back(pair: Pair, trio: Trio, prompt: list[int]) -> None:
    text = prompt[60:1160]
    prefilled(pair, trio, text)
    assert pair.decode.ask("abort", prompt=text, steps=1) == {"unfinished": False}
    pair.decode.ask("stats")  # its load is over
    pair.decode.generate(prompt[:40])  # and vLLM has heard of it
    pair.decode.forget()  # possible only when no block is held any more
    assert pair.decode.generate(text).tokens == trio.alone.generate(text).tokens
    pair.decode.ask("stats")
    assert fetch_stats(trio.host.config, timeout_s=30).leases == 0
