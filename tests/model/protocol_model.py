"""The segment protocol (docs/architecture.md, rules 2 to 6) as a state machine small enough to be searched whole.

One segment, its donor, some writers that each store one chunk, one reader and the server. Every step that some process takes
alone is one transition, so any process may be suspended between any two of its steps, any message may be late, and time (a
deadline) may strike whenever it likes. ``Variant`` says which rules are in force: with all of them no state breaks a promise
(``promises.py``), without any one of them some state does.

The server's code takes the same steps under the same names (``vram_metadata_server/writes.py``, ``handover.py``,
``catalog.py``, ``removes.py``). Left out: several segments and ranks, sizes, eviction's choice, leases (they bound waiting,
not safety).
"""

from __future__ import annotations

from tests.model.changes import (
    is_removed,
    is_taken,
    moved,
    placed,
    reservation_of,
    settle,
    with_item,
    with_record,
    with_writer,
)  # fmt: skip
from tests.model.copies import copy_steps, may_copy, may_revive, pull_steps
from tests.model.own_segment import in_place_steps, is_held, late_steps
from tests.model.removal import answer_removal, awaiting, gate_opened, remove, retire_placement
from tests.model.state import (
    FREE,
    Donor,
    Placement,
    Reader,
    Record,
    Reservation,
    Retire,
    Server,
    State,
    Steps,
    Variant,
    Writer,
)


def start(variant: Variant) -> State:
    return State(
        records=(Record(FREE, "", -1),) * variant.records,
        cells=("",) * variant.cells,
        writers=(
            *(Writer("idle", key, 1) for key in variant.keys),
            *(Writer("idle", key, 1, is_copier=True) for key in variant.copied),
            *(Writer("idle", key, 1, is_copier=True, is_puller=True) for key in variant.pulled),
            *(Writer("idle", key, 1, is_late=True) for key in variant.late),
        ),
        donor=Donor(1),
        server=Server(
            incarnation=1, is_settled=True, is_handed_over=True, is_open=True,
            known=frozenset(range(len([*variant.keys, *variant.copied, *variant.pulled, *variant.late]))),
        ),
        reader=Reader(),
        evictions=variant.evictions,
        removals=variant.removals,
        restarts=variant.restarts,
        kills=variant.kills,
        silences=variant.silences,
    )  # fmt: skip


def steps(state: State, variant: Variant) -> Steps:
    """Every step that some process may take now."""
    for number, writer in enumerate(state.writers):
        yield from _writer_steps(state, variant, number, writer)
        yield from _evidence_steps(state, variant, number, writer)
    yield from _time_steps(state, variant)
    yield from _donor_steps(state, variant)
    yield from _server_steps(state, variant)
    yield from _reader_steps(state, variant)


# --- a write ------------------------------------------------------------------------------------------------------------


def _writer_steps(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    if not writer.is_alive:
        if writer.at == "sent":
            yield from _commit_arrives(state, variant, number, writer)
        return
    kind = "puller" if writer.is_puller else "copier" if writer.is_copier else "writer"
    name = f"{kind} {writer.key}"
    if writer.is_puller and writer.at in ("idle", "ordered", "staged"):
        yield from pull_steps(state, variant, number, writer)
    elif writer.at in ("idle", "proven"):
        yield from _reserve(state, variant, number, writer)
    elif writer.at == "asked":
        if writer.term == state.server.term:
            yield f"{name}: grant arrives", moved(state, number, writer, "granted")
    elif writer.is_late and writer.at in ("granted", "filled", "naming"):
        yield from late_steps(state, variant, number, writer)
    elif writer.at in ("granted", "named", "marked", "copied", "written", "committed"):
        yield from _memory_steps(state, variant, number, writer, name)
    elif writer.at == "sent":
        yield from _commit_arrives(state, variant, number, writer)
    if writer.at == "granted":
        yield from _abort_told(state, variant, number, writer)


def _memory_steps(state: State, variant: Variant, number: int, writer: Writer, name: str) -> Steps:
    if writer.at in ("granted", "named"):
        marked = Record(writer.generation - 1, writer.key, writer.cell)
        after = "written" if writer.is_late else "marked"
        yield f"{name}: marks", moved(with_record(state, writer.record, marked), number, writer, after)
    elif writer.is_copier and not writer.is_puller and writer.at in ("marked", "copied"):
        yield from copy_steps(state, variant, number, writer)
    elif writer.at == "marked":
        cells = with_item(state.cells, writer.cell, writer.staged if writer.is_puller else writer.key)
        yield f"{name}: writes its payload", moved(state._replace(cells=cells), number, writer, "written")
    elif writer.at == "written":
        committed = Record(writer.generation, writer.key, writer.cell)
        yield (
            f"{name}: commits in memory",
            moved(with_record(state, writer.record, committed), number, writer, "committed"),
        )
    elif writer.at == "committed":
        yield f"{name}: sends its commit", moved(state, number, writer, "sent")


def _reserve(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    server = state.server
    if not server.is_open or writer.term != server.term:
        return
    if not may_copy(server, writer.key) if writer.is_copier else is_taken(server, writer.claimed_key):
        return
    held: list[Placement | Reservation] = [*server.entries, *server.reservations]
    cells = set(range(len(state.cells))) - {holder.cell for holder in held}
    records = set(range(len(state.records))) - {holder.record for holder in held} - {r.record for r in server.retiring}
    if variant.retires_before_reuse:
        cells -= {retire.cell for retire in server.retiring}
    if not cells or not records:
        return
    generation, record, cell = server.next_generation, min(records), min(cells)
    reservation = Reservation(
        generation, number, "" if writer.is_late else writer.key, record, cell, server.incarnation,
        is_live=not writer.is_late, is_copy=writer.is_copier,
    )  # fmt: skip
    granted = server._replace(next_generation=generation + 2, reservations=server.reservations | {reservation})
    asked = writer._replace(
        at="asked", generation=generation, record=record, cell=cell, incarnation=server.incarnation,
        source=next(p for p in server.entries if p.key == writer.key) if writer.is_copier else None,
    )  # fmt: skip
    yield f"writer {writer.key}: reserve", with_writer(state._replace(server=granted), number, asked)


def _commit_arrives(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    """*commit told* or *commit refused*; a server of another term does not know what is meant."""
    server = state.server
    reservation = reservation_of(server, writer.generation)
    after = moved(state, number, writer, "done")
    if writer.term != server.term or reservation is None:
        yield f"writer {writer.key}: commit means nothing", after
    elif reservation.is_live:
        placement = Placement(reservation.key, reservation.record, reservation.generation, reservation.cell)
        entries = server.entries | {placement}
        told = server._replace(entries=entries, reservations=server.reservations - {reservation})
        yield f"writer {writer.key}: commit told", after._replace(server=told)
    else:
        yield f"writer {writer.key}: commit refused", after._replace(server=settle(server, reservation))


def _abort_told(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    reservation = reservation_of(state.server, writer.generation)
    after = moved(state, number, writer, "done")
    if reservation is not None and writer.term == state.server.term:
        after = after._replace(server=settle(state.server, reservation))
    yield f"writer {writer.key}: abort told", after


# --- evidence and time --------------------------------------------------------------------------------------------------


def _evidence_steps(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    server = state.server
    mine = [reservation for reservation in server.reservations if reservation.writer == number]
    if not writer.is_alive:
        if mine or number in server.waiting:
            proven = server._replace(waiting=server.waiting - {number})
            for reservation in mine:
                proven = settle(proven, reservation)
            yield f"writer {writer.key}: proven dead", state._replace(server=_open(proven))
        return
    if state.kills:
        killed = writer._replace(is_alive=False, at=writer.at if writer.at == "sent" else "done")
        yield f"writer {writer.key}: killed", with_writer(state._replace(kills=state.kills - 1), number, killed)
    if writer.term != server.term:
        yield from _hello(state, variant, number, writer)
        return
    evident = server
    for reservation in mine:
        is_seen = writer.at != "asked" or not variant.heartbeats_say_seen
        if is_seen and not (writer.is_outstanding and reservation.generation == writer.generation):
            if reservation.is_live:
                changed = reservation._replace(is_stopped=True)
                evident = evident._replace(reservations=evident.reservations - {reservation} | {changed})
            else:
                evident = settle(evident, reservation)
    if evident != server:
        yield f"writer {writer.key}: heartbeat settles", state._replace(server=evident)


def _hello(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    """A hello under a new term claims what is not yet committed in memory. What is, the donor's scan will find: it may have
    been found, removed and retired already. A grant of the old term that comes later is thrown away."""
    server = state.server
    server = server._replace(known=server.known | {number}, waiting=server.waiting - {number})
    is_over = writer.at in ("asked", "naming") or (writer.at == "committed" and variant.claims_only_unfinished)
    renewed = writer._replace(term=server.term, at="done" if is_over else writer.at)
    is_known = writer.generation in server.retired or any(p.generation == writer.generation for p in placed(server))
    if renewed.is_outstanding and not is_known:
        found = reservation_of(server, writer.generation)  # handed over as a writer at work, and nobody's until now
        claim = Reservation(
            writer.generation, number, writer.claimed_key, writer.record, writer.cell, writer.incarnation, False,
            is_copy=writer.is_copier,
        )  # fmt: skip
        if server.incarnation == writer.incarnation and claim.key and may_revive(server, claim):
            claim = claim._replace(is_live=True)
        server = awaiting(server, claim.key, claim.generation)
        server = server._replace(reservations=server.reservations - {found} | {claim})
    yield f"writer {writer.key}: hello", with_writer(state._replace(server=_open(server)), number, renewed)


def _time_steps(state: State, variant: Variant) -> Steps:
    server = state.server
    for reservation in server.reservations:
        if reservation.is_live:
            expired = reservation._replace(is_live=False)
            after = server._replace(reservations=server.reservations - {reservation} | {expired})
            if reservation.is_stopped or not variant.extents_return_on_evidence:
                after = settle(after, expired)
            yield f"reservation of {reservation.key} expires", state._replace(server=after)


# --- the donor ----------------------------------------------------------------------------------------------------------


def _donor_steps(state: State, variant: Variant) -> Steps:
    server, donor = state.server, state.donor
    if donor.term == server.term and not donor.was_dropped:
        for item in server.retiring - donor.done:
            if is_held(state, variant, item.record):
                continue
            found = state.records[item.record]
            after = state
            if found.generation in (item.generation, item.generation - 1):
                after = with_record(state, item.record, Record(FREE, "", -1))
            yield f"donor retires record {item.record}", after._replace(donor=donor._replace(done=donor.done | {item}))
        for item in donor.done:
            after = state._replace(donor=donor._replace(done=donor.done - {item}))
            if item in server.retiring:
                retired = server.retired if server.is_open else server.retired | {item.generation}
                after = after._replace(server=server._replace(retiring=server.retiring - {item}, retired=retired))
            yield f"retired told of record {item.record}", after
        if donor.pages is not None:
            yield from _handover(state, variant)
        elif server.is_handed_over and not server.is_open and not server.waiting:
            yield from _register(state, variant)  # ordered to, because a writer said hello only after the scan
        return
    yield from _register(state, variant)


def _register(state: State, variant: Variant) -> Steps:
    """*register*, and the scan after its answer. Under a new incarnation everything committed is retired first."""
    records, incarnation = state.records, state.donor.incarnation
    if state.donor.was_dropped and variant.retires_on_return:
        if is_held(state, variant):
            return
        records = tuple(Record(FREE, "", -1) if r.generation % 2 == 0 else r for r in records)
        incarnation += 1
    attached = {number for number, writer in enumerate(state.writers) if writer.is_alive}
    waiting = attached - state.server.known if variant.gate_waits_for_writers else set()
    server = state.server._replace(
        incarnation=incarnation,
        is_settled=not waiting or not variant.scans_after_hellos,
        is_handed_over=False,
        waiting=frozenset(waiting),
    )
    for claim in server.reservations:
        is_free = may_revive(server, claim) and not claim.is_live
        if (
            claim.incarnation == incarnation
            and is_free
            and claim.key
            and claim.writer >= 0
            and not state.donor.was_dropped
        ):
            revived = claim._replace(is_live=True)
            server = server._replace(reservations=server.reservations - {claim} | {revived})
    pages = tuple((at, record) for at, record in enumerate(records) if record.generation != FREE)
    donor = Donor(server.term, incarnation, pages=pages)
    yield "donor registers", state._replace(records=records, server=server, donor=donor)


def _handover(state: State, variant: Variant) -> Steps:
    server, donor = state.server, state.donor
    assert donor.pages is not None
    if not donor.pages:
        over = server._replace(is_handed_over=True)
        if not variant.removals_wait_for_gates:
            over = gate_opened(over)
        yield "handover ends", state._replace(server=_open(over), donor=donor._replace(pages=None))
        return
    at, record = donor.pages[0]
    after = state._replace(donor=donor._replace(pages=donor.pages[1:]))
    yield f"handover of record {at}", after._replace(server=_take(server, at, record, variant))


def _take(server: Server, at: int, record: Record, variant: Variant) -> Server:
    generation = record.generation + record.generation % 2
    server = server._replace(next_generation=max(server.next_generation, generation + 2))
    if generation in server.retired:
        return server  # scanned before it was retired
    server = awaiting(server, record.key, generation)
    held = reservation_of(server, generation)
    if record.generation % 2 and held is None and not any(p.generation == generation for p in placed(server)):
        nobodys = Reservation(generation, -1, record.key, at, record.cell, server.incarnation, is_live=False)
        return server._replace(reservations=server.reservations | {nobodys})
    if record.generation % 2 or any(p.generation == generation for p in placed(server)):
        return server
    if held is not None:
        server = server._replace(reservations=server.reservations - {held})
    retire = Retire(at, generation, record.cell, record.key)
    if (held is not None and not held.is_live) or is_removed(server, record.key, generation):
        return server._replace(retiring=server.retiring | {retire})
    return server._replace(entries=server.entries | {Placement(record.key, at, generation, record.cell)})


# --- the server ---------------------------------------------------------------------------------------------------------


def _server_steps(state: State, variant: Variant) -> Steps:
    server = state.server
    if state.evictions and server.is_open:
        for placement in server.entries:
            evicted = retire_placement(server, placement)
            yield f"evict {placement.key}", state._replace(server=evicted, evictions=state.evictions - 1)
    if state.removals and server.removal is None:
        for key in sorted({writer.key for writer in state.writers}):
            yield f"remove {key}", remove(state, variant, key)
    if server.removal is not None:
        yield from answer_removal(state, server.removal)
    if state.silences and server.incarnation and state.donor.term == server.term and not state.donor.was_dropped:
        dropped = server._replace(
            entries=frozenset(),
            retiring=frozenset(),
            reservations=frozenset(r._replace(is_live=False) for r in server.reservations if not r.is_stopped),
            incarnation=0,
            is_settled=False,
            is_handed_over=False,
            is_open=False,
            waiting=frozenset(),
            retired=frozenset(),
        )
        donor = Donor(state.donor.term, state.donor.incarnation, was_dropped=True)
        yield "drop segment: its donor is silent", state._replace(
            server=gate_opened(dropped), donor=donor, silences=state.silences - 1
        )  # fmt: skip
    if state.restarts:
        fresh = Server(term=server.term + 1, next_generation=server.next_generation)
        donor = state.donor._replace(pages=None, done=frozenset())
        yield "server restarts", state._replace(server=fresh, donor=donor, restarts=state.restarts - 1)


def _open(server: Server) -> Server:
    """*gate opens*, when nothing is left to wait for; what no writer has claimed is retired."""
    if not server.is_settled or not server.is_handed_over or server.waiting or server.is_open:
        return server
    for reservation in server.reservations:
        if reservation.writer < 0:
            server = settle(server, reservation)
    return gate_opened(server._replace(is_open=True, retired=frozenset()))


# --- a reader -----------------------------------------------------------------------------------------------------------


def _reader_steps(state: State, variant: Variant) -> Steps:
    reader = state.reader
    if reader.at == "idle":
        for placement in state.server.entries:
            yield f"reader: acquire {placement.key}", state._replace(reader=Reader("acquired", placement))
        return
    if reader.placement is None:
        return
    placement = reader.placement
    if variant.reads_in_place:
        yield from in_place_steps(state, variant)
        return
    found = state.records[placement.record]
    is_valid = (found.generation, found.key) == (placement.generation, placement.key)
    if reader.at == "acquired":
        if variant.validates_after_copy:
            yield from _copy(state, reader, placement)
        elif is_valid:
            yield "reader: validates, then copies", state._replace(reader=reader._replace(at="checked"))
    elif reader.at == "checked":
        yield from _copy(state, reader, placement)
    elif reader.at == "copied":
        if is_valid or not variant.validates_after_copy:
            yield "reader: validates", state._replace(reader=reader._replace(at="served"))
        else:
            server = state.server
            if placement in server.entries:
                server = retire_placement(server, placement)
            yield "reader reports", state._replace(reader=Reader(), server=server)


def _copy(state: State, reader: Reader, placement: Placement) -> Steps:
    copied = reader._replace(at="copied", copied=state.cells[placement.cell])
    yield "reader: copies", state._replace(reader=copied)
