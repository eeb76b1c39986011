"""Continuous batching: requests wait in a bounded queue, join the rows that decode, and leave when they are done.

Plain objects and one loop; it knows nothing of HTTP. Each request gets the tokens that it would get alone: joining rows
changes no scores (`rows` tries that), and each draws from a stream of its own.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from onnx_autoglm.errors import UserError
from onnx_autoglm.rows import RowEngine, Rows
from onnx_autoglm.sampling import GREEDY, Sampling, pick

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]

FAILURES = (UserError, MemoryError)  # of one step; anything else is a bug
USUAL_SECONDS = 1.0  # of a request, before any was served
SMOOTHING = 0.2  # the weight of the latest request in the running mean of their times


@dataclasses.dataclass(frozen=True)
class Event:
    """One token, or the end: then `finish` says why, and `error` what went wrong."""

    token: int | None = None
    finish: Finish | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue: `stops` are tokens that end the text, `timeout` is in seconds and counts waiting.

    `emit` is called with each event from the thread that runs the scheduler, and must not block.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    emit: Callable[[Event], None]
    sampling: Sampling = GREEDY
    seed: tuple[int, ...] = (0,)
    stops: frozenset[int] = frozenset()
    timeout: float | None = None


class Refused(Exception):
    """There is no room for a request; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Closed(Exception):
    """The scheduler takes no more requests."""


class Ticket:
    """A request that was taken; `cancel` ends it at the next step."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = time.monotonic()
        self.cancelled = False
        self.written: list[int] = []
        self.read = 0  # tokens of the prompt
        self.place: tuple[Rows, int] | None = None  # the state that holds its row, and which row of it
        self._draws = np.random.default_rng(request.seed)

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def overdue(self) -> bool:
        timeout = self.request.timeout
        return timeout is not None and time.monotonic() - self.started > timeout

    def draw(self, scores: np.ndarray) -> int:
        """The next token, from float32 scores `[vocabulary]`. Raises UserError if they are no numbers."""
        if not np.isfinite(scores.max()):
            raise UserError("the model computes next-token scores that are not finite")
        seen = np.array([*self.request.prompt, *self.written])
        return int(pick(scores[None], self.request.sampling, self._draws.random(1), [seen])[0])


@dataclasses.dataclass
class Load:
    """What the scheduler is doing: requests that wait, that are in work; and what it has done."""

    waiting: int = 0
    active: int = 0
    steps: int = 0
    step_rows: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0


class Scheduler:
    """Decodes up to `slots` requests at a time; `queue` more may wait.

    A step reads at most about `piece` tokens of new prompts, so that a long prompt does not hold up the others for
    long, and then writes one token of each row.
    """

    def __init__(self, engine: RowEngine, *, slots: int = 8, queue: int = 64, piece: int = 256) -> None:
        self.engine = engine
        self.load = Load()
        self._slots, self._queue, self._piece = slots, queue, piece
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[Ticket] = deque()
        self._writing: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self._seconds = USUAL_SECONDS

    @property
    def closed(self) -> bool:
        return self._closed

    # --- from any thread

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Takes all of the requests or none.

        Raises:
            Refused: the queue has no room for them.
            Closed: `close` was called.
            UserError: a prompt without tokens or beyond the vocabulary.
        """
        vocabulary = self.engine.decoder.vocabulary
        for request in requests:
            if not request.prompt or min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
                raise UserError(f"a prompt must have at least one token, all from 0 to {vocabulary - 1}")
        tickets = [Ticket(request) for request in requests]
        with self._changed:
            if self._closed:
                raise Closed
            busy = len(self._waiting) + len(self._reading) + len(self._writing)
            if busy + len(tickets) > self._slots + self._queue:
                raise Refused(max(1, math.ceil(self._seconds * len(self._waiting) / self._slots)))
            self._waiting.extend(tickets)
            self.load.waiting = len(self._waiting)
            self._changed.notify_all()
        return tickets

    def close(self) -> None:
        """Takes no more requests; `run` returns when those it has are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all requests at the next step."""
        with self._changed:
            self._closed = self._stopped = True
            self._changed.notify_all()

    # --- from one thread

    def run(self) -> None:
        """Works until it is closed and nothing is left to do. If it fails, no request is left waiting."""
        try:
            while True:
                with self._changed:
                    while not self._closed and not self._has_work():
                        self._changed.wait()
                    if not self._has_work():
                        return
                self.step()
        finally:
            self.close()
            for ticket in [*self._waiting, *self._reading, *self._writing]:
                self._end(ticket, "error", "the server has stopped")

    def step(self) -> bool:
        """One round: whoever is done leaves, prompts are read, each row writes a token. False: nothing to do."""
        self._drop()
        self._admit()
        self._read()
        self._write()
        with self._changed:
            self.load.waiting = len(self._waiting)
            self.load.active = len(self._reading) + len(self._writing)
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._writing)

    def _drop(self) -> None:
        """Ends requests whose client or time is gone."""
        with self._changed:
            tickets = [*self._waiting, *self._reading, *self._writing]
        for ticket in tickets:
            if ticket.cancelled or self._stopped:
                self._end(ticket, "cancelled")
            elif ticket.overdue:
                self._end(ticket, "timeout")

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and len(self._reading) + len(self._writing) < self._slots:
                self._reading.append(self._waiting.popleft())

    def _read(self) -> None:
        """Reads prompts in the order of their arrival, some tokens at a time."""
        left = self._piece
        while self._reading and left > 0:
            ticket = self._reading[0]
            prompt = ticket.request.prompt
            rest = len(prompt) - ticket.read
            size = min(rest, self._piece) if self.engine.in_pieces else rest
            left -= size
            fresh = np.array([prompt[ticket.read : ticket.read + size]])
            rows = self.engine.empty() if ticket.place is None else ticket.place[0]
            try:
                rows, scores = self.engine.extend(rows, fresh)
            except FAILURES as error:
                self._end(ticket, "error", _said(error))
                continue
            ticket.place, ticket.read = (rows, 0), ticket.read + size
            self.load.prompt_tokens += size
            if ticket.read == len(prompt):
                self._reading.popleft()
                self._writing.append(ticket)
                self._take(ticket, scores[0])

    def _write(self) -> None:
        """One token of each row, in one run where rows can be joined."""
        tickets = list(self._writing)
        groups = [[ticket] for ticket in tickets] if self.engine.alone else [tickets] if tickets else []
        for group in groups:
            try:
                rows, scores = self.engine.extend(
                    self._state(group), np.array([[t.written[-1]] for t in group])
                )
            except FAILURES as error:
                for ticket in group:
                    self._end(ticket, "error", _said(error))
                continue
            self.load.steps += 1
            self.load.step_rows += len(group)
            for index, ticket in enumerate(group):
                ticket.place = (rows, index)
                self._take(ticket, scores[index])

    def _state(self, group: list[Ticket]) -> Rows:
        """The state of exactly these rows: that of the last step, if nobody joined or left."""
        places = [ticket.place for ticket in group if ticket.place is not None]
        rows = places[0][0]
        same = all(place[0] is rows and place[1] == index for index, place in enumerate(places))
        return rows if same and len(rows.counts) == len(group) else self.engine.merge(places)

    def _take(self, ticket: Ticket, scores: np.ndarray) -> None:
        try:
            token = ticket.draw(scores)
        except UserError as error:
            self._end(ticket, "error", str(error))
            return
        if token in ticket.request.stops:
            self._end(ticket, "stop")
            return
        ticket.written.append(token)
        self.load.written_tokens += 1
        ticket.request.emit(Event(token))
        if len(ticket.written) >= ticket.request.max_tokens:
            self._end(ticket, "length")

    def _end(self, ticket: Ticket, finish: Finish, error: str = "") -> None:
        with self._changed:
            for line in (self._waiting, self._reading, self._writing):
                if ticket in line:
                    line.remove(ticket)
            if finish in ("stop", "length"):
                taken = time.monotonic() - ticket.started
                self._seconds += SMOOTHING * (taken - self._seconds)
        ticket.place = None
        ticket.request.emit(Event(finish=finish, error=error))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else "the machine has too little memory for the caches"
