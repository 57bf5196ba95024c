"""The spool's file and cursor, as crashes and other runs leave them."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.spool import Event, Spool


def metrics(step: int, value: float = 1.0) -> Event:
    return {"kind": "metrics", "time": step * 10, "step": step, "values": {"loss": value}}


def steps(spool: Spool, limit: int = 10) -> list[int]:
    return [spooled.event["step"] for spooled in spool.pending(limit)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "job" / "metrics.jsonl"


def test_pending_events_start_at_the_cursor_in_this_and_the_next_process(file: Path) -> None:
    spool = Spool(file, "run")
    assert spool.pending(10) == []
    spool.append([metrics(1), metrics(2), metrics(3)])
    assert steps(spool, limit=2) == [1, 2]
    spool.advance(spool.pending(2)[-1].end)
    assert steps(spool) == [3]
    assert steps(Spool(file, "run")) == [3]


def test_the_bytes_of_all_events_and_of_those_that_were_sent(file: Path) -> None:
    spool = Spool(file, "run")
    assert (spool.size, spool.sent, spool.folder) == (0, 0, file.parent)
    spool.append([metrics(1)])
    one = spool.size
    spool.append([metrics(2)])
    assert spool.size == 2 * one == file.stat().st_size
    spool.advance(spool.pending(1)[0].end)
    assert spool.sent == Spool(file, "run").sent == one
    assert Spool(file, "other").sent == 0


def test_another_run_gets_everything(file: Path) -> None:
    spool = Spool(file, "run")
    spool.append([metrics(1)])
    spool.advance(spool.pending(1)[0].end)
    assert steps(Spool(file, "other")) == [1]


@pytest.mark.parametrize("cursor", ['{"run_id": "run", "sent_bytes": 999999}', "{"])
def test_a_cursor_that_does_not_fit_is_none(file: Path, cursor: str) -> None:
    Spool(file, "run").append([metrics(1)])
    file.with_name("metrics.cursor.json").write_text(cursor)
    assert steps(Spool(file, "run")) == [1]


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_torn_line_is_cut_before_the_next_is_written(file: Path, whole: int) -> None:
    Spool(file, "run").append([metrics(step) for step in range(whole)])
    with file.open("ab") as lines:
        lines.write(b'{"kind": "metr')
    spool = Spool(file, "run")
    spool.append([metrics(9)])
    assert steps(spool) == [*range(whole), 9]


def test_a_line_in_the_making_is_not_read(file: Path) -> None:
    spool = Spool(file, "run")
    spool.append([metrics(1)])
    with file.open("ab") as lines:
        lines.write(b'{"kind": "metr')
    assert steps(spool) == [1]


def test_last_steps_and_points_are_found(file: Path) -> None:
    spool = Spool(file, "run")
    spool.append([metrics(1, 0.5), metrics(7, 0.25), {"kind": "tag", "key": "loss", "value": "9"}])
    assert spool.last_steps() == {"loss": 7}
    assert spool.point_at("loss", 7) == (0.25, 70)
    assert spool.point_at("loss", 8) is None


def test_a_disk_that_has_room_for_half_a_line_leaves_none_of_it(tmp_path: Path) -> None:
    """A limit on the file's size cuts a write short, as a full disk does; another process, since it stays."""
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from lightning_modules.spool import Spool\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "spool = Spool(Path(sys.argv[1]), 'run')\n"
        "spool.append([{'kind': 'tag', 'key': 'a', 'value': '1'}])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (spool.size + 10, spool.size + 10))\n"
        "try:\n"
        "    spool.append([{'kind': 'tag', 'key': 'b', 'value': '2'}])\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    file = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", program, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.ENOSPC)
    assert [spooled.event["key"] for spooled in Spool(file, "run").pending(10)] == ["a"]
    assert file.read_bytes().endswith(b"}\n")
