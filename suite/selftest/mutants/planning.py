"""Mutants whose plan of an update is wrong: they copy a tensor to where it does not belong."""

from dataclasses import replace

from extensions.broadcast import WorkerExtension
from extensions.model.twin import Fill
from suite.selftest.mutants.registry import BROADCAST, DIFFER, mutant

KEYS, VALUES = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")


class Replans:
    """Mixed into a reference extension: each fill of the plan passes `_mutant_fill`, after the plan was judged."""

    def begin_update(self, manifest: list[dict]) -> int:
        count = super().begin_update(manifest)
        load = self._weight_sync_state.update.load
        load._plan = replace(load._plan, fills=[self._mutant_fill(fill, load._plan.fills) for fill in load._plan.fills])
        return count


@mutant("update.exact", DIFFER, **BROADCAST)
class PlansOneElementFurther(Replans, WorkerExtension):
    """Copies the keys of a fused layer one element behind where they belong."""

    def _mutant_fill(self, fill: Fill, fills: list[Fill]) -> Fill:
        if not fill.reads or fill.reads[0][0] != KEYS:
            return fill
        return replace(fill, region=replace(fill.region, offset=fill.region.offset + fill.region.itemsize))


@mutant("update.exact", DIFFER, **BROADCAST)
class FillsOneRegionTwice(Replans, WorkerExtension):
    """Copies the values of a fused layer to where its keys belong, and nothing to where they do."""

    def _mutant_fill(self, fill: Fill, fills: list[Fill]) -> Fill:
        if not fill.reads or fill.reads[0][0] != VALUES:
            return fill
        return next(replace(fill, region=other.region) for other in fills if other.reads and other.reads[0][0] == KEYS)
