"""What a donor's own process may do in its segment beyond what any client does: fill space before it has a key, and read in place.

*allocate* is a reservation without a key, expired from the start; *assign* gives it one. A hold keeps the donor from retiring a record:
what was validated under it is read later, at leisure, and not validated again.
"""

from __future__ import annotations

from tests.model.changes import is_taken, moved, reservation_of, settle, with_item
from tests.model.state import Reader, State, Steps, Variant, Writer


def late_steps(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    """Between the grant and the mark."""
    name, server = f"late writer {writer.key}", state.server
    if writer.at == "granted":
        cells = with_item(state.cells, writer.cell, writer.key)
        yield f"{name}: fills its extent", moved(state._replace(cells=cells), number, writer, "filled")
    elif writer.at == "filled" and writer.term == server.term:
        found = reservation_of(server, writer.generation)
        if found is None or found.is_stopped or found.incarnation != server.incarnation or is_taken(server, writer.key):
            after = moved(state, number, writer, "done")
            if found is not None:
                after = after._replace(server=settle(server, found))
            yield f"{name}: is not given its key, abort told", after
            return
        named = found._replace(key=writer.key, is_live=True)
        after = moved(state, number, writer, "naming")
        yield (
            f"{name}: assign",
            after._replace(server=server._replace(reservations=server.reservations - {found} | {named})),
        )
    elif writer.at == "naming" and writer.term == server.term:
        yield f"{name}: its key arrives", moved(state, number, writer, "named")


def in_place_steps(state: State, variant: Variant) -> Steps:
    """A reader in the donor's process: holds, then validates, then reads."""
    reader = state.reader
    placement = reader.placement
    assert placement is not None
    if reader.at == "acquired":
        yield "reader: holds the record", state._replace(reader=reader._replace(at="held"))
    elif reader.at == "held":
        found = state.records[placement.record]
        is_valid = (found.generation, found.key) == (placement.generation, placement.key)
        after = reader._replace(at="reading") if is_valid else Reader()
        yield "reader: validates", state._replace(reader=after)
    elif reader.at == "reading":
        copied = state.cells[placement.cell]
        yield "reader: reads in place", state._replace(reader=reader._replace(at="served", copied=copied))


def is_held(state: State, variant: Variant, record: int | None = None) -> bool:
    """Whether the donor may not retire this record (any record)."""
    reader = state.reader
    if not variant.holds_keep_records or reader.at not in ("held", "reading") or reader.placement is None:
        return False
    return record is None or reader.placement.record == record
