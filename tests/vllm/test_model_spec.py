"""Engines whose KV cannot be shared rightly are declined, with the reason, by what vLLM itself says of its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vcache_vllm.model_spec import reason_to_decline
from vcache_vllm.parallel import RankPlace, rank_place
from vllm.config import ParallelConfig, VllmConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

pytestmark = pytest.mark.vllm

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
LATENT = MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1, "head_size": 576})


def reason(*groups: Any, chunked_prefill: bool = True) -> str:
    """Why an engine with these groups of layers, one spec each, is declined."""
    config = VllmConfig()
    config.scheduler_config.enable_chunked_prefill = chunked_prefill
    named = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(groups)]
    return reason_to_decline(config, KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=named))


def test_full_attention_is_shared() -> None:
    assert reason(FULL) == ""
    assert reason(UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": FULL})) == ""


@pytest.mark.parametrize(
    "window", [{"sliding_window": 128}, {"attention_chunk_size": 128}], ids=lambda it: next(iter(it))
)
def test_windowed_layers_that_keep_the_whole_prefix_are_shared(window: dict[str, int]) -> None:
    windowed = FullAttentionSpec(**SHAPE, **window)
    assert reason(windowed) == ""
    assert reason(UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": windowed})) == ""


def test_another_kind_of_layer_is_declined() -> None:
    assert "SlidingWindowSpec" in reason(SlidingWindowSpec(**SHAPE, sliding_window=128))


def test_several_groups_are_declined() -> None:
    assert "keeps 2 groups of layers apart" in reason(FULL, FULL)


def test_latent_attention_is_shared_where_a_prefill_looks_at_what_was_before_it() -> None:
    assert reason(LATENT) == ""
    assert "cannot go on from a loaded prefix" in reason(LATENT, chunked_prefill=False)
    assert reason(FULL, chunked_prefill=False) == ""


def test_ranks_that_hold_the_same_latent_kv_store_it_once() -> None:
    config = VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="mp"))
    places = [rank_place(config, [LATENT, LATENT], tensor_rank=rank, pipeline_rank=0) for rank in range(2)]
    assert places == [RankPlace(0, 1, 1, stores=True), RankPlace(0, 1, 1, stores=False)]
    places = [rank_place(config, [FULL, FULL], tensor_rank=rank, pipeline_rank=0) for rank in range(2)]
    assert places == [RankPlace(0, 2, 1), RankPlace(1, 2, 1)]
    assert rank_place(config, [LATENT, FULL], tensor_rank=1, pipeline_rank=0) == RankPlace(1, 2, 1)
