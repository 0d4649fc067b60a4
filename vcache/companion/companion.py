"""One life of a companion as its process sees it: its lanes, and the memory it may still touch."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from vcache.companion.link import Answer, Close, Failed, Link, LinkClosedError, Part, Ready

if TYPE_CHECKING:
    import msgspec

    from vcache.store.staging import Block

logger = logging.getLogger(__name__)
Heard = Callable[[Sequence[int]], None]

#: Calls under way at once, late ones included. More than the threads that make them, so that a few hung peers leave some.
LANES: Final = 12


class Companion:
    """Starts ``python -m MODULE LIFE CONTROL FD... LANE...`` (descriptors); ``kill`` ends it for certain. Thread-safe."""

    def __init__(
        self,
        module: str,
        setup: msgspec.Struct,
        decoder: msgspec.msgpack.Decoder[Any],
        *,
        fds: Sequence[int],
        environment: Mapping[str, str],
        lanes: int = LANES,
    ) -> None:
        """``setup`` is told first; ``decoder`` knows what comes back; ``fds`` are passed on."""
        self._life, their_life = socket.socketpair()
        _companions.add(self)
        control, their_control = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(lanes)]
        theirs = [their_life, their_control, *(their_lane for _, their_lane in pairs)]
        passed = [their_life.fileno(), their_control.fileno(), *fds, *(end.fileno() for end in theirs[2:])]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, passed)],
                pass_fds=passed,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the serving process, which then ends this one
            )
        finally:
            for end in theirs:
                end.close()
        self._control = Link(control, decoder)
        self._lock = threading.Lock()
        self._idle = [Link(ours, decoder) for ours, _ in pairs]
        self._late: list[tuple[Link, dict[int, Block]]] = []  # lanes with an answer to come, and the blocks it is about
        self._tainted: list[Block] = []
        self._ready: Ready | None = None
        self._ended = False
        self._control.send(setup)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def tainted_bytes(self) -> int:
        """Memory that failed transfers keep for as long as this process lives."""
        with self._lock:
            return sum(block.nbytes for block in self._tainted)

    @property
    def withheld_bytes(self) -> int:
        """The same, with what late calls have in use."""
        with self._lock:
            late = sum(block.nbytes for _, held in self._late for block in held.values())
            return late + sum(block.nbytes for block in self._tainted)

    def ready(self, timeout_s: float = 0.0) -> Ready | None:
        """What it said when it was ready, waiting so long for it. Raises ``LinkClosedError`` when it ended, or is about to."""
        with self._lock:
            if self._ended or self._popen.poll() is not None:
                raise LinkClosedError(f"the process ended (status {self._popen.returncode})")
            if self._ready is None:
                message = self._control.receive(timeout_s)
                if isinstance(message, Failed):
                    raise LinkClosedError(message.reason)
                self._ready = message if isinstance(message, Ready) else None
            return self._ready

    def ask(
        self, ask: msgspec.Struct, blocks: Sequence[Block], timeout_s: float, heard: Heard | None = None
    ) -> Answer | None:
        """The first answer; ``None`` when none came, and the process should be killed. As ``begin`` and ``Call.answer``."""
        return self.begin(ask, blocks).answer(timeout_s, heard)

    def begin(self, ask: msgspec.Struct, blocks: Sequence[Block]) -> Call:
        """Asks, and does not wait: the call's ``answer`` is to be taken.

        Takes a hold of its own on ``blocks``, let go as soon as it is certain that nothing touches them any more. Raises
        ``LinkClosedError`` when too many calls are under way.
        """
        lane = self._lane()
        held = dict(enumerate(blocks))
        for block in blocks:
            block.hold()
        try:
            lane.send(ask)
        except LinkClosedError as error:  # the answer will not come either
            logger.debug("not asked: %s", error)
        return Call(self, lane, held)

    def end(self, timeout_s: float) -> None:
        """Asks it to end in good order, and sees to it after ``timeout_s``."""
        try:
            if self.ready() is not None:
                self._control.send(Close())
                self._popen.wait(timeout_s)
        except (LinkClosedError, subprocess.TimeoutExpired) as error:
            logger.debug("process %d did not end by itself: %s", self.pid, error)
        self.kill()

    def kill(self) -> None:
        """Ends it now; when this returns nothing touches its blocks any more, and they are let go."""
        self._popen.kill()
        self._popen.wait()
        with self._lock:
            if self._ended:
                return
            self._ended = True
            late, self._late = self._late, []
            idle, self._idle = self._idle, []
            blocks = [block for _, held in late for block in held.values()] + self._tainted
            self._tainted = []
        for link in (self._control, *idle, *(lane for lane, _ in late)):  # the others are closed by who uses them
            link.close()
        self._life.close()
        for block in blocks:
            block.release()

    def _lane(self) -> Link:
        """A lane for one ask; it goes back by ``put_back``."""
        settled: list[tuple[dict[int, Block], Answer]] = []
        with self._lock:
            for entry in [entry for entry in self._late if entry[0].readable(0.0)]:
                answer = _received(entry[0])
                if isinstance(answer, Answer):  # else the process has ended, and ``kill`` will let go of the blocks
                    self._late.remove(entry)
                    self._idle.append(entry[0])
                    settled.append((entry[1], answer))
            lane = self._idle.pop() if self._idle else None
        for held, answer in settled:
            self.finished(held, answer)
        if lane is None:
            raise LinkClosedError(f"{LANES} calls to process {self.pid} are under way")
        return lane

    def put_back(self, lane: Link, late: dict[int, Block] | None = None) -> None:
        """For calls. ``late``: the ask goes on, and has these blocks in use."""
        with self._lock:
            if not self._ended:
                if late is None:
                    self._idle.append(lane)
                else:
                    self._late.append((lane, late))
                return
        lane.close()
        for block in (late or {}).values():
            block.release()

    def finished(self, held: Mapping[int, Block], answer: Answer) -> None:
        """For calls: what an ask had in use comes free, save what a failed transfer may still touch."""
        codes = answer.codes or [0] * (max(held, default=-1) + 1)  # none: it could not even be asked
        with self._lock:
            tainted = [] if self._ended else [block for index, block in held.items() if codes[index] < 0]
            self._tainted += tainted
        for block in held.values():
            if block not in tainted:
                block.release()


_companions: Final[weakref.WeakSet[Companion]] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child would keep its parent's companions, and the memory they have mapped, when the parent has long been dead."""
    for companion in list(_companions):
        companion._life.close()


os.register_at_fork(after_in_child=_forget_in_child)


class Call:
    """An ask under way. Not thread-safe."""

    def __init__(self, companion: Companion, lane: Link, held: dict[int, Block]) -> None:
        self._companion = companion
        self._lane = lane
        self._held = held
        #: After ``answer``: none came, because the process was gone.
        self.is_lost = False

    def is_answered(self, wait_s: float = 0.0) -> bool:
        """Whether ``answer`` would not wait, waiting so long for that. For any number of threads."""
        return self._lane.readable(wait_s)

    def answer(self, timeout_s: float, heard: Heard | None = None) -> Answer | None:
        """The first answer, to be taken once; ``None`` when none came. What is not answered keeps its blocks.

        ``heard`` is called with the indices of what is done before that.
        """
        answer = None
        held = self._held
        deadline = time.monotonic() + timeout_s
        try:
            while isinstance(answer := self._lane.receive(deadline - time.monotonic()), Part):
                for index in answer.indices:
                    held.pop(index).release()
                if heard is not None:
                    heard(answer.indices)
        except LinkClosedError as error:
            self.is_lost = True
            logger.debug("no answer: %s", error)
        if not isinstance(answer, Answer):
            self._companion.put_back(self._lane, late=held)
            return None
        if answer.last:
            self._companion.put_back(self._lane)
            self._companion.finished(held, answer)
        else:
            done = {index: held.pop(index) for index in [*held] if answer.codes[index] >= 0}
            self._companion.finished(done, answer)
            self._companion.put_back(self._lane, late=held)
        return answer


def _received(lane: Link) -> object:
    try:
        return lane.receive()
    except LinkClosedError:
        return None
