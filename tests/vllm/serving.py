"""A real vLLM engine as a child process that answers what it is told, one JSON line at a time.

``python -m tests.vllm.serving OPTIONS``: commands come on stdin, answers go to stdout after ``ANSWER``. What an engine counts
(tokens by source) is vLLM's own count.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

ANSWER = "ANSWER "
BLOCK_SIZE = 32
SOURCES = "vllm:prompt_tokens_by_source"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the engine is started. ``connector``: the connector's options, None for vLLM alone."""

    model: str
    connector: dict[str, Any] | None = None
    dtype: str = "bfloat16"
    step_tokens: int = 2048
    num_blocks: int | None = None
    max_model_len: int = 4096
    prefix_caching: bool = True
    pause_before_load: bool = False


class Serving:
    """The engine and what it can be told to do."""

    def __init__(self, options: Options) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if options.pause_before_load:
            pause_before_each_load()
        self.llm = LLM(
            model=options.model,
            dtype=options.dtype,
            seed=0,
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=BLOCK_SIZE,
            max_model_len=options.max_model_len,
            max_num_batched_tokens=options.step_tokens,
            max_num_seqs=4,
            num_gpu_blocks_override=options.num_blocks,
            enable_prefix_caching=options.prefix_caching,
            disable_log_stats=False,
            kv_transfer_config=None
            if options.connector is None
            else KVTransferConfig(
                kv_connector="VCacheConnector",
                kv_connector_module_path="vcache_vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=options.connector,
            ),
        )

    def generate(self, prompts: list[list[int]], max_tokens: int, salt: str | None = None) -> dict[str, Any]:
        """Answers prompts that arrive together."""
        from vllm import SamplingParams

        before = self._sources()
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        extra = {} if salt is None else {"cache_salt": salt}
        outputs = self.llm.generate([{"prompt_token_ids": ids, **extra} for ids in prompts], sampling, use_tqdm=False)
        after = self._sources()
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
            "sources": {name: int(after[name] - before.get(name, 0)) for name in after},
        }

    def forget(self) -> dict[str, Any]:
        """Empties vLLM's own prefix cache."""
        return {"done": self.llm.reset_prefix_cache()}

    def stats(self) -> dict[str, Any]:
        """What the connector in this process counted."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: Any = get_kv_transfer_group()
        return dict(connector.stats())

    def _sources(self) -> dict[str, float]:
        return {m.labels["source"]: m.value for m in self.llm.get_metrics() if m.name == SOURCES}


def pause_before_each_load() -> None:
    """Wraps the engine's real load: says ``LOADING`` and waits for a line before the bytes are copied."""
    from vcache.engine import VCacheEngine

    begin = VCacheEngine.begin_retrieve

    def begin_after_pause(self: VCacheEngine, *arguments: Any) -> Any:
        print("LOADING", flush=True)
        sys.stdin.readline()
        return begin(self, *arguments)

    setattr(VCacheEngine, "begin_retrieve", begin_after_pause)  # noqa: B010 - mypy refuses the plain assignment


def main() -> None:
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Options)
    serving = Serving(options)
    print(ANSWER + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(serving, command.pop("do"))(**command)
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
