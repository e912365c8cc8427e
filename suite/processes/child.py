"""What runs in a started process: builds one object and serves calls on it, one at a time.

Started by suite.processes.process as ``python -m suite.processes.child FD``, FD being its end of a socket pair. The
first frame names the class, whose module is imported. The second is the task: the constructor's arguments, and the
environment variables that change before it is called. Each later frame is a call. Every answer is a result or an error
as text.
When the other end goes away, the janitor ends this process; where there is no janitor, it ends itself, whatever it is
doing.
"""

import contextlib
import faulthandler
import io
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from suite.processes import wire
from suite.processes.blame import told
from suite.processes.target import load

STACKS_SIGNAL = signal.SIGUSR2  # makes this process write the stacks of its threads to its log
IMPORTED, READY = 0, 1  # the call numbers of the imports and of the constructor
JANITOR_S = 6.0  # what the janitor gets, which needs this process alive to see what shared memory it has


class TolerantStream(io.TextIOWrapper):
    """A text stream that loses what a full disk does not take, instead of raising in the middle of real work."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class Server:
    """Holds the one object that is called."""

    def __init__(self) -> None:
        self.cls: Any = None
        self.served: Any = None

    def import_class(self, target: str) -> Any:
        """Import the class ("pkg.module:Class") and return what its import_ahead() does, where it has one."""
        cls = load(target)
        imported = cls.import_ahead() if hasattr(cls, "import_ahead") else None
        self.cls = cls
        return imported

    def construct(self, kwargs: dict[str, Any], env: dict[str, str | None]) -> Any:
        """Set environment variables, or remove them (None), build the object and return its facts(), if any."""
        for name in (name for name, value in env.items() if value is None):
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in env.items() if value is not None})
        self.served = self.cls(**kwargs)
        return self.served.facts() if hasattr(self.served, "facts") else {}

    def call(self, method: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call a method of the object."""
        return getattr(self.served, method)(*args, **kwargs)

    def close(self) -> None:
        """Call the object's close(), where it has one."""
        if hasattr(self.served, "close"):
            self.served.close()


def main() -> None:
    """Serve until told to stop or until the other end is gone. Exits with 1 if the object could not be built.

    The process waits between its imports and its task as long as it is given none: see Launcher.ahead.
    """
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    os.register_at_fork(after_in_child=sock.close)
    wire.send(sock, {"call": None})  # says that this process listens, and knows STACKS_SIGNAL
    target = wire.receive(sock)["target"]
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sock, requests), daemon=True).start()
    server = Server()
    _send(sock, _answer(IMPORTED, server.import_class, target))
    if server.cls is None:
        sys.exit(1)
    task = requests.get()
    if "kwargs" not in task:  # told to stop instead
        return
    _send(sock, _answer(READY, server.construct, task["kwargs"], task["env"]))
    if server.served is None:
        sys.exit(1)
    while (request := requests.get())["method"] is not None:
        _send(sock, _answer(request["call"], server.call, request["method"], request["args"], request["kwargs"]))
    server.close()


def _tolerant(stream: Any) -> TolerantStream:
    return TolerantStream(stream.detach(), encoding="utf-8", errors="backslashreplace", write_through=True)


def _read(sock: socket.socket, requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Queue the calls as they come; the end of the stream is the end of the process."""
    try:
        while True:
            requests.put(wire.receive(sock))
    finally:
        time.sleep(JANITOR_S)
        os._exit(1)


def _send(sock: socket.socket, answer: bytes) -> None:
    """Answer. Where pytest is gone this process goes on, since `_read` ends it: it still has what it holds until then.

    An engine's workers end at once with it, and what they shared in memory would not be seen any more.
    """
    try:
        wire.send_encoded(sock, answer)
    except OSError:
        time.sleep(2 * JANITOR_S)
        raise


def _answer(call: int, function: Callable[..., Any], *args: Any) -> bytes:
    """Run function and return its result, or what it raised, as an encoded answer."""
    try:
        return wire.encode({"call": call, "result": function(*args)})
    except BaseException as error:  # SystemExit too: the caller has to hear of it
        print(f"{type(error).__name__} goes back to pytest: {error}", file=sys.stderr)
        said = told(error, _traceback(error))
        if call in (IMPORTED, READY):  # nothing has been asked of what is examined
            said["examined"] = False
        return wire.encode({"call": call, "error": said})


def _traceback(error: BaseException) -> str:
    """The traceback without this file's frames, which every one would begin with."""
    found = error.__traceback__
    while found and found.tb_frame.f_code.co_filename == __file__:
        found = found.tb_next
    return "".join(traceback.format_exception(type(error), error, found))


if __name__ == "__main__":
    main()
