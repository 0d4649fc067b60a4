"""A serving worker for tests: an engine of its own that does what it is told, line by line, and verifies every byte.

``python -m tests.engine.worker JSON`` with the engine's arguments; each line on stdin is a JSON command, each line on stdout
the answer to one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.engine.kv import fill, model_of, new_tensors, slots_of, wrong_blocks
from vcache.config import VCacheConfig
from vcache.engine import VCacheEngine
from vcache.log import configure

NUM_BLOCKS = 64


def main(arguments: dict[str, Any]) -> None:
    config = VCacheConfig()
    rank, ranks, device = arguments.get("rank", 0), arguments.get("ranks", 1), arguments.get("device", "cpu")
    configure(config.log_level, f"worker {rank}")
    tensors = new_tensors(NUM_BLOCKS, device=device)
    with VCacheEngine(
        config, model=model_of(ranks=ranks), rank=rank, kv_caches=tensors, donate=arguments.get("donate")
    ) as engine:
        answer({"ready": engine.get_stats()["server_available"]})
        for line in sys.stdin:
            command = json.loads(line)
            answer(obey(command, engine, rank, device))


def obey(command: dict[str, Any], engine: VCacheEngine, rank: int, device: str) -> dict[str, Any]:
    tokens: list[int] = command.get("tokens", [])
    salt: str = command.get("salt", "")
    match command["do"]:
        case "lookup":
            return {"hits": engine.lookup(tokens, salt=salt)}
        case "store":
            tensors = new_tensors(NUM_BLOCKS, device=device)
            fill(tensors, tokens, command["blocks"], rank=rank, salt=salt)
            engine.store(tokens, None, tensors, slots_of(command["blocks"]), salt=salt, pin=command.get("pin", 0.0))
            return {"stored": engine.get_stats()["stored"]}
        case "retrieve":
            tensors = new_tensors(NUM_BLOCKS, device=device)
            loaded = engine.retrieve(tokens, None, tensors, slots_of(command["blocks"]), salt=salt).tolist()
            wrong = wrong_blocks(tensors, tokens, command["blocks"], loaded, rank=rank, salt=salt)
            return {"loaded": sum(loaded), "wrong": wrong}
        case "flush":
            return {"flushed": engine.flush()}
        case "stats":
            return dict(engine.get_stats())
    raise ValueError(command)


def answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
