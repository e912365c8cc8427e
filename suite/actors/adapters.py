"""LoRA adapters in an engine: loaded, used and removed as vLLM's callers do it."""

from pathlib import Path
from typing import Any

from suite.processes.blame import examined

ID = 1  # vLLM knows an adapter by a number; by its name and its path it tells the prefixes that it has cached


class Adapting:
    """Mixed into what owns a `vllm.LLM`. Its engine takes one adapter, which goes by the path that it is read from."""

    _llm: Any

    def load_adapter(self, path: str) -> None:
        """Load an adapter, in place of the one before where there is one.

        What it has computed stays cached under its name and path: vLLM leaves that reset to its caller.
        """
        asked = request(path, load_inplace=True)
        with examined():
            self._llm.llm_engine.add_lora(asked)

    def remove_adapter(self) -> None:
        """Forget the adapter; vLLM leaves its matrices where they are until another one is loaded."""
        with examined():
            self._llm.llm_engine.remove_lora(ID)

    def has_adapter(self) -> bool:
        """Whether the engine has an adapter."""
        with examined():
            return ID in self._llm.llm_engine.list_loras()


def request(path: str, load_inplace: bool = False) -> Any:
    """vLLM's LoRARequest for the adapter in `path`, which is read where it is not loaded yet."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(Path(path).name, ID, path, load_inplace=load_inplace)
