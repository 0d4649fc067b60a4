"""Two ranks: each stores and loads its own shards, and a chunk is there only when both are.

Pipeline parallelism is not tested here: vLLM 0.32.0 itself does not run it on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.conftest import CHUNK_SIZE, Host, build

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

TWO_RANKS: dict[str, Any] = {"dtype": "float32", "step_tokens": 512, "processes": True, "tensor_parallel": 2}
BUILD_MLA = """
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from vcache.demo.prompt import VOCABULARY
config = DeepseekV2Config(
    num_hidden_layers=3, first_k_dense_replace=3, hidden_size=256, num_attention_heads=4, num_key_value_heads=4,
    kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=128,
    intermediate_size=512, vocab_size=VOCABULARY, max_position_embeddings=4096, initializer_range=0.2,
)
torch.manual_seed(7)
DeepseekV2ForCausalLM(config).to(torch.float32).save_pretrained({path!r})
"""


def test_two_ranks_load_what_two_ranks_stored(host: Host, prompt: list[int]) -> None:
    host.start_pool()
    text = prompt[:1100]
    alone = host.engine(**TWO_RANKS)
    expected = alone.generate(text)
    alone.stop()
    engine = host.engine("cpu:0", **TWO_RANKS)
    assert engine.generate(text).tokens == expected.tokens
    host.await_pool(lambda stats: stats.entries == 4)
    engine.forget()
    loaded = engine.generate(text)
    assert (loaded.loaded, loaded.tokens) == (4 * CHUNK_SIZE, expected.tokens)
    metrics = engine.ask("metrics")
    assert (metrics["vllm:vcache_stored_chunks"], metrics["vllm:vcache_loaded_chunks"]) == (8, 8)  # shards of both
    engine.stop()


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM's attention goes on from a prefix here")
def test_latent_attention_that_cannot_go_on_from_a_prefix_is_declined_and_served(
    host: Host, prompt: list[int], tmp_path: Path
) -> None:
    """On CPUs without AMX vLLM computes each prompt of an MLA model in one step, as a whole."""
    model = tmp_path / "deepseek"
    build(model, BUILD_MLA.format(path=str(model)))
    host.start_pool()
    text = prompt[:700]
    options: dict[str, Any] = {"dtype": "float32", "step_tokens": 512, "model": model}
    alone, engine = host.engine(**options), host.engine("cpu:0", **options)
    expected = alone.generate(text)
    for _ in range(2):
        answer = engine.generate(text)
        assert (answer.loaded, answer.tokens) == (0, expected.tokens)
    assert host.entries() == 0
    assert "cannot go on from a loaded prefix" in engine.child.log.read_text()
