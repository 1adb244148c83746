"""Open MPI's hostfiles, and whether an engine's ranks find their GPUs on those hosts."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import Refused

_LINE = re.compile(r"^(?P<name>[^\s#=]+)(?P<rest>(?:\s+\w+\s*=\s*\S+)*)\s*$")


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks that it takes."""

    name: str
    slots: int


def read_hostfile(file: Path) -> tuple[Host, ...]:
    """Hosts in their order, "NAME slots=N" a line; raises `Refused` naming the line that is not one.

    Without slots Open MPI would take the number of cores, which says nothing of GPUs: so they must be there.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--hostfile {file}: {error}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.match(text)
        wanted = re.search(r"\bslots\s*=\s*(\d+)(?!\S)", found["rest"]) if found else None
        if found is None or wanted is None or int(wanted[1]) < 1:
            raise Refused(f'{file}, line {number}: {text!r}; a line is "HOST slots=N", N the GPUs of that host to use')
        slots[found["name"]] = slots.get(found["name"], 0) + int(wanted[1])
    if not slots:
        raise Refused(f"{file}: no host in it")
    return tuple(Host(name, count) for name, count in slots.items())


def hosts_used(hosts: tuple[Host, ...], world_size: int) -> Iterator[tuple[Host, int]]:
    """Hosts, filled slot by slot, with the number of ranks that each gets."""
    left = world_size
    for host in hosts:
        if left <= 0:
            return
        yield host, min(host.slots, left)
        left -= host.slots


def ranks_text(count: int) -> str:
    return f"{count} rank{'s' if count != 1 else ''}"


def host_problems(hosts: tuple[Host, ...], world_size: int, gpus_per_node: int, *, first_rank: int = 0) -> list[str]:
    """Why `world_size` ranks, of which those from `first_rank` compute, do not fit; [] where they do.

    A rank takes the GPU `rank % gpus_per_node` of its host, so all hosts but the last must have as many slots.
    """
    total = sum(host.slots for host in hosts)
    if total < world_size:
        return [f"{total} slots on {len(hosts)} hosts, for {world_size} ranks; add hosts or slots"]
    if first_rank:
        # gpu_device_ids and participant_ids place these ranks.
        return []
    used = list(hosts_used(hosts, world_size))
    problems = [
        f"{host.name}: {ranks_text(ranks)}, but the engine is for {gpus_per_node} GPUs a node (gpus_per_node), and a "
        f"rank takes GPU rank % {gpus_per_node} of its host; give it slots={gpus_per_node}, or set "
        "gpu_device_ids in its config.pbtxt to those of one machine"
        for host, ranks in used[:-1]
        if ranks != gpus_per_node
    ]
    last, ranks = used[-1]
    if ranks > gpus_per_node:
        problems.append(
            f"{last.name}: {ranks_text(ranks)}, but the engine is for {gpus_per_node} GPUs a node (gpus_per_node); "
            f"give it slots={gpus_per_node} and add hosts"
        )
    return problems


def is_this_machine(name: str) -> bool:
    """Whether a hostfile's name means the machine that asks: by its own names, or an address that it has."""
    import psutil

    own = socket.gethostname()
    if name in ("localhost", own, own.partition(".")[0], socket.getfqdn()):
        return True
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    mine = {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    return bool(addresses & mine)
