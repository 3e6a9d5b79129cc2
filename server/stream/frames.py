"""The frames of a stream: which is answered, which gives way to a newer one, and when the stream ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from server.admission import Admission
from server.exchange import HttpAnswer, PredictCall
from server.problems import Problem
from server.service import Service

GOING_AWAY: Final = 1001
_MESSAGE_TOO_BIG: Final = 1009
_PRIVATE: Final = 4000  # close codes from here on are free for applications (RFC 6455, 7.4.2)
# What would be true of the next frame too, or leaves the rest of a frame unread.
_FINAL: Final = frozenset(
    {
        *("unauthorized", "forbidden", "engine-not-found", "invalid-parameter"),
        *("body-too-large", "body-timeout", "malformed-request"),
    }
)

Send = Callable[[bytes], None]
Close = Callable[[int, str], None]


class FrameCall(PredictCall):
    """One frame: what `POST /predict` would be with the same head and an image as its body."""

    protocol = "stream"
    problem: Problem | None = None  # that it was refused with

    def announced_bytes(self) -> int:
        """See `Call`."""
        self._form = None
        return 0

    def refusal(self, problem: Problem) -> HttpAnswer:
        """See `Call`."""
        self.problem = problem
        return super().refusal(problem)


class _Frame:
    """One frame, from its first byte to its answer."""

    def __init__(self, service: Service, call: FrameCall, number: int, answered: Callable[[], None]) -> None:
        self.number = number
        self.call = call
        self.answer: bytes | None = None
        self._answered = answered
        self.admission = Admission(service, call, self._respond)

    def _respond(self, answer: HttpAnswer) -> None:
        self.answer = answer[2]
        self._answered()


class Frames:
    """Answers the frames of one client in their order, one at a time, always the newest that is there.

    A frame that is whole before the one ahead of it is answered waits; a newer one takes its place. So the
    answers lag by two frames at most, however slow the engine is. What ends the stream ends it after the
    answers to the frames that were whole before.

    Args:
        service: the application's.
        head: of the handshake, which stands for the head of every frame's request; as in ASGI.
        request_id: to repeat in the answers.
        send: takes an answer, in JSON.
        close: called once, with a close code and its reason, unless the stream is abandoned; nothing is sent
            after it.

    Attributes:
        count: frames that have begun to come.
        dropped: how many of them gave way.
    """

    def __init__(
        self, service: Service, head: Mapping[str, Any], request_id: str, send: Send, close: Close
    ) -> None:
        self.count = 0
        self.dropped = 0
        self._service = service
        self._head = head
        self._request_id = request_id
        self._send = send
        self._close = close
        self._coming: _Frame | None = None
        self._waiting: _Frame | None = None
        self._current: _Frame | None = None  # whose answer is next
        self._refused: _Frame | None = None  # the last one: it ends the stream before it is whole
        self._end: tuple[int, str] | None = None  # how the stream ends once nothing of it is left
        self._held = False
        self._over = False
        self._answered = -1  # number of the frame that was answered last

    def receive(self, piece: bytes, *, whole: bool) -> None:
        """A piece of a frame has come, or all of it."""
        if self._over or self._refused is not None or self._end is not None:
            return
        frame = self._coming
        if frame is None:
            call = FrameCall(self._head, self._request_id)
            frame = self._coming = _Frame(self._service, call, self.count, self._advance)
            self.count += 1
            frame.admission.open()
        frame.admission.receive(piece)
        if whole and self._coming is frame:
            frame.admission.arrive()
            self._coming = None
            if self._waiting is not None:
                self._waiting.admission.supersede()
                self.dropped += 1
            self._waiting = frame
            self._advance()

    def hold(self) -> None:
        """Send nothing until `go_on`: the client does not read."""
        self._held = True

    def go_on(self) -> None:
        """The client reads again."""
        self._held = False
        self._advance()

    def end(self, code: int, reason: str) -> None:
        """Take no further frames, and close when those that are whole are answered."""
        if self._end is None:
            self._end = code, reason
            self._leave_coming()
            self._advance()

    def abandon(self) -> None:
        """The client is gone."""
        self._over = True
        self._leave_coming()
        for frame in (self._waiting, self._current):
            if frame is not None:
                frame.admission.abandon()
        self._waiting = self._current = None

    def _leave_coming(self) -> None:
        if self._coming is not None:
            self._coming.admission.abandon()
            self._coming = None

    def _advance(self) -> None:
        """Do what can be done now: begin a frame, send an answer, close."""
        if self._coming is not None and self._ending(self._coming) is not None:
            self._refused, self._coming = self._coming, None
        while not self._over and not self._held:
            if self._current is None and not self._begin_next():
                return
            if self._current is not None:
                if self._current.answer is None:
                    return
                self._deliver(self._current)

    def _begin_next(self) -> bool:
        """Begin with the frame that is next, or close if the stream is to end; whether there was either."""
        if self._waiting is not None:
            self._current, self._waiting = self._waiting, None
            self._current.admission.complete()
        elif self._refused is not None:
            self._current = self._refused
        elif self._end is not None:
            self._finish(*self._end)
        else:
            return False
        return True

    def _deliver(self, frame: _Frame) -> None:
        assert frame.answer is not None
        self._current = None
        dropped = frame.number - self._answered - 1
        self._answered = frame.number
        # The answer is a JSON object that has members: these are two more.
        self._send(b'{"frame":%d,"dropped":%d,%b' % (frame.number, dropped, frame.answer[1:]))
        if (ending := self._ending(frame)) is not None:
            self._finish(*ending)

    def _ending(self, frame: _Frame) -> tuple[int, str] | None:
        """How the stream ends by `frame`, if it does: close code and reason."""
        problem = frame.call.problem
        if problem is None:
            return None
        if problem.name == "not-ready" and self._service.lifecycle.refusing:
            return GOING_AWAY, problem.detail
        if problem.name not in _FINAL:
            return None
        code = _MESSAGE_TOO_BIG if problem.name == "body-too-large" else _PRIVATE + problem.status
        return code, f"{problem.name}: {problem.detail}"

    def _finish(self, code: int, reason: str) -> None:
        self.abandon()
        self._close(code, reason)
