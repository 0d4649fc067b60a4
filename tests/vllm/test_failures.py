"""The cache may fail, serving may not: whatever happens to the pool, vLLM answers as it does alone."""

from __future__ import annotations

import pytest

from tests.vllm.conftest import Pool, StartEngine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = {"dtype": "float32"}


def test_records_retired_between_lookup_and_load_make_vllm_compute_them(
    pool: Pool, start_engine: StartEngine, prompt: list[int]
) -> None:
    text = prompt[:1100]
    alone, first = start_engine(**OPTIONS), start_engine("cpu:0", **OPTIONS)
    second = start_engine("cpu:1", pause_before_load=True, **OPTIONS)
    expected = alone.generate(text)
    first.generate(text)

    second.tell("generate", prompts=[text], max_tokens=24)
    second.child.expect("LOADING", 200)
    pool.retire_records()
    pool.zero_payloads()
    second.child.tell("go on")
    assert second.answer().tokens == expected.tokens
    assert second.ask("stats")["validation_failures"] > 0

    # And what it computed after the failure is not offered to others, nor are failed blocks to itself.
    again = second.generate(text)
    assert again.tokens == expected.tokens


def test_without_a_server_serving_goes_on(start_engine: StartEngine, prompt: list[int]) -> None:
    text = prompt[:600]
    connector = {"client": {"connect_timeout": "500ms", "call_timeout": "200ms"}}
    alone, lonely = start_engine(**OPTIONS), start_engine("cpu:0", connector=connector, **OPTIONS)
    answer = lonely.generate(text)
    assert (answer.loaded, answer.tokens) == (0, alone.generate(text).tokens)


def test_a_pool_that_dies_between_two_requests_is_a_miss(
    pool: Pool, start_engine: StartEngine, prompt: list[int]
) -> None:
    first, alone = start_engine("cpu:0", **OPTIONS), start_engine(**OPTIONS)
    expected = alone.generate(prompt[:600])
    assert first.generate(prompt[:600]).tokens == expected.tokens
    for process in (pool.server, *pool.donors):
        process.kill()
    assert first.ask("forget") == {"done": True}
    assert first.generate(prompt[:600]).tokens == expected.tokens
    assert first.generate(prompt[600:1200]).tokens == alone.generate(prompt[600:1200]).tokens
