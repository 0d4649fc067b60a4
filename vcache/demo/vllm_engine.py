"""One real vLLM engine as a process of its own: answers prompts and reports what vLLM itself counted.

Run as ``python -m vcache.demo.vllm_engine SPEC.json --report-fd=N``, with questions on standard input. The token counts come
from vLLM's own metrics (``vllm:prompt_tokens_by_source``) and the time to the first token from its request metrics, never
from VCache; only bytes and seconds of the transfers are VCache's.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vcache.demo.messages import Reporter, requests
from vcache.demo.moved import await_store, await_written, moved
from vcache.demo.prompt import RESERVED_IDS
from vcache.demo.specs import EngineOutcome, EngineSpec, Question

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


class Engine:
    """vLLM, warmed up. Builds the model first if it is not there yet."""

    def __init__(self, spec: EngineSpec, reporter: Reporter) -> None:
        if not Path(spec.model).exists():
            reporter.stage("building the model")
            from vcache.demo.model import build_model

            build_model(Path(spec.model))
        reporter.stage("starting vLLM")
        self._llm = _start(spec)
        self._shares = spec.connector is not None
        reporter.stage("warming up")
        self.generate(list(range(RESERVED_IDS, RESERVED_IDS + WARM_UP_TOKENS)), max_tokens=8)
        if self._shares:
            await_store(self._figures)

    def answer(self, question: Question) -> EngineOutcome:
        """Answers as if it never saw the prompt; returns once what it stored has reached the store below the pool too."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM would not forget earlier prompts")
        sources, figures = self._tokens_by_source(), self._figures()
        begin = time.perf_counter()
        output = self.generate(question.prompt, max_tokens=question.max_tokens)
        seconds = time.perf_counter() - begin
        if self._shares:
            await_written(self._figures)
        now = self._tokens_by_source()
        return EngineOutcome(
            tokens=list(output.outputs[0].token_ids),
            ttft_s=output.metrics.first_token_latency,
            seconds=seconds,
            sources={name: now[name] - sources.get(name, 0) for name in now},
            moved=moved(figures, self._figures()) if self._shares else None,
        )

    def generate(self, prompt: list[int], *, max_tokens: int) -> Any:
        """VLLM's own result, greedy."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        return self._llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]

    def _tokens_by_source(self) -> dict[str, int]:
        return {metric.labels["source"]: metric.value for metric in self._llm.get_metrics() if metric.name == _SOURCES}

    def _figures(self) -> dict[str, Any]:
        """What the connector in this process counted."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: Any = get_kv_transfer_group() if self._shares else None
        return dict(connector.stats()) if connector is not None else {}


def _start(spec: EngineSpec) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    recompute: Literal["recompute"] = "recompute"
    transfer = spec.connector is not None and KVTransferConfig(
        kv_connector="VCacheConnector",
        kv_connector_module_path="vcache_vllm",
        kv_role="kv_both",
        kv_load_failure_policy=recompute,
        kv_connector_extra_config=spec.connector,
    )
    return LLM(
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--report-fd", type=int, required=True)
    arguments = parser.parse_args()
    spec = msgspec.json.decode(arguments.spec.read_bytes(), type=EngineSpec)
    reporter = Reporter(arguments.report_fd)
    set_environment(spec)
    engine = Engine(spec, reporter)
    reporter.result({})
    for request in requests():
        reporter.stage("answering")
        reporter.result(msgspec.to_builtins(engine.answer(msgspec.json.decode(request, type=Question))))


if __name__ == "__main__":
    main()
