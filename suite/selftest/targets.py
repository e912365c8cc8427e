"""Objects that the selftests of suite.processes put into processes."""

import ctypes
import glob
import mmap
import multiprocessing
import multiprocessing.shared_memory
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from suite.processes.blame import examined, of_the_suite

_SLEEPER = "import time; time.sleep(600)"


class Echo:
    """Answers, raises, hangs and dies on request."""

    def __init__(self, greeting: str = "hello", fail: str | None = None) -> None:
        print(f"constructing with {greeting}")
        if fail:
            raise ValueError(fail)
        self._greeting = greeting
        self._kept: list[Any] = []

    def facts(self) -> dict[str, Any]:
        return {"greeting": self._greeting, "pid": os.getpid()}

    def echo(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [list(args), kwargs]

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self, message: str) -> None:
        raise LookupError(message)

    def fail_as_subject(self, message: str) -> None:
        with examined():
            self.fail(message)

    def leave(self, code: int) -> None:
        sys.exit(code)

    def vanish(self) -> None:
        print("about to vanish", flush=True)
        os._exit(7)

    def unsendable(self) -> object:
        return {"found": [object()]}

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def sleep_in_native_code(self, seconds: int, hold_interpreter: bool) -> None:
        """Sleep where no Python code runs; holding the interpreter's lock, no other thread runs either."""
        library = ctypes.PyDLL(None) if hold_interpreter else ctypes.CDLL(None)
        library.sleep(seconds)

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=sys.stderr)

    def write(self, text: str) -> None:
        """Write past Python's streams, as native code does."""
        os.write(1, text.encode())

    def grandchildren(self, cleared: bool = False) -> list[int]:
        """Start a process, one in a session of its own, and (cleared) one without this environment."""
        plain = subprocess.Popen([sys.executable, "-c", _SLEEPER])
        apart = subprocess.Popen([sys.executable, "-c", _SLEEPER], start_new_session=True)
        bare = [subprocess.Popen([sys.executable, "-c", _SLEEPER], env={})] if cleared else []
        self._kept += [plain, apart, *bare]
        return [process.pid for process in (plain, apart, *bare)]

    def hand_connection_down(self) -> None:
        """Start a process that holds this one's connection to pytest, as forked workers may."""
        links = {link: os.readlink(link) for link in glob.glob("/proc/self/fd/*") if os.path.islink(link)}
        sockets = [int(Path(link).name) for link, held in links.items() if held.startswith("socket:")]
        self._kept.append(subprocess.Popen([sys.executable, "-c", _SLEEPER], pass_fds=sockets))

    def shared_memory(self) -> str:
        """Create a segment the way multiprocessing does; return its name."""
        segment = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
        self._kept.append(segment)
        return segment.name

    def semaphore(self) -> str:
        """Create a semaphore as multiprocessing does between spawned processes; return its name in /dev/shm."""
        lock = multiprocessing.get_context("spawn").Lock()
        self._kept.append(lock)
        return "sem." + lock._semlock.name.removeprefix("/")

    def attach(self, name: str) -> None:
        """Map a segment that another process created."""
        with open(f"/dev/shm/{name}", "r+b") as segment:  # SharedMemory(name) would unlink it at exit
            self._kept.append(mmap.mmap(segment.fileno(), 4096))

    def torch_shared_memory(self) -> list[str]:
        """Share a tensor through torch's file_system strategy; return the names in /dev/shm that came of it."""
        import torch
        import torch.multiprocessing

        torch.multiprocessing.set_sharing_strategy("file_system")
        tensor = torch.ones(1024).share_memory_()
        self._kept.append(tensor)
        return [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]


class Ahead(Echo):
    """Says what its environment was when it was imported ahead, and when it was built."""

    imported_with: str | None = None

    @staticmethod
    def import_ahead() -> str:
        print("imported ahead")
        Ahead.imported_with = os.environ.get("WS_LATE")
        return "imported"

    def __init__(self, greeting: str = "hello") -> None:
        super().__init__(greeting)
        self._built_with = [os.environ.get("WS_LATE"), os.environ.get("WS_REMOVED")]

    def facts(self) -> dict[str, Any]:
        return {"greeting": self._greeting, "imported_with": self.imported_with, "built_with": self._built_with}


class Leaky:
    """Has a descendant with shared memory that nobody unlinks, as an engine's worker has."""

    def __init__(self) -> None:
        self._name = f"ws-selftest-{os.getpid()}"
        script = f"import mmap, time; file = open('/dev/shm/{self._name}', 'w+b'); file.truncate(4096);"
        script += "kept = mmap.mmap(file.fileno(), 4096); file.close(); print(flush=True); time.sleep(600)"
        self._owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        self._owner.stdout.readline()

    def facts(self) -> dict[str, str]:
        return {"name": self._name}

    def name_memory_after(self) -> list[str]:
        """Files named as the CUDA driver names them after this process and its descendant, which neither has mapped."""
        names = [f"cuda.shm.{os.getuid():x}.{pid:x}.1" for pid in (os.getpid(), self._owner.pid)]
        for name in names:
            Path("/dev/shm", name).touch()
        return names

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def end_owner(self) -> None:
        self._owner.kill()
        self._owner.wait(5)


class Binder:
    """Binds sockets where vLLM, Python and verl do, and leaves them."""

    def bind(self, run_id: str) -> list[str]:
        own = [f"{folder}/{uuid.uuid4()}" for folder in (os.environ["VLLM_RPC_BASE_PATH"], tempfile.gettempdir())]
        self._bound = {
            path: socket.socket(socket.AF_UNIX) for path in (*own, f"/tmp/rl-colocate-zmq-{run_id}-replica-0.sock")
        }
        for path, bound in self._bound.items():
            bound.bind(path)
        return [*self._bound]


class Blamed:
    """Raises, for the suite or for what is examined."""

    def __init__(self, fails: bool = False) -> None:
        if fails:
            self.subject()

    def own(self) -> None:
        raise KeyError("of the suite")

    @examined()
    def subject(self) -> None:
        raise KeyError("of the subject")

    @examined()
    def exits(self) -> None:
        sys.exit(3)

    @examined()
    def calls_back(self) -> None:
        with of_the_suite("gather"):
            self.own()


class Reference:
    """Has the methods that make a worker extension a subject."""

    def init_weight_update_group(self) -> None: ...

    def update_weight(self) -> None: ...

    def check_weights_changed(self) -> None: ...
