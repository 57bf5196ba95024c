"""How much memory a process can have at most."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, order=True)
class Limit:
    """A number of bytes, and what sets it."""

    bytes: int
    what: str


def host_limit(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> Limit:
    """Return the tightest limit of this process's host memory.

    Of the machine's memory all counts, also what others use at this moment: whoever is refused is not tried
    again, and what others use may be free an hour later. Swap does not count: each step reads every weight,
    which takes minutes from a disk.

    :param cgroups: where the cgroups of version 2 are mounted, and those of version 1 below ``memory``.
    :param own_cgroups: the file that names the process's own.
    """
    limits = [Limit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the machine's memory")]
    limits += [Limit(size, "the cgroup's limit") for size in cgroup_limits(cgroups, own_cgroups)]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(Limit(soft, "the process's limit of address space (RLIMIT_AS)"))
    return min(limits)


def cgroup_limits(cgroups: Path, own_cgroups: Path) -> Iterable[int]:
    """Yield the limits in bytes of a process's cgroups and of those around them; none where there are none.

    Reference: https://man7.org/linux/man-pages/man7/cgroups.7.html, /proc/pid/cgroup.
    """
    lines = own_cgroups.read_text().splitlines() if own_cgroups.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):  # in a container its own is often the mount itself
            file = mount / folder / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text != "max":
                yield int(text)


def device_limit(device: str) -> Limit:
    """Return what the training device has in all; a CPU's is the host's.

    :param device: ``cpu`` or ``cuda``.
    """
    if device == "cpu":
        return host_limit()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Limit(properties.total_memory, f"the memory of {properties.name}")


def resident_bytes() -> int:
    """Return the host memory that this process holds now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
