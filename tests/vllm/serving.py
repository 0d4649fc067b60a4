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
LOADING = "LOADING"
BLOCK_SIZE = 32
SOURCES = "vllm:prompt_tokens_by_source"
OURS = "vllm:vcache_"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the engine is started. ``connector``: the connector's options, None for vLLM alone.

    processes: vLLM's own engine process, with a worker process for each of ``tensor_parallel`` ranks.
    plugin: the connector is found by vLLM's plugins, without a module path.
    hybrid_manager: whether vLLM may keep groups of unlike layers apart, as is its default.
    """

    model: str
    connector: dict[str, Any] | None = None
    dtype: str = "bfloat16"
    step_tokens: int = 2048
    num_blocks: int | None = None
    max_model_len: int = 4096
    prefix_caching: bool = True
    processes: bool = False
    tensor_parallel: int = 1
    role: str = "kv_both"
    plugin: bool = False
    events: bool = False
    hybrid_manager: bool = True


class Serving:
    """The engine and what it can be told to do."""

    def __init__(self, options: Options) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="1" if options.processes else "0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        ranks = options.tensor_parallel
        if ranks > 1:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
                str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:ranks]
            )
        from vllm import LLM
        from vllm.config import KVEventsConfig, KVTransferConfig

        self._events: list[Any] = []
        if options.events:
            self._record_events()
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
            tensor_parallel_size=options.tensor_parallel,
            disable_hybrid_kv_cache_manager=None if options.hybrid_manager else True,
            disable_log_stats=False,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null") if options.events else None,
            kv_transfer_config=None
            if options.connector is None
            else KVTransferConfig(
                kv_connector="VCacheConnector",
                kv_connector_module_path=None if options.plugin else "vcache_vllm",
                kv_role=options.role,
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=options.connector,
            ),
        )

    def generate(self, prompts: list[list[int]], max_tokens: int, salt: str | None = None) -> dict[str, Any]:
        """Answers prompts that arrive together."""
        before = self._metrics(SOURCES, "source")
        extra = {} if salt is None else {"cache_salt": salt}
        inputs: Any = [{"prompt_token_ids": ids, **extra} for ids in prompts]
        outputs = self.llm.generate(inputs, self._sampling(max_tokens), use_tqdm=False)
        after = self._metrics(SOURCES, "source")
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "sources": {name: int(after[name] - before.get(name, 0)) for name in after},
        }

    def abort(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Aborts a request after so many of its steps."""
        engine: Any = self.llm.llm_engine
        engine.add_request("to-be-aborted", {"prompt_token_ids": prompt}, self._sampling(8))
        for _ in range(steps):
            engine.step()
        engine.abort_request(["to-be-aborted"])
        for _ in range(5):
            engine.step()
        return {"unfinished": engine.has_unfinished_requests()}

    def forget(self, connector: bool = False) -> dict[str, Any]:
        """Empties vLLM's own prefix cache; with ``connector``, the pool too."""
        return {"done": self.llm.reset_prefix_cache(reset_connector=connector)}

    def stats(self) -> dict[str, Any]:
        """What the connector in this process counted, once what it began is done."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector: Any = get_kv_transfer_group()
        return dict(connector.stats())

    def metrics(self) -> dict[str, Any]:
        """Our Prometheus metrics, as vLLM publishes them."""
        return {metric.name: metric.value for metric in self.llm.get_metrics() if metric.name.startswith(OURS)}

    def events(self) -> dict[str, Any]:
        """The KV events that vLLM took from the connector since the last call: kind, medium, number of hashes."""
        taken, self._events = self._events, []
        return {"events": [(type(event).__name__, event.medium, len(event.block_hashes)) for event in taken]}

    def pause_next_load(self) -> dict[str, Any]:
        """Wraps the engine's real load, once: says ``LOADING`` and waits for a line before the bytes are copied."""
        from vcache.engine import VCacheEngine

        begin = VCacheEngine.begin_retrieve

        def begin_after_pause(engine: VCacheEngine, *arguments: Any, **more: Any) -> Any:
            setattr(VCacheEngine, "begin_retrieve", begin)  # noqa: B010 - mypy refuses the plain assignment
            print(LOADING, flush=True)
            sys.stdin.readline()
            return begin(engine, *arguments, **more)

        setattr(VCacheEngine, "begin_retrieve", begin_after_pause)  # noqa: B010
        return {}

    def _record_events(self) -> None:
        from vcache_vllm.connector import VCacheConnector

        take = VCacheConnector.take_events

        def take_and_record(connector: VCacheConnector) -> Any:
            taken = list(take(connector))
            self._events += taken
            return taken

        setattr(VCacheConnector, "take_events", take_and_record)  # noqa: B010

    def _sampling(self, max_tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

    def _metrics(self, name: str, label: str) -> dict[str, float]:
        return {m.labels[label]: m.value for m in self.llm.get_metrics() if m.name == name}


def main() -> None:
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Options)
    serving = Serving(options)
    print(ANSWER + json.dumps({"ready": True}), flush=True)
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        answer = getattr(serving, command.pop("do"))(**command)
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
