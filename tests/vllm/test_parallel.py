"""Two ranks: each stores and loads its own shards, and a chunk is there only when both are.

Pipeline parallelism is not tested here: vLLM 0.32.0 itself does not run it on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.conftest import CHUNK_SIZE, Host

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_two_ranks_load_what_two_ranks_stored(host: Host, prompt: list[int]) -> None:
    host.start_pool()
    options: dict[str, Any] = {"dtype": "float32", "step_tokens": 512, "processes": True, "tensor_parallel": 2}
    text = prompt[:1100]
    alone = host.engine(**options)
    expected = alone.generate(text)
    alone.stop()
    engine = host.engine("cpu:0", **options)
    assert engine.generate(text).tokens == expected.tokens
    host.await_pool(lambda stats: stats.entries == 4)
    engine.forget()
    loaded = engine.generate(text)
    assert (loaded.loaded, loaded.tokens) == (4 * CHUNK_SIZE, expected.tokens)
    metrics = engine.ask("metrics")
    assert (metrics["vllm:vcache_stored_chunks"], metrics["vllm:vcache_loaded_chunks"]) == (8, 8)  # shards of both
    engine.stop()
