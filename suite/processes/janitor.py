"""Ends processes for good: kills every descendant and unlinks the shared memory they leave behind.

Run as ``python -m suite.processes.janitor`` it is the process that outlives pytest: it reads one JSON line from
standard input (what to sweep), waits until the other end of that pipe is gone, for whatever reason, and then sweeps.
`LocalProcess.stop` sweeps with the same functions, for one process and its descendants.

Linux only: processes, their memory maps and open files are read from /proc.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

RUN_VARIABLE = "WEIGHT_SYNC_RUN_ID"  # in the environment of every process of a run, inherited by all descendants
PROCESS_VARIABLE = "WEIGHT_SYNC_PROCESS"  # which of the run's processes it descends from
SHARED_MEMORY = Path("/dev/shm")
SOCKETS = Path("/tmp")  # where verl binds sockets whatever its environment says, with the run's id in their names
SEGMENT_PREFIX = "weight-sync-"  # of what extensions keep in shared memory; the run's id comes next
END_DEADLINE_S = 8.0
# Names in shared memory that say whose they are: torch's have the process id in decimal, the CUDA driver's (which stay
# where a process is killed, sglang#33929) the user's and the process's in hexadecimal.
OWNED = re.compile(r"torch_(?P<torch>\d+)_.+|cuda\.shm\.[0-9a-f]+\.(?P<cuda>[0-9a-f]+)\.[0-9a-f]+")


@dataclass(frozen=True)
class Found:
    """A running process as /proc shows it."""

    pid: int
    parent: int
    session: int
    environment: bytes


def running() -> list[Found]:
    """Every process of this machine that is no zombie; environments that may not be read are empty."""
    return [found for entry in os.listdir("/proc") if entry.isdigit() and (found := _look(int(entry)))]


def members(run_id: str, process: str | None = None, roots: Iterable[int] = ()) -> set[int]:
    """Process ids that belong to a run, or to one process of it: marked by environment, session or descent.

    Args:
        run_id: what RUN_VARIABLE holds.
        process: what PROCESS_VARIABLE holds, to look for one process of the run only.
        roots: process ids that the launcher started. The sessions they lead belong to them, whatever the environment.
    """
    marks = {f"{RUN_VARIABLE}={run_id}".encode()}
    if process is not None:
        marks.add(f"{PROCESS_VARIABLE}={process}".encode())
    everything = {found.pid: found for found in running()}
    own = {found.pid for found in everything.values() if marks <= set(found.environment.split(b"\0"))}
    sessions = {root for root in roots if root in own or root not in everything}  # else the id was given out again
    own |= {found.pid for found in everything.values() if found.session in sessions}
    children: dict[int, list[int]] = {}
    for found in everything.values():
        children.setdefault(found.parent, []).append(found.pid)
    waiting = list(own)
    while waiting:
        new = set(children.get(waiting.pop(), [])) - own
        own |= new
        waiting += new
    return own - {os.getpid()}


def shared_memory_of(pids: Iterable[int]) -> set[Path]:
    """Files in /dev/shm that these processes have mapped or open, and those torch and CUDA named after them.

    They are told by inode: a semaphore's file has another name by the time that it is used.
    """
    pids = set(pids)
    inodes = {inode for pid in pids for inode in _inodes(pid)}
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(SHARED_MEMORY):
            if entry.inode() in inodes or owner_of(entry.name) in pids:
                found.add(Path(entry.path))
    return found


def end(look: Callable[[], set[int]], deadline_s: float = END_DEADLINE_S) -> tuple[set[int], set[Path]]:
    """Kill what look() finds until it finds nothing; return the process ids that were found and their shared memory.

    They are frozen before anything else, so that what they hold can be read without their creating more meanwhile.
    """
    frozen: set[int] = set()
    while new := look() - frozen:
        _signal(new, signal.SIGSTOP)
        frozen |= new
    memory = shared_memory_of(frozen)
    deadline = time.monotonic() + deadline_s
    while (left := look()) and time.monotonic() < deadline:
        memory |= shared_memory_of(left - frozen)
        _signal(left, signal.SIGKILL)
        time.sleep(0.02)
    return frozen, memory


def end_process(
    run_id: str, process: str, root: int, before: Iterable[int], memory: set[Path], kept: Iterable[str]
) -> None:
    """End one process of a run with its descendants, and the shared memory that no other process of the run has.

    `before` are the ids of its processes that were seen, `memory` what they held; `kept` was there before the run.
    """
    ended, last = end(lambda: members(run_id, process, [root]))
    gone = set(before) - {found.pid for found in running()}  # else the id was given out again
    memory = memory | last | shared_memory_of(ended | gone | {root})
    unlink(path for path in memory - shared_memory_of(members(run_id)) if path.name not in set(kept))


def unlink(memory: Iterable[Path]) -> None:
    """Remove files; those that are gone already are no error."""
    for path in memory:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(run_id: str, directories: Iterable[Path], kept: Iterable[str], roots: Iterable[int] = ()) -> None:
    """End everything that is left of a run: its processes, shared memory, sockets and directories.

    Args:
        run_id: the run's id.
        directories: the run's directories for sockets and temporary files.
        kept: names in /dev/shm that were there before the run, which are never removed.
        roots: process ids that the launcher started.
    """
    roots = set(roots)
    ended, memory = end(lambda: members(run_id, roots=roots))
    memory |= shared_memory_of(ended | roots)
    memory |= set(SHARED_MEMORY.glob(f"{SEGMENT_PREFIX}{run_id}*"))
    unlink(path for path in memory if path.name not in set(kept))
    unlink(path for path in SOCKETS.glob(f"*-{run_id}-*") if path.is_socket())
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return _look(pid) is not None


def _look(pid: int) -> Found | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    return Found(pid, parent=int(fields[1]), session=int(fields[3]), environment=_read(Path(f"/proc/{pid}/environ")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _inodes(pid: int) -> set[int]:
    """Inodes below /dev/shm that a process has mapped or open."""
    prefix = f"{SHARED_MEMORY}/".encode()
    lines = _read(Path(f"/proc/{pid}/maps")).splitlines()
    found = {int(line.split(maxsplit=5)[4]) for line in lines if prefix in line}
    with contextlib.suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(descriptor.path).startswith(f"{SHARED_MEMORY}/"):
                    found.add(os.stat(descriptor.path).st_ino)
    return found


def owner_of(name: str) -> int | None:
    """The process id in a name in shared memory, where it has one."""
    found = OWNED.fullmatch(name)
    if found is None:
        return None
    return int(found["torch"]) if found["torch"] else int(found["cuda"], 16)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def main() -> None:
    """Wait for pytest to go away, then sweep what the first line of standard input names.

    Each later line is the process id of one more process that was started.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    task = json.loads(sys.stdin.readline())
    roots = [int(line) for line in sys.stdin if line.strip()]
    sweep(task["run_id"], map(Path, task["directories"]), task["kept"], roots)


if __name__ == "__main__":
    main()
