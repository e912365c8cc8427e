"""How a class is named to another process: "pkg.module:Class"."""

import importlib
from typing import Any


def load(target: str) -> Any:
    """Import what `target` names. Raises what that import raises; AttributeError where the module has no such name."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
