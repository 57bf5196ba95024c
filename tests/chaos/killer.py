"""The thread that strikes, brings back what it struck, and measures how long that took."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic, sleep

from rich.console import Console

from post_training.standalone import Standalone
from tests.chaos.strikes import STRIKES, Choice, Struck

_TICK_SECONDS = 0.25
_NO_VICTIM_SECONDS = 300.0
"""Time in which a job that lives may show a process to strike."""


@dataclass
class Watch:
    """A job or server that was struck and is not back yet."""

    strike: str
    since: float
    recovered: Callable[[], bool]


@dataclass(frozen=True)
class Done:
    """A strike that was done, when (UTC), and the jobs that lost a process by it."""

    at: str
    strike: str
    jobs: list[str]


@dataclass
class Killer:
    """Strikes one after another until enough are done or ``halt`` is called.

    :param choices: more than are wanted: some find nothing to strike.
    :param wanted: number of strikes.
    :param allowed: how many there may be once so many jobs have ended: on a slow machine they would all meet
        the first ones.
    :param done: the strikes so far.
    :param recoveries: seconds from strike to recovery, by name; an outage counts with its own length.
    :param finished: whether there will be no further strike.
    """

    servers: Standalone
    choices: Sequence[Choice]
    wanted: int
    allowed: Callable[[int], int]
    console: Console
    done: list[Done] = field(default_factory=list)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    finished: bool = False
    _watches: dict[str, Watch] = field(default_factory=dict)
    _restarts: list[tuple[float, Struck]] = field(default_factory=list)
    _living: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)
    _halted: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Strike, then bring everything back."""
        try:
            for choice in self.choices:
                if len(self.done) == self.wanted or not self._strike(choice):
                    break
        finally:
            self.finished = True
            while self._restarts:
                self._tick()

    def halt(self) -> None:
        """Strike no more."""
        self._halted.set()

    def wait_for_recoveries(self, seconds: float) -> None:
        """Go on measuring until all is back, or for so long."""
        deadline = monotonic() + seconds
        while self._watches and monotonic() < deadline:
            self._tick()

    def unrecovered(self) -> Counter[str]:
        """Return what never came back, by strike."""
        return Counter(watch.strike for watch in self._watches.values())

    def job_begins(self, job_uuid: str) -> None:
        """Wait for this job's processes where one is to be struck."""
        self._living.add(job_uuid)

    def job_ended(self, job_uuid: str) -> None:
        """Wait for no progress of this job any more: it has none to make."""
        self._living.discard(job_uuid)
        self._ended.add(job_uuid)

    def _strike(self, choice: Choice) -> bool:
        """Do one strike as soon as there is something to strike; False once halted."""
        due, name = monotonic() + choice.pause, choice.strike
        _, needed, action = STRIKES[name]
        while not self._halted.is_set():
            self._tick()
            if len(self.done) >= self.allowed(len(self._ended)):
                due = max(due, monotonic())
                continue
            down = {server for _, struck in self._restarts for server in struck.servers}
            if monotonic() < due or down & set(needed):
                continue
            started = monotonic()
            if struck := action(self.servers, choice):
                self._note(name, struck, started)
                return True
            if not self._living or monotonic() > due + _NO_VICTIM_SECONDS:
                self.console.print(f"nothing to strike for {name}")
                return True
        return False

    def _note(self, name: str, struck: Struck, started: float) -> None:
        self.done.append(Done(f"{datetime.now(UTC):%H:%M:%S}", name, struck.jobs))
        # What is struck again before it is back is awaited from then on.
        self._watches |= {key: Watch(name, started, back) for key, back in struck.recovered.items()}
        if struck.restart:
            self._restarts.append((started + struck.after, struck))
        line = f"{len(self.done):>4}  {self.done[-1].at}  {name} {' '.join(struck.jobs)}"
        self.console.print(line, highlight=False)

    def _tick(self) -> None:
        """Bring back what is due, look at what is awaited, and sleep a little."""
        for entry in [entry for entry in self._restarts if monotonic() >= entry[0]]:
            self._restarts.remove(entry)
            assert entry[1].restart is not None
            entry[1].restart()
        self._watches = {key: watch for key, watch in self._watches.items() if key not in self._ended}
        for key in [key for key, watch in self._watches.items() if watch.recovered()]:
            watch = self._watches.pop(key)
            self.recoveries.setdefault(watch.strike, []).append(monotonic() - watch.since)
        sleep(_TICK_SECONDS)
