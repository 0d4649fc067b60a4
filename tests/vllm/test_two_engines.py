"""The main promise: what one engine computed, another loads from the pool, and answers the same.

Where both compute the rest of a prompt in the same shapes, tokens are compared to the bit (bfloat16). Where they cannot (a
partial local hit), float32 keeps rounding from deciding between tokens.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.conftest import CHUNK_SIZE, Host, Trio
from vcache.server_query import fetch_stats

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

STEP = 4 * CHUNK_SIZE


def test_a_second_engine_loads_what_the_first_computed_and_answers_the_same(host: Host, prompt: list[int]) -> None:
    host.start_pool()
    text = prompt[: STEP + 76]
    alone, first = host.engine(step_tokens=STEP), host.engine("cpu:0", step_tokens=STEP)
    expected, computed = alone.generate(text), first.generate(text)
    assert (computed.loaded, computed.computed) == (0, len(text))
    assert computed.tokens == expected.tokens
    alone.stop()
    first.stop()  # what it stored outlives it

    second = host.engine("cpu:1", step_tokens=STEP)
    loaded = second.generate(text)
    assert (loaded.loaded, loaded.computed) == (STEP, 76)
    assert loaded.tokens == expected.tokens
    stats = second.ask("stats")
    assert (stats["hits"], stats["connector_errors"], stats["failures"]) == (4, 0, 0)

    # The negative control: the answer depends on the bytes that were loaded.
    host.zero_payloads()
    second.forget()
    garbled = second.generate(text)
    assert garbled.loaded == STEP
    assert garbled.tokens != expected.tokens


@pytest.mark.slow
def test_prompts_that_share_prefixes_load_what_they_share(trio: Trio, prompt: list[int]) -> None:
    """Chunked prefill: three steps and more. Then prompts that branch off at different places, at the same time."""
    long = prompt[:1100]
    assert trio.first.generate(long).tokens == trio.alone.generate(long).tokens
    settled(trio)
    loaded = trio.second.generate(long)
    assert (loaded.loaded, loaded.tokens) == (1024, trio.alone.generate(long).tokens)

    branches = [long[:900] + prompt[1500:1700], long[:620] + prompt[2000:2500], long[:300] + prompt[1800:1900]]
    expected = trio.alone.generate(*branches)
    trio.second.forget()
    together = trio.second.generate(*branches)
    assert together.tokens == expected.tokens
    assert together.loaded >= 3 * CHUNK_SIZE
    assert (
        together.loaded + together.cached >= (3 + 2 + 1) * CHUNK_SIZE
    )  # what one loads the next finds in vLLM's own cache


@pytest.mark.slow
def test_a_prompt_that_is_there_as_a_whole_computes_its_last_block(trio: Trio, prompt: list[int]) -> None:
    whole = prompt[100 : 100 + 2 * CHUNK_SIZE]
    trio.first.generate(whole)
    settled(trio)
    loaded = trio.second.generate(whole)
    assert (loaded.loaded, loaded.computed) == (2 * CHUNK_SIZE - 32, 32)
    assert loaded.tokens == trio.alone.generate(whole).tokens


@pytest.mark.slow
def test_what_vllm_has_itself_is_not_loaded(trio: Trio, prompt: list[int]) -> None:
    text = prompt[200:1300]
    trio.first.generate(text)
    settled(trio)
    trio.second.generate(text[:300])
    loaded = trio.second.generate(text)  # 288 tokens are local, in the middle of the second chunk
    assert (loaded.cached, loaded.loaded) == (288, 1024 - 288)
    assert loaded.tokens == trio.alone.generate(text).tokens
    assert trio.second.ask("stats")["connector_errors"] == 0


@pytest.mark.slow
def test_engines_that_serve_at_the_same_time_share(trio: Trio, prompt: list[int]) -> None:
    texts = [prompt[start : start + 700] for start in (310, 1010, 1710)]
    expected = trio.alone.generate(*texts)
    for engine, order in ((trio.first, texts), (trio.second, texts[::-1])):
        engine.tell("generate", prompts=order, max_tokens=24)
    assert trio.first.answer().tokens == expected.tokens
    assert trio.second.answer().tokens == expected.tokens[::-1]
    settled(trio)
    for engine in (trio.first, trio.second):
        engine.forget()
        again = engine.generate(*texts)
        assert (again.loaded, again.tokens) == (3 * 2 * CHUNK_SIZE, expected.tokens)


@pytest.mark.slow
def test_salts_share_nothing(trio: Trio, prompt: list[int]) -> None:
    text = prompt[50:650]
    trio.first.generate(text, salt="one tenant")
    settled(trio)
    assert trio.second.generate(text, salt="another tenant").loaded == 0
    settled(trio)
    assert trio.second.generate(text).loaded == 0
    trio.second.forget()
    assert trio.second.generate(text, salt="one tenant").loaded == 2 * CHUNK_SIZE


@pytest.mark.slow
def test_an_engine_donates_its_own_memory_and_keeps_a_conversation_in_it(
    host: Host, trio: Trio, prompt: list[int]
) -> None:
    host.server = host.processes.server(host.config)
    connector = {"donate": True, "segment": {"size": "64MiB"}, "store_decoded": True}
    giver = host.engine("cpu:0", connector=connector, step_tokens=512, dtype="float32")
    text = prompt[:480]
    expected = trio.alone.generate(text, max_tokens=64)
    assert giver.generate(text, max_tokens=64).tokens == expected.tokens
    assert giver.ask("stats")["stored"] == 2  # the second chunk ends in generated tokens
    assert [segment.device for segment in fetch_stats(host.config, timeout_s=30).segments] == ["cpu:0"]

    giver.forget()
    text += [*expected.tokens[0][:50], *prompt[1000:1050]]
    loaded = giver.generate(text)
    assert (loaded.loaded, loaded.tokens) == (2 * CHUNK_SIZE, trio.alone.generate(text).tokens)


@pytest.mark.slow
def test_blocks_that_were_reused_are_stored_and_loaded_rightly(host: Host, prompt: list[int]) -> None:
    """A KV cache of 40 blocks: prompts that arrive together preempt each other and resume in other blocks."""
    host.start_pool()
    options: dict[str, Any] = {"num_blocks": 40, "max_model_len": 1024, "step_tokens": 512, "dtype": "float32"}
    alone, tight = host.engine(**options), host.engine("cpu:0", **options)
    texts = [prompt[start : start + 560] for start in (0, 600, 1200)]
    expected = alone.generate(*texts, max_tokens=120)
    assert tight.generate(*texts, max_tokens=120).tokens == expected.tokens
    assert tight.ask("stats")["connector_errors"] == 0
    tight.forget()
    loaded = tight.generate(*texts, max_tokens=120)
    assert loaded.tokens == expected.tokens
    assert loaded.loaded >= 3 * 2 * CHUNK_SIZE, tight.ask("stats")


def settled(trio: Trio) -> None:
    """Waits until what the engines were storing is in the pool, or known not to be."""
    for engine in (trio.first, trio.second):
        engine.ask("stats")
