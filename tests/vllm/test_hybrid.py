"""A model like Gemma, some of whose layers see only a window: shared where vLLM keeps all layers' KV alike, else declined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import CHUNK_SIZE, Host, build

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

WINDOW = 128
OPTIONS: dict[str, Any] = {"dtype": "float32", "step_tokens": 512}
BUILD = """
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from vcache.demo.prompt import VOCABULARY
config = Gemma3TextConfig(
    num_hidden_layers=6, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, sliding_window={window},
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64,
    intermediate_size=512, vocab_size=VOCABULARY, max_position_embeddings=4096,
    tie_word_embeddings=False, initializer_range=0.2,
)
torch.manual_seed(7)
Gemma3ForCausalLM(config).to(torch.float32).save_pretrained({path!r})
"""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights; greedy output depends on every part of the prompt, as the zeroed payloads show."""
    path = tmp_path_factory.mktemp("model") / "gemma"
    build(path, BUILD.format(path=str(path), window=WINDOW))
    return path


def test_windowed_layers_are_shared_where_all_layers_keep_the_whole_prefix(
    host: Host, gemma: Path, prompt: list[int]
) -> None:
    host.start_pool()
    text, whole = prompt[:1100], 4 * CHUNK_SIZE
    assert whole > 2 * WINDOW
    alone = host.engine(model=gemma, **OPTIONS)
    first, second = (host.engine(device, model=gemma, hybrid_manager=False, **OPTIONS) for device in ("cpu:0", "cpu:1"))
    expected = alone.generate(text)
    alone.stop()
    stored = first.generate(text)
    assert (stored.loaded, stored.tokens) == (0, expected.tokens)
    host.await_pool(lambda stats: stats.entries == 4)
    loaded = second.generate(text)
    assert (loaded.loaded, loaded.tokens) == (whole, expected.tokens)
    host.zero_payloads()
    first.forget()
    spoilt = first.generate(text)
    assert spoilt.loaded == whole and spoilt.tokens != expected.tokens, "what is loaded decides the answer"


def test_groups_kept_apart_are_declined_and_served(host: Host, gemma: Path, prompt: list[int]) -> None:
    host.start_pool()
    text = prompt[:700]
    alone, engine = host.engine(model=gemma, **OPTIONS), host.engine("cpu:0", model=gemma, **OPTIONS)
    expected = alone.generate(text)
    for _ in range(2):
        answer = engine.generate(text)
        assert (answer.loaded, answer.tokens) == (0, expected.tokens)
        engine.forget()
    assert host.entries() == 0
    assert "VCache takes no part in this engine: vLLM's hybrid KV cache manager keeps" in engine.child.log.read_text()
