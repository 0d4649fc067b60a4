"""A small Llama with seeded random weights, built on the spot: a real model for a real engine, with nothing to download.

The wide initialisation (0.2; Llama's own is 0.02) makes greedy output depend on every part of the prompt: with the usual one
a random model repeats itself whatever its KV holds, and a demo of sharing KV could not fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vcache.demo.prompt import VOCABULARY

SEED: Final = 1234
LAYERS: Final = 4
HEADS: Final = 4
HEAD_SIZE: Final = 64  # a size that vLLM's CPU attention supports
MAX_TOKENS: Final = 4096


def build_model(path: Path, *, seed: int = SEED) -> None:
    """Writes configuration and weights (bfloat16, about 10 MB) to ``path``; the same bytes for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        intermediate_size=704,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.2,
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
