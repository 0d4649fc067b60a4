"""Which keys are there: VCache's server and Mooncake's master, each asked over its own protocol, in the same rounds.

Either runs on one core, its clients on the others. VCache's clients are sockets of one thread; Mooncake's are its own, in C++,
with a thread each. Not here: what an answer is good for (neither leases anything nor says where the bytes are), and memory.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Final

import torch

from benchmarks.measure import interleave
from benchmarks.mooncake_peer import MooncakeClient, await_room, mooncake
from benchmarks.server_rates import FIRST_CORE, UNIT, Caller, server_and_echo
from vcache import protocol
from vcache.demo.processes import Stage

SERVER: Final = "VCache's server"
MASTER: Final = "mooncake_master"
ENTRIES: Final = 1024
CALLS: Final = 160  # in one round


def presence(cases: Sequence[tuple[int, int]], *, rounds: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Microseconds a call, round by round, for each case: so many present keys a call, so many clients."""
    most = max(clients for _, clients in cases)
    names = [secrets.token_bytes(protocol.KEY_BYTES) for _ in range(ENTRIES)]
    with ExitStack() as ended:
        context, config, _, _ = ended.enter_context(server_and_echo())
        callers = [Caller(context, config.endpoint, f"bench-{at}") for at in range(most)]
        callers[0].register(records=2 * ENTRIES, nbytes=(2 * ENTRIES + 1) * UNIT)
        for start in range(0, ENTRIES, 512):
            callers[0].store(names[start : start + 512])
        clients = ended.enter_context(_clients_of_master([name.hex() for name in names], most))
        threads = ended.enter_context(ThreadPoolExecutor(most))
        figures = {}
        for keys, count in cases:
            asked = names[:keys]
            acts = {
                SERVER: _asking_server(callers[:count], b"".join(asked)),
                MASTER: _asking_master(clients[:count], [name.hex() for name in asked], threads),
            }
            figures[keys, count] = interleave(acts, rounds=rounds)
        return figures


def _asking_server(callers: Sequence[Caller], blob: bytes) -> Callable[[], float]:
    present = len(blob) // protocol.KEY_BYTES

    def figure() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS // len(callers)):
            asked = [caller.tell(protocol.Lookup, blob, 0.0) for caller in callers]
            for caller, name in zip(callers, asked, strict=True):
                if caller.reply(name).hits != present:
                    raise RuntimeError("VCache: a key is not there")
        return (time.perf_counter() - begin) / (CALLS // len(callers) * len(callers)) * 1e6

    return figure


def _asking_master(
    clients: Sequence[MooncakeClient], names: list[str], threads: ThreadPoolExecutor
) -> Callable[[], float]:
    def ask(client: MooncakeClient) -> None:
        for _ in range(CALLS // len(clients)):
            if sum(client.exist(names)) != len(names):
                raise RuntimeError("Mooncake: a key is not there")

    def figure() -> float:
        begin = time.perf_counter()
        list(threads.map(ask, clients))
        return (time.perf_counter() - begin) / (CALLS // len(clients) * len(clients)) * 1e6

    return figure


@contextmanager
def _clients_of_master(names: Sequence[str], count: int) -> Iterator[list[MooncakeClient]]:
    """Clients of a master that runs on the first core, whose store has an object of each name."""
    memory = torch.zeros(len(names) * UNIT, dtype=torch.uint8)
    elsewhere = os.sched_getaffinity(0)
    with Stage() as stage, ExitStack() as ended:
        os.sched_setaffinity(0, {FIRST_CORE})
        try:
            filler = ended.enter_context(mooncake(stage, nbytes=8 * memory.nbytes, in_process=False))
        finally:
            os.sched_setaffinity(0, elsewhere)
        filler.register(memory)
        await_room(filler, names[:1], memory, UNIT)
        filler.put(names, memory, UNIT)
        clients = [ended.enter_context(closing(MooncakeClient(filler.master, 0))) for _ in range(count)]
        yield clients
        filler.unregister(memory)
