"""A model in the manner of Gemma: most of its layers see only a window."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.conftest import CHUNK_SIZE, Host, build

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

GEMMA = """
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
config = Gemma3TextConfig(
    num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512,
    vocab_size=1000, max_position_embeddings=4096, sliding_window=128, initializer_range=0.05, query_pre_attn_scalar=64,
    tie_word_embeddings=False,  # tied and wide, it would repeat one token whatever the prefix
    layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
)
torch.manual_seed(1234)
Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained({path!r})
"""


def test_a_hybrid_model_loads_what_it_stored(host: Host, prompt: list[int], tmp_path: Path) -> None:
    """Without the hybrid KV cache manager, which vLLM leaves off for this connector, every layer keeps the whole prefix."""
    gemma = tmp_path / "gemma"
    build(gemma, GEMMA.format(path=str(gemma)))
    text = [token % 1000 for token in prompt[:1100]]
    host.start_pool()
    alone, engine = (host.engine(device, model=gemma, dtype="float32", step_tokens=512) for device in (None, "cpu:0"))
    expected = alone.generate(text)
    assert engine.generate(text).tokens == expected.tokens
    assert engine.ask("stats")["stored"] == 4
    engine.forget()
    loaded = engine.generate(text)
    assert (loaded.loaded, loaded.tokens) == (4 * CHUNK_SIZE, expected.tokens)
    host.zero_payloads()
    engine.forget()
    assert engine.generate(text).tokens != expected.tokens
