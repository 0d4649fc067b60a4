"""The demo's story, whoever plays the engines: one prefix, computed once, loaded from each place that VCache keeps KV in.

A computes and stores             into the segment of its device, and through to the store: Mooncake, or a directory without it
B loads from that segment         VRAM tier
A stores more than it holds       the prefix is demoted
B loads from another segment      DRAM tier
A and every donor are killed      no segment is left
B loads from the store
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final, Protocol

import msgspec

from vcache.config import VCacheConfig
from vcache.demo.devices import Devices
from vcache.demo.display import Display
from vcache.demo.figures import EngineFigures
from vcache.demo.mooncake import Mooncake
from vcache.demo.pool import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    PATIENCE_S,
    Donation,
    await_pool,
    devices_in_use,
    server_stats,
    start_pool,
)
from vcache.demo.processes import Child, Stage
from vcache.demo.specs import Moved
from vcache.protocol import ServerStats

#: What eviction leaves of a full segment: less than what A stores last, so that all of the prefix goes.
LOW_WATERMARK: Final = 0.15
#: What lies below the pool, as ``EngineFigures.source`` has it.
STORE: Final = "mooncake" if find_spec("mooncake") is not None else "files"
_STORE_TITLES: Final = {"mooncake": "Mooncake", "files": "a store of files"}
OnStage = Callable[[str], None]


class Engine(Protocol):
    """One of the two processes that share the prefix."""

    name: str
    child: Child

    def answer(self, on_stage: OnStage) -> EngineFigures:
        """Answers the prompt as if for the first time; ``expected`` and ``source_device`` are for others to fill in."""
        ...

    def store_others(self, chunks: int, on_stage: OnStage) -> None:
        """Stores this many chunks that are not the prompt's."""
        ...


def source_of(moved: Moved) -> str:
    """Where an engine's bytes came from, as ``EngineFigures.source`` has it."""
    names = {"vram": "vram", "dram": "dram", "store": STORE}
    return "+".join(names[tier] for tier, nbytes in moved.read_bytes.items() if nbytes)


class Scene:
    """What the engines meet: a store, a metadata server, a donor of VRAM on each device, a donor of host memory."""

    def __init__(self, stage: Stage, display: Display, devices: Devices, *, chunks: int, chunk_bytes: int) -> None:
        """``chunks``: of the prefix, each of ``chunk_bytes``."""
        self.chunks = chunks
        #: A's segment has room for the prefix and for these.
        self.others = -(-chunks // 2)
        self._stage = stage
        self._display = display
        whole = (chunks + self.others) * chunk_bytes
        first, second, host = devices
        # One for each device: were there two on one, there would be room for what is to be demoted.
        vram = list(dict.fromkeys((first.name, second.name)))
        places = f"{' and '.join(vram)} (VRAM tier) and {host.name} (DRAM tier)"
        with display.step(f"starting a metadata server, donors on {places}, {_STORE_TITLES[STORE]}"):
            mooncake = Mooncake(stage, nbytes=whole + whole // 4 + (64 << 20)) if STORE == "mooncake" else None
            self.config = _config(stage, mooncake.address if mooncake is not None else "")
            directory = whole // 256 + (64 << 10)  # as small as may be: eviction begins when a segment is nearly full
            self._donors = start_pool(
                stage,
                self.config,
                [
                    *(Donation(name, whole + directory, "vram") for name in vram),
                    Donation(host.name, whole + whole // 4 + directory, "dram"),
                ],
            )
            if mooncake is not None:
                mooncake.await_ready()

    def play(self, first: Engine, second: Engine) -> list[EngineFigures]:
        """The answers in order. Raises ``ChildFailed`` or ``UnavailableError`` when the story does not go on."""
        with self._display.step(f"{first.name} computes the prompt and stores it") as on_stage:
            answers = [first.answer(on_stage)]
        answers.append(self._load(second, "vram", f"{second.name} loads it from {first.name}'s segment"))
        with self._display.step(f"{first.name} stores more than its segment holds: the prefix is demoted") as on_stage:
            first.store_others(self.others, on_stage)
            on_stage("waiting for the demotion")
            await_pool(self._stage, self.config, self._is_demoted, what="the prefix to be demoted")
        answers.append(self._load(second, "dram", f"{second.name} loads it from the DRAM tier"))
        with self._display.step(f"killing {first.name} and every donor: no segment is left"):
            self._stage.kill([first.child, *self._donors])
            await_pool(self._stage, self.config, lambda stats: not stats.segments, what="the donors to be missed")
        answers.append(self._load(second, STORE, f"{second.name} loads it from {_STORE_TITLES[STORE]}"))
        return answers

    def _load(self, engine: Engine, expected: str, title: str) -> EngineFigures:
        device = devices_in_use(server_stats(self.config), expected)
        with self._display.step(title) as on_stage:
            figures = engine.answer(on_stage)
        found = device if figures.source == expected else ""
        return msgspec.structs.replace(figures, expected=expected, source_device=found)

    def _is_demoted(self, stats: ServerStats) -> bool:
        """Whether the DRAM tier has as many chunks as the prefix, and VRAM no more than what was stored after it."""
        used = {"vram": 0, "dram": 0}
        for segment in stats.segments:
            used[segment.tier] += segment.records_used
        return used["dram"] >= self.chunks and used["vram"] <= self.others


def _config(stage: Stage, mooncake: str) -> VCacheConfig:
    """This machine's settings, except that everything lives in the demo's own directory, and that it is patient.

    ``mooncake``: the address of its master, if that is the store.
    Deadlines of a second are right in production, where a miss costs little; here it would spoil the story.
    """
    runtime_dir = stage.directory / "pool"
    runtime_dir.mkdir(mode=0o700)
    store: dict[str, Any] = {"kind": STORE}
    if mooncake:
        store["mooncake"] = {"master": mooncake}
    else:
        store["files"] = {"directory": str(stage.directory / "store")}
    return VCacheConfig(
        runtime_dir=str(runtime_dir),
        chunk_size=CHUNK_SIZE,
        block_size=BLOCK_SIZE,
        server={"endpoint": "", "eviction": {"low_watermark": LOW_WATERMARK}},
        client={"call_timeout": PATIENCE_S, "connect_timeout": PATIENCE_S},
        store={
            **store,
            "write_policy": "all",
            "staging_size": "128MiB",
            "guard": {"timeout": PATIENCE_S, "write_timeout": PATIENCE_S},
        },
        promotion={"policy": "never"},  # else what B loads once it would load from its own segment the next time
    )
