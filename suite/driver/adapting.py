"""LoRA adapters: loaded into the engines, and what engines answer with one."""

from pathlib import Path

from suite.driver.expected import expect
from suite.driver.expecting import Expecting
from suite.driver.together import MAX_TOKENS
from suite.models.adapters import write_adapter, write_merged

NAME = "adapter"  # of every adapter: each takes the place of the one before, also on disk


class Adapting(Expecting):
    """Tells what engines compute with an adapter by the trainer, which holds the checkpoint that it is merged into."""

    @property
    def _adapter(self) -> Path:
        return self.pool.launcher.directory / "adapters" / self.model / NAME

    def load_adapter(self, seed: int | None) -> None:
        """Write the adapter of a seed over the one before, and have the engines load it in its place; None: zeros."""
        write_adapter(self.spec, seed, self._adapter)
        self.all_engines("load_adapter", str(self._adapter))
        self.reset_cache()

    def remove_adapter(self) -> None:
        """Have the engines forget the adapter."""
        self.all_engines("remove_adapter")

    def clear_adapter(self) -> None:
        """Have the engines forget the adapter and its matrices, which are zeros in an engine that never had one."""
        self.load_adapter(None)
        self.remove_adapter()

    def expect_base_exact(self, seed: int, expected: str) -> None:
        """Every weight is bit-equal to the cold-loaded engine's, and among them is one whose name has `expected`.

        The matrices of an adapter, and what else is no weight, are left out: a cold engine has no adapter.
        """
        ranks = self.compared(seed)
        for rank in ranks:
            if not any(expected in name for name in rank["shapes"]):
                raise RuntimeError(f"expected {expected} among the weights, found {[*rank['shapes']]} {self.where}")
        self._expect_none([rank | {"others": 0} for rank in ranks], f"the base weights of checkpoint {seed}")

    def adapted(self, seed: int, adapter: int, prompts: list[list[int]]) -> list[dict]:
        """What the trainer answers with an adapter merged into the checkpoint of `seed`; see `oracles.greedy`."""
        directory = self.pool.launcher.directory / "models" / f"{self.model}-{seed}-adapter-{adapter}"
        if not (directory / "model.safetensors").exists():
            write_merged(self.spec, seed, adapter, directory)
        self.trainer.load(str(directory))
        self.held = None
        return self.trainer.call("greedy", prompts, MAX_TOKENS)[0]

    def expect_adapted(self, prompts: list[list[int]], oracle: list[dict]) -> None:
        """Greedy tokens and log-probabilities with the adapter are those of an oracle, as `adapted` gives them."""
        for said in self.all_engines("generate", prompts, MAX_TOKENS, str(self._adapter)):
            self.expect_said(prompts, oracle, said)

    def expect_has_adapter(self, expected: bool) -> None:
        """Every engine has an adapter, or none has."""
        found = self.all_engines("has_adapter")
        has = f"engines that have {'an' if expected else 'no'} adapter"
        expect(found == [expected] * len(self.engines), has, found, self.where)
