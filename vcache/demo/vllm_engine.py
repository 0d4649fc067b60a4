"""One real vLLM engine as a process of its own: answers one prompt and reports what vLLM itself counted.

Run as ``python -m vcache.demo.vllm_engine SPEC.json --report-fd=N``. The token counts come from vLLM's own metrics
(``vllm:prompt_tokens_by_source``) and the time to the first token from its request metrics, never from VCache; only bytes
and seconds of the transfers are VCache's.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vcache.demo.messages import Reporter
from vcache.demo.specs import EngineOutcome, EngineSpec

#: Shorter than a chunk, so that it leaves nothing in the pool.
WARM_UP_TOKENS: Final = 40
_SOURCES: Final = "vllm:prompt_tokens_by_source"


def set_environment(spec: EngineSpec) -> None:
    """In-process engine, no network; before vLLM is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if spec.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[spec.gpu] if visible else str(spec.gpu)


def run_engine(spec: EngineSpec, reporter: Reporter) -> EngineOutcome:
    """Builds the model if it is not there yet, starts the engine, and answers the prompt once."""
    if not Path(spec.model).exists():
        reporter.stage("building the model")
        from vcache.demo.model import build_model

        build_model(Path(spec.model))
    reporter.stage("starting vLLM")
    llm, sampling = _start(spec)
    reporter.stage("warming up")
    llm.generate([{"prompt_token_ids": _warm_up_prompt(spec)}], sampling, use_tqdm=False)
    before = _tokens_by_source(llm)
    reporter.stage("answering the prompt")
    output = llm.generate([{"prompt_token_ids": spec.prompt}], sampling, use_tqdm=False)[0]
    after = _tokens_by_source(llm)
    return EngineOutcome(
        tokens=list(output.outputs[0].token_ids),
        ttft_s=output.metrics.first_token_latency,
        cached_tokens=output.num_cached_tokens,
        sources={name: after[name] - before.get(name, 0) for name in after},
        transfers=_transfers() if spec.connector is not None else {},
    )


def _start(spec: EngineSpec) -> tuple[Any, Any]:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    recompute: Literal["recompute"] = "recompute"
    transfer = spec.connector is not None and KVTransferConfig(
        kv_connector="VCacheConnector",
        kv_connector_module_path="vcache_vllm",
        kv_role="kv_both",
        kv_load_failure_policy=recompute,
        kv_connector_extra_config=spec.connector,
    )
    llm = LLM(
        model=spec.model,
        dtype="bfloat16",
        seed=0,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=spec.block_size,
        max_model_len=spec.max_model_len,
        max_num_batched_tokens=spec.step_tokens,
        max_num_seqs=4,
        gpu_memory_utilization=spec.gpu_memory_fraction,
        disable_log_stats=False,
        kv_transfer_config=transfer or None,
    )
    return llm, SamplingParams(temperature=0, max_tokens=spec.max_tokens, ignore_eos=True, detokenize=False)


def _warm_up_prompt(spec: EngineSpec) -> list[int]:
    return spec.prompt[:WARM_UP_TOKENS][::-1]


def _tokens_by_source(llm: Any) -> dict[str, int]:
    return {metric.labels["source"]: metric.value for metric in llm.get_metrics() if metric.name == _SOURCES}


def _transfers() -> dict[str, Any]:
    """Bytes and seconds as the connector in this process counted them."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    return dict(connector.stats())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--report-fd", type=int, required=True)
    arguments = parser.parse_args()
    spec = msgspec.json.decode(arguments.spec.read_bytes(), type=EngineSpec)
    reporter = Reporter(arguments.report_fd)
    set_environment(spec)
    outcome = run_engine(spec, reporter)
    reporter.result(msgspec.to_builtins(outcome))


if __name__ == "__main__":
    main()
