"""How much memory the machine, a cgroup or the process's own limit leaves."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from lightning_modules.callbacks import peak_memory_bytes
from lightning_modules.memory_limits import Limit, cgroup_limits, host_limit, resident_bytes

V1, V2 = "4:cpu,memory:/a/b\n9:devices:/other\n", "0::/a/b\n"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        (V2, {"a/b/memory.max": "max\n", "a/memory.max": "5\n"}, [5]),
        (V2, {"a/b/memory.max": "3\n", "a/memory.max": "5\n"}, [3, 5]),
        ("0::/\n", {"memory.max": "7\n"}, [7]),  # in a container's own namespace
        (V2, {"memory.max": "7\n"}, [7]),  # in a container that sees the host's names
        (V1, {"memory/a/b/memory.limit_in_bytes": "9\n", "other/memory.limit_in_bytes": "1\n"}, [9]),
        (V1, {"memory/memory.limit_in_bytes": "11\n"}, [11]),
        (V2, {}, []),
        ("", {"memory.max": "7\n"}, []),
    ],
)
def test_the_cgroup_s_limits_are_its_own_and_those_around_it(
    own: str, limits: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    write(tmp_path / "own", own)
    for name, text in limits.items():
        write(tmp_path / "cgroups" / name, text)
    assert list(cgroup_limits(tmp_path / "cgroups", tmp_path / "own")) == expected


def test_a_system_without_cgroups_has_none(tmp_path: Path) -> None:
    assert list(cgroup_limits(tmp_path, tmp_path / "missing")) == []


@pytest.mark.parametrize(
    ("of_cgroup", "of_process", "expected"),
    [
        ("1000", 2000, Limit(1000, "the cgroup's limit")),
        ("3000", 2000, Limit(2000, "the process's limit of address space (RLIMIT_AS)")),
        (str(2**62), resource.RLIM_INFINITY, None),  # cgroups of version 1 say so where there is none
    ],
)
def test_the_tightest_limit_counts(
    of_cgroup: str, of_process: int, expected: Limit | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "memory.max", of_cgroup)
    write(tmp_path / "own", "0::/\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: {resource.RLIMIT_AS: (of_process, -1)}[kind])
    machine = Limit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the machine's memory")
    assert host_limit(tmp_path, tmp_path / "own") == (expected or machine)


def test_what_the_process_holds_is_at_most_its_peak() -> None:
    assert 10**7 < resident_bytes() < 1.1 * peak_memory_bytes()  # the kernel counts each in its own steps
