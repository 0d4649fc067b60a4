"""One life of the Mooncake process as the serving process sees it: its lanes, and the memory it may still touch."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from vcache.store.mooncake_wire import Answer, Ask, Close, Failed, Link, LinkClosedError, Ready, Setup

if TYPE_CHECKING:
    from vcache.store.staging import Block

logger = logging.getLogger(__name__)

#: Calls under way at once, late ones included. More than the guard's threads, so that a few hung owners leave some.
LANES: Final = 12


class Companion:
    """Starts the process; ``kill`` ends it for certain. Thread-safe."""

    def __init__(self, setup: Setup, staging_fd: int, environment: Mapping[str, str]) -> None:
        self._life, their_life = socket.socketpair()
        control, their_control = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(LANES)]
        theirs = [their_life, their_control, *(their_lane for _, their_lane in pairs)]
        fds = [their_life.fileno(), their_control.fileno(), staging_fd, *(end.fileno() for end in theirs[2:])]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "vcache.store.mooncake_process", *map(str, fds)],
                pass_fds=fds,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the serving process, which then ends this one
            )
        finally:
            for end in theirs:
                end.close()
        self._control = Link(control)
        self._lock = threading.Lock()
        self._idle = [Link(ours) for ours, _ in pairs]
        self._late: list[tuple[Link, dict[int, Block]]] = []  # lanes with an answer to come, and the blocks it is about
        self._tainted: list[Block] = []
        self._is_ready = False
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

    def is_ready(self) -> bool:
        """Whether it has joined the store. Raises ``LinkClosedError`` when it ended, or is about to."""
        with self._lock:
            if self._ended or self._popen.poll() is not None:
                raise LinkClosedError(f"the Mooncake process ended (status {self._popen.returncode})")
            if not self._is_ready:
                message = self._control.receive(0.0)
                if isinstance(message, Failed):
                    raise LinkClosedError(message.reason)
                self._is_ready = isinstance(message, Ready)
            return self._is_ready

    def ask(self, ask: Ask, blocks: Sequence[Block], timeout_s: float) -> Answer | None:
        """The first answer; ``None`` when none came, and the process should be killed.

        Takes a hold of its own on ``blocks``, let go as soon as it is certain that nothing touches them any more. Raises
        ``LinkClosedError`` when too many calls are under way.
        """
        lane = self._lane()
        held = dict(enumerate(blocks))
        for block in blocks:
            block.hold()
        answer = None
        try:
            lane.send(ask)
            answer = lane.receive(timeout_s)
        except LinkClosedError as error:
            logger.debug("no answer: %s", error)
        if not isinstance(answer, Answer):
            self._put_back(lane, late=held)
            return None
        if answer.last:
            self._put_back(lane)
            self._finished(held, answer)
        else:
            done = {index: held.pop(index) for index, code in enumerate(answer.codes) if code >= 0}
            self._finished(done, answer)
            self._put_back(lane, late=held)
        return answer

    def end(self, timeout_s: float) -> None:
        """Asks it to leave the store and end, and sees to it after ``timeout_s``."""
        try:
            if self.is_ready():
                self._control.send(Close())
                self._popen.wait(timeout_s)
        except (LinkClosedError, subprocess.TimeoutExpired) as error:
            logger.debug("the Mooncake process did not end by itself: %s", error)
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
        """A lane for one ask; it goes back by ``_put_back``."""
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
            self._finished(held, answer)
        if lane is None:
            raise LinkClosedError(f"{LANES} calls to the Mooncake process are under way")
        return lane

    def _put_back(self, lane: Link, late: dict[int, Block] | None = None) -> None:
        """``late``: the ask goes on, and has these blocks in use."""
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

    def _finished(self, held: Mapping[int, Block], answer: Answer) -> None:
        """What an ask had in use comes free, save what a failed transfer may still touch."""
        codes = answer.codes or [0] * (max(held, default=-1) + 1)  # none: the store could not even be asked
        with self._lock:
            tainted = [] if self._ended else [block for index, block in held.items() if codes[index] < 0]
            self._tainted += tainted
        for block in held.values():
            if block not in tainted:
                block.release()


def _received(lane: Link) -> object:
    try:
        return lane.receive()
    except LinkClosedError:
        return None
