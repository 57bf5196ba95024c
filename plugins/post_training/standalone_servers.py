"""The server processes of one home folder, each the leader of a session that can be written down."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from post_training.processes import SessionRecord, end_sessions, kill_leader, kill_session, session_alive

_LOG_TAIL_LINES = 40


class ServerProcesses:
    """Servers by name, started and ended one by one.

    :param home: their working folder, which holds ``NAME.log`` of each.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        # Several of a name: a leader that was killed may have left others of its session behind.
        self._sessions: dict[str, list[SessionRecord]] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def adopt(self, written: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """Know what another process has started, from what ``written`` returned there."""
        self._sessions = {
            name: [SessionRecord(**session) for session in sessions] for name, sessions in written.items()
        }

    def written(self) -> dict[str, list[dict[str, Any]]]:
        """Return all sessions in a form that JSON can hold, oldest first."""
        return {name: [asdict(session) for session in known] for name, known in self._sessions.items()}

    def alive(self) -> bool:
        """Whether any process of any session runs."""
        return any(session_alive(session) for known in self._sessions.values() for session in known)

    def spawn(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a server in a session of its own; its output goes to the end of its log.

        :raises RuntimeError: if its program is not installed.
        """
        program = shutil.which(command[0], path=env["PATH"])
        if program is None:
            raise RuntimeError(f"{command[0]} is not installed beside {sys.executable}")
        with self.log_file(name).open("ab") as log:
            child = subprocess.Popen(  # noqa: S603
                [program, *command[1:]],
                env=dict(env),
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children[name] = child
        older = [session for session in self._sessions.get(name, []) if session_alive(session)]
        self._sessions[name] = [*older, SessionRecord.of(child.pid, self._home)]

    def kill(self, name: str, *, session: bool) -> None:
        """Send SIGKILL to a server, and with ``session`` to all that it has started; nothing if none runs."""
        for known in self._sessions.get(name, [])[-1:]:
            (kill_session if session else kill_leader)(known)
        if child := self._children.pop(name, None):
            child.wait()

    def exit_code(self, name: str) -> int | None:
        """Return the code with which a child of this process ended; None while it runs."""
        return self._children[name].poll()

    def died(self, *, may_finish: str) -> str | None:
        """Return the name of a child that has ended, if there is one.

        :param may_finish: the one whose end without an error is no death.
        """
        for name, child in self._children.items():
            code = child.poll()
            if code is not None and (code or name != may_finish):
                return name
        return None

    def end(self, names: Iterable[str]) -> None:
        """End these servers and all that they have started, at the same time, and forget them.

        :raises RuntimeError: if a process cannot be killed.
        """
        doomed = {name: self._sessions.pop(name, []) for name in names}
        end_sessions(*(session for known in doomed.values() for session in known))
        for name in doomed:
            if child := self._children.pop(name, None):
                child.wait()

    def log_file(self, name: str) -> Path:
        """Where the output of a server goes."""
        return self._home / f"{name}.log"

    def log_tail(self, name: str) -> str:
        """Return the end of a server's log."""
        lines = self.log_file(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


def write_private(file: Path, content: Mapping[str, object]) -> None:
    """Replace a file by this JSON, readable by its owner alone."""
    draft = file.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(file)
