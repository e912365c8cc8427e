"""Files in which an engine writes down what it computes with and answers, for others that wait for them."""

import os
from collections.abc import Callable
from pathlib import Path


def weights_path(path: str, rank: int) -> Path:
    """Where the weights of a rank are. This file is written last: once it is there, so are all others of the rank."""
    return Path(f"{path}.rank{rank}.safetensors")


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `target`, and put it in its place: nobody reads half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    write(partial)
    partial.replace(target)
