"""Two nodes whose own names lead to 127.0.1.1, as Debian sets them up: network namespaces with a cable between them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mirai_ds.runtime import interfaces

ROOT = Path(__file__).parents[2]
IN_NAMESPACES = ["unshare", "-r", "--net", "--uts", "--mount"]
RANK = """
import os, sys, torch
import torch.distributed as dist
from mirai_ds.engine.start import start_process_group
from mirai_ds.runtime.distributed import World
os.environ.update(MASTER_ADDR=sys.argv[2], MASTER_PORT="29501", DS_ACCELERATOR="cpu")
start_process_group(World(int(sys.argv[1]), 0, 2, 1), 0.5)
numbers = torch.ones(1) + int(sys.argv[1])
dist.all_reduce(numbers)
print(os.environ["GLOO_SOCKET_IFNAME"], float(numbers))
"""
# A node has its own host name, /etc/hosts and network; `exec` keeps the process to which the cable is given.
NODES = """
node() {
  exec unshare --net --uts --mount bash -c '
    hostname "node$0"; mount --bind "$1/hosts$0" /etc/hosts; ip link set lo up
    until ip link show "cable$0" > "$1/seen$0" 2>&1; do sleep 0.05; done
    ip addr add "10.9.0.$0/24" dev "cable$0"; ip link set "cable$0" up
    exec "$3" -c "$2" $(($0 - 1)) node1' "$1" "$2" "$3" "$4"
}
for n in 1 2; do
  printf '127.0.0.1 localhost\n127.0.1.1 node%s\n' $n > "$1/hosts$n"
done
echo 10.9.0.1 node1 >> "$1/hosts2"
node 1 "$1" "$2" "$3" > "$1/log1" 2>&1 & first=$!
node 2 "$1" "$2" "$3" > "$1/log2" 2>&1 & second=$!
sleep 0.5
ip link add cable1 type veth peer name cable2
ip link set cable1 netns $first && ip link set cable2 netns $second
wait $first && wait $second
"""


def namespaces() -> str | None:
    """Why this machine gives its users no network namespaces; None where it does."""
    asked = "hostname n && ip link add cable1 type veth peer name cable2"
    try:
        done = subprocess.run([*IN_NAMESPACES, "sh", "-c", asked], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no unshare"
    return None if done.returncode == 0 else done.stderr.strip()


def test_ranks_of_two_nodes_meet(tmp_path: Path) -> None:
    why = namespaces()
    if why is not None:
        pytest.skip(f"no network namespaces here: {why}")
    done = subprocess.run(
        [*IN_NAMESPACES, "bash", "-c", NODES, "nodes", str(tmp_path), RANK, sys.executable],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    logs = [(tmp_path / f"log{n}").read_text() for n in (1, 2)]
    assert done.returncode == 0, (done.stderr, *logs)
    assert [log.strip().splitlines()[-1] for log in logs] == ["cable1 3.0", "cable2 3.0"]


def test_what_a_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interfaces.VARIABLE, "ib0")
    monkeypatch.setattr(interfaces.socket, "gethostbyname", lambda _: "127.0.1.1")
    assert interfaces.choose_gloo_interface("localhost") is None
    monkeypatch.delenv(interfaces.VARIABLE)
    monkeypatch.setattr(interfaces.socket, "gethostbyname", lambda _: "10.1.2.3")  # others can use the host's name
    assert interfaces.choose_gloo_interface("localhost") is None
    assert interfaces.VARIABLE not in interfaces.os.environ
