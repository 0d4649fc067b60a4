"""*remove*: gone from the index now, answered when gone from memory; what is being written of it is called off.

What was granted before a removal must not be found after its answer, whoever commits it in memory, and whenever the server is
restarted. Not promised: what lies with a donor that has not registered in this term.
"""

from __future__ import annotations

from tests.model.changes import is_removed, settle
from tests.model.state import Placement, Removal, Reservation, Retire, Server, State, Steps, Variant


def remove(state: State, variant: Variant, key: str) -> State:
    server = state.server
    waits = {item.generation for item in server.retiring if item.key == key}
    for placement in [placement for placement in server.entries if placement.key == key]:
        waits.add(placement.generation)
        server = retire_placement(server, placement)
    server = server._replace(removed_below=(key, server.next_generation))
    if variant.removals_call_off_writes:
        waits |= {reservation.generation for reservation in server.reservations if reservation.key == key}
        server = _call_off(server, key)
    is_promised = state.donor.term == server.term  # registered, if perhaps dropped since
    gone = waits | _granted(state, key) if is_promised else set()
    after = state._replace(removals=state.removals - 1)
    if not variant.answers_removals_late:
        return after._replace(server=server, gone=state.gone | gone)
    awaits_gate = bool(server.incarnation) and not server.is_open
    if not variant.removals_wait_for_gates:
        awaits_gate = awaits_gate and not server.is_handed_over
    return after._replace(server=server._replace(removal=Removal(key, frozenset(waits), awaits_gate, frozenset(gone))))


def answer_removal(state: State, removal: Removal) -> Steps:
    server = state.server
    held: list[Retire | Reservation] = [*server.retiring, *server.reservations]
    if not removal.awaits_gate and not removal.waits & {item.generation for item in held}:
        answered = server._replace(removal=None)
        yield f"removal of {removal.key} answered", state._replace(server=answered, gone=state.gone | removal.gone)


def awaiting(server: Server, key: str, generation: int) -> Server:
    """A handover or a hello has brought this: a removal that covers it waits for it, too."""
    removal = server.removal
    if removal is None or not removal.awaits_gate or not is_removed(server, key, generation):
        return server
    return server._replace(removal=removal._replace(waits=removal.waits | {generation}))


def gate_opened(server: Server) -> Server:
    """Nothing more will come that a removal has to wait for."""
    if server.removal is None:
        return server
    return server._replace(removal=server.removal._replace(awaits_gate=False))


def retire_placement(server: Server, placement: Placement) -> Server:
    retire = Retire(placement.record, placement.generation, placement.cell, placement.key)
    return server._replace(entries=server.entries - {placement}, retiring=server.retiring | {retire})


def _call_off(server: Server, key: str) -> Server:
    """The writes of the key under way: their commits are refused."""
    for write in [reservation for reservation in server.reservations if reservation.key == key]:
        if write.is_stopped:
            server = settle(server, write)
        else:
            server = server._replace(reservations=server.reservations - {write} | {write._replace(is_live=False)})
    return server


def _granted(state: State, key: str) -> set[int]:
    """Every generation of the key that memory or a writer knows."""
    in_memory = {record.generation + record.generation % 2 for record in state.records if record.key == key}
    with_writers = {writer.generation for writer in state.writers if writer.generation and writer.claimed_key == key}
    return in_memory | with_writers
