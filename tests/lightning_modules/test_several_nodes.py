"""torchrun on two machines: network namespaces that one cable joins, without a common folder."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.checkpoint import RESUME_FILE, readable_step
from lightning_modules.ranks import ALONE
from post_training.schemas import record as names
from post_training.schemas.trainer import TrainerSpec
from tests.documents import DOCUMENTED_TORCHRUN, ROOT
from tests.lightning_modules.several import train
from tests.lightning_modules.test_several import points
from tests.lightning_modules.trainers import write
from tests.waiting import wait_until

EPOCHS = 30
PROGRAM = {"torchrun": [sys.executable, "-m", "torch.distributed.run"]}
CAN_SEPARATE = not subprocess.run(
    ["unshare", "--net", "ip", "link"], capture_output=True, check=False
).returncode
"""Whether this machine lets us make networks of our own."""

pytestmark = pytest.mark.skipif(not CAN_SEPARATE, reason="needs root, and ip from Debian's iproute2")


AS_A_MACHINE = """
echo "$0" > /proc/sys/kernel/hostname
mount --bind "$1" /etc/hosts
shift
exec "$@"
"""


WAIT_FOR_THE_OTHER = """
import os, socket, torch
from torch import distributed
from lightning_modules import process_group
from lightning_modules.ranks import place_in

process_group.KEEP_ALIVE |= {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_USER_TIMEOUT: 2000}
with process_group.joined(place_in(os.environ)) as ranks:
    ranks.wait()
    print("joined", flush=True)
    distributed.recv(torch.zeros(1), src=1 - ranks.rank)
"""
"""Each of two processes waits for a word from the other."""


@dataclass(frozen=True)
class Node:
    """A network namespace, with its end of the cable.

    :param name: of the namespace, its interface, and its host.
    :param hosts: a file with the names of both.
    """

    name: str
    address: str
    hosts: Path

    def stop(self) -> None:
        """Kill all that runs there."""
        for pid in _ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)

    def vanish(self) -> None:
        """Pull the cable: nothing that runs there ends, and nobody hears of it again."""
        _ip("-n", self.name, "link", "set", self.name, "down")

    def start(self, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        """Start a command there."""
        ours = {"PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}", "OMP_NUM_THREADS": "1"}
        alone = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        return subprocess.Popen(
            [*alone, "sh", "-euc", AS_A_MACHINE, self.name, str(self.hosts), *command],
            env=os.environ | ours | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Two namespaces of this test's own, which end with it."""
    hosts = tmp_path / "hosts"
    made = [Node(f"pt{os.getpid()}-{number}", f"10.77.0.{number}", hosts) for number in (1, 2)]
    hosts.write_text("".join(f"{node.address} {node.name}\n" for node in made))
    first, second = made
    try:
        for node in made:
            _ip("netns", "add", node.name)
        _ip(
            *f"link add {first.name} netns {first.name} type veth".split(),
            *f"peer name {second.name} netns {second.name}".split(),
        )
        for node in made:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.name)
            for interface in ("lo", node.name):
                _ip("-n", node.name, "link", "set", interface, "up")
        yield made
    finally:
        for node in made:
            node.stop()
            _ip("netns", "delete", node.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def documented(spec: TrainerSpec, rendezvous: Node) -> list[str]:
    """The documented command for one node.

    :param rendezvous: where the nodes meet.
    """
    said = {"NODE0": rendezvous.name, "JOB": spec.request.job_uuid, "spec.json": str(write(spec))}
    command = DOCUMENTED_TORCHRUN
    for placeholder, value in said.items():
        assert placeholder in command
        command = command.replace(placeholder, value)
    program, *arguments = shlex.split(command)
    return [*PROGRAM[program], *arguments]


def test_two_nodes_and_then_one_train_what_one_process_trains(
    make_spec: Any, nodes: list[Node], tmp_path: Path
) -> None:
    length = {"n_epochs": EPOCHS}
    one = make_spec(training=length, data={"batch_size": 4}, work_dir=tmp_path / "one")
    train(one, ALONE)
    kept, lost = (
        make_spec(training=length, runtime={"num_nodes": 2}, work_dir=tmp_path / node.name) for node in nodes
    )
    running = [node.start(documented(spec, nodes[0])) for node, spec in zip(nodes, (kept, lost), strict=True)]
    wait_until(lambda: readable_step(kept.work_dir / RESUME_FILE))
    nodes[1].stop()
    outputs = [process.communicate()[0] for process in running]
    assert running[0].returncode == 0, "\n".join(outputs)
    assert "goes on from" in outputs[0]
    expected, found = points(one), points(kept)
    assert list(found[names.METRIC_TRAIN_LOSS]) == list(range(1, EPOCHS * 3 + 1))
    for metric in (names.METRIC_TRAIN_LOSS, names.METRIC_VALIDATION_LOSS, names.METRIC_GRADIENT_NORM):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    assert not (lost.work_dir / "checkpoints").exists()


def test_a_node_that_vanishes_is_missed_by_one_that_only_waits_for_it(nodes: list[Node]) -> None:
    variables = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": nodes[0].name, "MASTER_PORT": "29400"}
    variables |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    program = [sys.executable, "-c", WAIT_FOR_THE_OTHER]
    running = [node.start(program, RANK=str(rank), **variables) for rank, node in enumerate(nodes)]
    for process in running:
        assert process.stdout is not None
        assert "joined\n" in process.stdout
    nodes[1].vanish()
    for process in running:
        output = process.communicate()[0]
        assert process.returncode == 1
        assert re.search("gloo.*(timed out|No route to host|unreachable)", output), output
