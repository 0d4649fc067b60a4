"""The main promise: what one engine computed, another loads from the first one's segment, and answers the same.

Where both compute the rest of a prompt in the same shapes, tokens are compared to the bit (bfloat16). Where they cannot (a
partial local hit), float32 keeps rounding from deciding between tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.processes import Child
from tests.vllm.conftest import CHUNK_SIZE, Pool, StartEngine
from vcache.config import VCacheConfig
from vcache.server_query import fetch_stats

pytestmark = pytest.mark.vllm

STEP = 4 * CHUNK_SIZE


def test_a_second_engine_loads_what_the_first_computed_and_answers_the_same(
    pool: Pool, start_engine: StartEngine, prompt: list[int]
) -> None:
    text = prompt[: STEP + 76]
    alone, first = start_engine(step_tokens=STEP), start_engine("cpu:0", step_tokens=STEP)
    expected, computed = alone.generate(text), first.generate(text)
    assert (computed.loaded, computed.computed) == (0, len(text))
    assert computed.tokens == expected.tokens
    alone.stop()
    first.stop()  # what it stored outlives it

    second = start_engine("cpu:1", step_tokens=STEP)
    loaded = second.generate(text)
    assert (loaded.loaded, loaded.computed) == (STEP, 76)
    assert loaded.tokens == expected.tokens
    stats = second.ask("stats")
    assert (stats["hits"], stats["connector_errors"], stats["failures"]) == (4, 0, 0)

    # The negative control: the answer depends on the bytes that were loaded.
    pool.zero_payloads()
    assert second.ask("forget") == {"done": True}
    garbled = second.generate(text)
    assert garbled.loaded == STEP
    assert garbled.tokens != expected.tokens


@pytest.mark.slow
def test_prefixes_of_every_kind_are_loaded(pool: Pool, start_engine: StartEngine, prompt: list[int]) -> None:
    """Chunked prefill, prompts that share prefixes, a prompt present as a whole, and one known in part already."""
    options = {"step_tokens": 512, "dtype": "float32"}
    alone, first, second = start_engine(**options), start_engine("cpu:0", **options), start_engine("cpu:1", **options)

    long = prompt[:1100]  # three steps
    assert first.generate(long).tokens == alone.generate(long).tokens
    loaded = second.generate(long)
    assert (loaded.loaded, loaded.tokens) == (1024, alone.generate(long).tokens)

    branches = [long[:900] + prompt[1500:1700], long[:620] + prompt[2000:2500]]
    together = second.generate(*branches)
    assert together.tokens == alone.generate(*branches).tokens

    whole = prompt[100 : 100 + 2 * CHUNK_SIZE]
    first.generate(whole)
    loaded = second.generate(whole)
    assert (loaded.loaded, loaded.computed) == (2 * CHUNK_SIZE - 32, 32)
    assert loaded.tokens == alone.generate(whole).tokens

    text = prompt[200:1300]
    first.generate(text)
    second.generate(text[:300])
    loaded = second.generate(text)  # 288 tokens are local, in the middle of the second chunk
    assert (loaded.cached, loaded.loaded) == (288, 1024 - 288)
    assert loaded.tokens == alone.generate(text).tokens
    assert second.ask("stats")["connector_errors"] == 0


@pytest.mark.slow
def test_an_engine_donates_its_own_memory_and_another_loads_from_it(
    start_server: Callable[..., tuple[VCacheConfig, Child]], start_engine: StartEngine, prompt: list[int]
) -> None:
    config, _ = start_server(server={"liveness_timeout": "60s"})
    text = prompt[:600]
    giver = start_engine("cpu:0", connector={"donate": True, "segment": {"size": "64MiB"}}, step_tokens=512)
    taker = start_engine("cpu:1", step_tokens=512)
    computed = giver.generate(text)
    loaded = taker.generate(text)
    assert (loaded.loaded, loaded.tokens) == (2 * CHUNK_SIZE, computed.tokens)
    assert [segment.device for segment in fetch_stats(config, timeout_s=30).segments] == ["cpu:0"]


@pytest.mark.slow
def test_salts_share_nothing(pool: Pool, start_engine: StartEngine, prompt: list[int]) -> None:
    first, second = start_engine("cpu:0"), start_engine("cpu:1")
    text = prompt[:600]
    first.generate(text, salt="one tenant")
    assert second.generate(text, salt="another tenant").loaded == 0
    assert second.generate(text).loaded == 0
    assert second.ask("forget") == {"done": True}
    assert second.generate(text, salt="one tenant").loaded == 2 * CHUNK_SIZE


@pytest.mark.slow
def test_blocks_that_were_reused_are_stored_and_loaded_rightly(
    pool: Pool, start_engine: StartEngine, prompt: list[int]
) -> None:
    """A KV cache of 40 blocks: prompts that arrive together preempt each other and resume in other blocks."""
    options = {"num_blocks": 40, "max_model_len": 1024, "step_tokens": 512, "dtype": "float32"}
    alone, first, second = start_engine(**options), start_engine("cpu:0", **options), start_engine("cpu:1", **options)
    texts = [prompt[start : start + 560] for start in (0, 600, 1200)]
    expected = alone.generate(*texts, max_tokens=120)
    assert first.generate(*texts, max_tokens=120).tokens == expected.tokens
    loaded = second.generate(*texts, max_tokens=120)
    assert loaded.tokens == expected.tokens
    assert loaded.loaded >= 3 * 2 * CHUNK_SIZE, second.ask("stats")
