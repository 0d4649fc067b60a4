"""vLLM's own configuration of an engine that is not run: what its parts would be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig
from vllm.config import CacheConfig, ModelConfig, VllmConfig
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

BLOCK_SIZE: Final = 32
HEADS: Final = 2
HEAD_SIZE: Final = 32
NUM_BLOCKS: Final = 8
LAYER: Final = "layer"


class Layer:
    """What is asked of a layer that computes attention."""

    def get_attn_backend(self) -> Any:
        return CPUAttentionBackend


def save_model(directory: Path) -> None:
    """A model's configuration; it has no weights."""
    LlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=64,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)


def engine_config(model: Path, parts: dict[str, Any] | None = None, **options: Any) -> VllmConfig:
    """``options`` of the model, and ``parts`` of the rest."""
    quantized = {name: options.pop(name) for name in ("quantization", "quantization_config") if name in options}
    common = {"model": str(model), "skip_tokenizer_init": True, "dtype": "bfloat16", **options}
    config = VllmConfig(
        model_config=ModelConfig(**common), **{"cache_config": CacheConfig(block_size=BLOCK_SIZE), **(parts or {})}
    )
    if quantized:  # vLLM's CPU build would not run it
        config.model_config = ModelConfig(**common, **quantized)
    config.compilation_config.static_forward_context[LAYER] = Layer()
    return config


def kv_cache_config() -> KVCacheConfig:
    """One layer's blocks."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)
    return KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec([LAYER], spec)])


def kv_caches() -> dict[str, torch.Tensor]:
    """Its tensor, as vLLM's CPU backend lays it out."""
    return {LAYER: torch.zeros(NUM_BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.bfloat16)}
