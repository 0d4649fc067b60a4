"""What determines an engine's KV is in the description of its model; engines whose KV cannot be shared rightly are declined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vcache_vllm.model_spec import model_spec, reason_to_decline
from vcache_vllm.parallel import RankPlace, rank_place
from vllm.config import AttentionConfig, CacheConfig, LoadConfig, ParallelConfig, VllmConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.vllm.configurations import engine_config, kv_cache_config, save_model

pytestmark = pytest.mark.vllm

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
LATENT = MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1, "head_size": 576})
ONLINE = {"quantization": "online"}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512}
LONG_ROPE |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}

Describe = Callable[..., bytes]


@pytest.fixture
def describe(tmp_path: Path) -> Describe:
    """Makes an engine's fingerprint from vLLM's own configuration of it."""
    save_model(tmp_path)

    def describe(weights: str | None = None, **options: Any) -> bytes:
        config = engine_config(tmp_path, **options)
        place = RankPlace(0, 1, 1)
        spec = model_spec(config, kv_cache_config(), place, chunk_size=64, layout="like this", weights=weights)
        return spec.fingerprint()

    return describe


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {**ONLINE, "quantization_config": {"linear": "fp8_per_tensor"}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
        {"dtype": "float32"},
        {"weights": "ours@2"},
        {"parts": {"cache_config": CacheConfig(block_size=32, kv_cache_dtype_skip_layers=["0"])}},
        {"parts": {"attention_config": AttentionConfig(use_non_causal=True)}},
        {"parts": {"load_config": LoadConfig(load_format="dummy")}},
    ],
    ids=lambda options: "-".join(options.get("parts", options)),
)
def test_options_that_change_the_kv_separate_engines(describe: Describe, options: dict[str, Any]) -> None:
    assert describe(**options) != describe()


def test_weights_quantized_in_another_way_as_they_are_loaded_are_told_apart(describe: Describe) -> None:
    ways = [
        {"linear": "fp8_per_tensor"},
        {"linear": "fp8_per_block"},
        {"linear": "fp8_per_block", "ignore": ["lm_head"]},
    ]
    assert len({describe(**ONLINE, quantization_config=way) for way in ways}) == 3
    assert describe(**ONLINE, quantization_config=ways[1]) == describe(**ONLINE, quantization_config=ways[1])


def test_the_longest_context_counts_where_positions_depend_on_it(describe: Describe) -> None:
    long = {"hf_overrides": {"rope_parameters": LONG_ROPE}}
    assert describe(**long, max_model_len=256) != describe(**long, max_model_len=1024)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3},
        {"max_model_len": 512},
        {"served_model_name": "another"},
        {"enforce_eager": True},
        {"parts": {"cache_config": CacheConfig(block_size=32, gpu_memory_utilization=0.5)}},
        {"parts": {"attention_config": AttentionConfig(flash_attn_max_num_splits_for_cuda_graph=16)}},
        {"parts": {"load_config": LoadConfig(safetensors_load_strategy="eager")}},
    ],
    ids=lambda options: "-".join(options.get("parts", options)),
)
def test_options_that_leave_the_kv_alone_do_not(describe: Describe, options: dict[str, Any]) -> None:
    assert describe(**options) == describe()


def test_weights_that_have_a_name_are_not_read(describe: Describe, tmp_path: Path) -> None:
    named = describe(weights="ours@1")
    (tmp_path / "pytorch_model.bin").write_bytes(b"what it holds does not matter")
    assert describe(weights="ours@1") == named
    assert describe(weights="ours@2") != named


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
