"""Small changes to a state of the model, and questions about it."""

from __future__ import annotations

from tests.model.state import Placement, Record, Reservation, Retire, Server, State, Writer


def placed(server: Server) -> list[Placement | Retire]:
    return [*server.entries, *server.retiring]


def reservation_of(server: Server, generation: int) -> Reservation | None:
    return next((r for r in server.reservations if r.generation == generation), None)


def is_taken(server: Server, key: str) -> bool:
    return any(p.key == key for p in server.entries) or any(r.is_live and r.key == key for r in server.reservations)


def is_removed(server: Server, key: str, generation: int) -> bool:
    """Whether this term's removal covers what was granted as this generation."""
    below = server.removed_below
    return below is not None and below[0] == key and generation < below[1]


def with_item(values: tuple[str, ...], at: int, value: str) -> tuple[str, ...]:
    return (*values[:at], value, *values[at + 1 :])


def with_record(state: State, at: int, record: Record) -> State:
    return state._replace(records=(*state.records[:at], record, *state.records[at + 1 :]))


def with_writer(state: State, number: int, writer: Writer) -> State:
    return state._replace(writers=(*state.writers[:number], writer, *state.writers[number + 1 :]))


def moved(state: State, number: int, writer: Writer, at: str) -> State:
    return with_writer(state, number, writer._replace(at=at))


def settle(server: Server, reservation: Reservation) -> Server:
    """There is evidence (or, wrongly, a deadline): *order retire*."""
    after = server._replace(reservations=server.reservations - {reservation})
    if not server.incarnation:
        return after
    retire = Retire(reservation.record, reservation.generation, reservation.cell, reservation.key)
    return after._replace(retiring=after.retiring | {retire})
