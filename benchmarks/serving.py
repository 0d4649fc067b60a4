"""What a serving engine gains and pays: real vLLM engines on a 2,000-token prompt, one without VCache, two with it.

In each round all get a prompt that nobody has seen. vLLM alone computes it. Engine A computes it too, finds nothing in the
pool and stores it: what it takes longer is the cost of a miss. Engine B then loads it from a donor's segment: what it takes
less is the gain of a hit. All three engines run all the time, but only one of them is asked at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import msgspec

from benchmarks.measure import Bar, Better, Effort, Result, compare, interleave
from vcache.config import VCacheConfig
from vcache.demo.model import MAX_TOKENS
from vcache.demo.pool import BLOCK_SIZE, CHUNK_SIZE, Donation, await_pool, start_pool
from vcache.demo.processes import Child, Stage
from vcache.demo.prompt import RESERVED_IDS, VOCABULARY
from vcache.demo.specs import EngineOutcome, EngineSpec, Question

PROMPT_TOKENS: Final = 2000
LOADABLE_TOKENS: Final = (PROMPT_TOKENS - 1) // CHUNK_SIZE * CHUNK_SIZE
#: Decoded after the prompt while what was computed is being stored: their time is part of a miss.
GENERATED_TOKENS: Final = 8
ROUNDS: Final = 9
ENGINE_TIMEOUT_S: Final = 300.0
ALONE, MISS, HIT = "vLLM alone", "VCache, miss", "VCache, hit"
HIT_BAR: Final = Bar(0.25, Better.LOWER)
MISS_BAR: Final = Bar(1.05, Better.LOWER)


def run(effort: Effort) -> list[Result]:
    """Milliseconds. Raises ``RuntimeError`` when an engine did not load, or compute, what it should have."""
    with Stage() as stage:
        runtime_dir = stage.directory / "pool"
        runtime_dir.mkdir(mode=0o700)
        config = VCacheConfig(runtime_dir=str(runtime_dir), chunk_size=CHUNK_SIZE, block_size=BLOCK_SIZE)
        start_pool(stage, config, [Donation("cpu:0", 256 << 20, "vram")])
        engines = {ALONE: _engine(stage, ALONE, config)}
        _await_ready(engines[ALONE])  # it builds the model
        sharing = {name: _engine(stage, name, config) for name in (MISS, HIT)}
        for engine in sharing.values():
            _await_ready(engine)
        engines |= sharing

        def await_stored(prompts: int) -> None:
            chunks = prompts * (PROMPT_TOKENS // CHUNK_SIZE)
            await_pool(stage, config, lambda stats: stats.entries >= chunks, what=f"{chunks} chunks to be in the pool")

        return _measured(engines, effort, await_stored)


def _measured(engines: dict[str, Child], effort: Effort, await_stored: Callable[[int], None]) -> list[Result]:
    first_token: dict[str, list[float]] = {name: [] for name in engines}
    prompts: dict[str, int] = dict.fromkeys(engines, 0)

    def asked(name: str) -> EngineOutcome:
        prompt = _prompt(prompts[name])
        prompts[name] += 1
        question = Question(prompt, GENERATED_TOKENS)
        result = engines[name].ask(question, timeout_s=ENGINE_TIMEOUT_S, on_stage=lambda stage: None)
        outcome = msgspec.convert(result, EngineOutcome)
        loaded = outcome.sources["external_kv_transfer"]
        if loaded != (LOADABLE_TOKENS if name == HIT else 0):
            raise RuntimeError(f"{name}: {loaded} of {PROMPT_TOKENS} tokens were loaded")
        first_token[name].append(outcome.ttft_s * 1e3)
        return outcome

    def whole_answer(name: str) -> Callable[[], float]:
        return lambda: asked(name).seconds * 1e3

    # B can only load what A has stored: the two who compute are shuffled, and B comes after them.
    rounds, whole = effort.rounds(ROUNDS), dict[str, list[float]]()
    for _ in range(rounds):
        for name, figures in interleave({n: whole_answer(n) for n in (ALONE, MISS)}, rounds=1, warmup=0).items():
            whole.setdefault(name, []).extend(figures)
        await_stored(prompts[MISS])
        asked(HIT)
    case = f"{PROMPT_TOKENS:,}-token prompt"
    hits = {name: first_token[name] for name in (ALONE, HIT)}
    return [
        *compare("serving: time to first token", case, hits, unit="ms", against=ALONE, bars={HIT: HIT_BAR}),
        *compare(
            "serving: whole answer",
            f"{case}, {GENERATED_TOKENS} tokens generated",
            whole,
            unit="ms",
            against=ALONE,
            bars={MISS: MISS_BAR},
        ),
    ]


def _prompt(number: int) -> list[int]:
    return random.Random(number).choices(range(RESERVED_IDS, VOCABULARY), k=PROMPT_TOKENS)


def _engine(stage: Stage, name: str, config: VCacheConfig) -> Child:
    is_alone = name == ALONE
    spec = EngineSpec(
        model=str(stage.directory / "model"),
        max_model_len=MAX_TOKENS,
        block_size=BLOCK_SIZE,
        step_tokens=PROMPT_TOKENS + BLOCK_SIZE,
        connector=None if is_alone else {"device": "cpu:0"},
    )
    path = stage.directory / f"{name.replace(' ', '-')}.json"
    path.write_bytes(msgspec.json.encode(spec))
    environment = {} if is_alone else config.environment()
    return stage.start(name, "vcache.demo.vllm_engine", str(path), environment=environment)


def _await_ready(engine: Child) -> None:
    engine.result(timeout_s=ENGINE_TIMEOUT_S, on_stage=lambda stage: None)
