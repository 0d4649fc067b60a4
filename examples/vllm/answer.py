#!/usr/bin/env python3
"""One vLLM engine with VCache: answers a prompt of 1,000 tokens and says where its tokens came from.

python examples/vllm/answer.py MODEL CONNECTOR.json
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, for a quicker start
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main() -> None:
    model, connector = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=2048,
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**connector),
    )
    prompt = [(17 * i + i // 7) % 200 for i in range(1000)]
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
    sources = {
        metric.labels["source"]: int(metric.value)
        for metric in llm.get_metrics()
        if metric.name == "vllm:prompt_tokens_by_source"
    }
    print(f"answer:   {output.outputs[0].token_ids}")
    print(f"computed: {sources['local_compute']} tokens of the prompt")
    print(f"loaded:   {sources['external_kv_transfer']} tokens of the prompt, from the pool")
    llm.llm_engine.engine_core.shutdown()  # finishes what it was storing


if __name__ == "__main__":
    main()
