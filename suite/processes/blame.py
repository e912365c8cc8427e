"""Whose fault an error is: that of what is examined, or the suite's own.

An error is the suite's own unless something says otherwise: so a new actor, probe or half of a subject is right as it
is. What is examined stands in `examined()`: a call of the extension, of the sender, or of vLLM. Where it calls back, as
a sender does that iterates over tensors, the suite's part stands in `of_the_suite()`. Of blocks within each other the
innermost one counts. A class of errors that always says something of what is examined has `examined = True`; one that
may only be how the other side of an update has noticed has `echo = True`.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SuiteFault(Exception):
    """What the suite itself could not do: its own line is gone, its disk is full, it was too slow.

    A test that ends with it is an error, and no fail of its subject.
    """

    examined = False


@contextmanager
def examined() -> Iterator[None]:
    """Whatever is raised in the block is raised by what is examined, but for what says that it is not."""
    try:
        yield
    except BaseException as error:  # SystemExit too
        if not hasattr(error, "examined"):
            error.examined = not _comes_from_the_suite(error)
        raise


@contextmanager
def of_the_suite(doing: str) -> Iterator[None]:
    """Whatever is raised in the block becomes a SuiteFault: nothing in it is what is examined."""
    try:
        yield
    except Exception as error:
        raise SuiteFault(f"could not {doing}: {type(error).__name__}: {error}") from error


def is_examined(error: BaseException) -> bool:
    """Whether what is examined has raised this."""
    return bool(getattr(error, "examined", False))


def told(error: BaseException, stack: str = "") -> dict[str, Any]:
    """What another process is told of an error. stack: its traceback, where that is not to be the whole one."""
    said = {"kind": type(error).__name__, "message": str(error)}
    said["traceback"] = stack or "".join(traceback.format_exception(error))
    return said | {"examined": is_examined(error), "echo": bool(getattr(error, "echo", False))}


class Examined:
    """An object of what is examined: its methods are called in `examined()`."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __getattr__(self, name: str) -> Any:
        with examined():
            found = getattr(self._held, name)
        return _called(found) if callable(found) else found


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with examined():
            return function(*args, **kwargs)

    return call


def _comes_from_the_suite(error: BaseException) -> bool:
    """Whether it was raised for a SuiteFault: what is examined has heard of it, and says so in words of its own."""
    heard: BaseException | None = error
    seen: set[int] = set()
    while heard is not None and id(heard) not in seen:
        if isinstance(heard, SuiteFault):
            return True
        seen.add(id(heard))
        heard = heard.__cause__ or heard.__context__
    return False
