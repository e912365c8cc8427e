"""Mutants that are right on an idle engine and wrong where requests are running: inflight.*."""

import sys
from typing import Any

import torch

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import ANSWERS, DIFFER, NOT_THERE, Loader, Meddles, mutant

CPU = {"cpu": "cpu-tp1"}


def in_flight(worker: Any) -> list[Any]:
    """The requests that a worker's model runner has begun, and that have not all their tokens."""
    requests = getattr(worker.model_runner, "requests", {}).values()
    return [r for r in requests if r.sampling_params and len(r.output_token_ids) < r.sampling_params.max_tokens]


def engine_core() -> Any:
    """The one that has called this worker, in its own process; raises RuntimeError where workers have their own."""
    frame = sys._getframe()
    while frame := frame.f_back:
        caller = frame.f_locals.get("self")
        if "EngineCore" in (cls.__name__ for cls in type(caller).__mro__):
            return caller
    raise RuntimeError("this mutant is for a worker that runs in its engine core's process")


@mutant("inflight.update", NOT_THERE, "SkyRL#1824", **CPU, case="keep")
class NeedsAnIdleEngine(Meddles, WorkerExtension):
    """Loads nothing while requests are in flight, and reports success."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not in_flight(self):
            load(name, tensor)


@mutant("inflight.update", "while requests are in flight", **CPU, case="keep")
class RefusesWhileRequestsRun(WorkerExtension):
    """Takes no update while its worker remembers requests that have not all their tokens."""

    def begin_update(self, manifest: list[dict]) -> int:
        if requests := in_flight(self):
            raise RuntimeError(f"no update begins while requests are in flight: there are {len(requests)}")
        return super().begin_update(manifest)


@mutant("inflight.update", ANSWERS, "torchforge#251", **CPU, case="keep")
class ForgetsPausedRequests(WorkerExtension):
    """Has requests that were paused go on from other tokens than they were asked with."""

    def end_update(self) -> int:
        for request in in_flight(self):
            request.prompt_token_ids = [1] * len(request.prompt_token_ids)
            request.output_token_ids[:] = [1] * len(request.output_token_ids)
        return super().end_update()


@mutant("inflight.prefix", ANSWERS, "vllm#28827", **CPU)
class IgnoresARefusedReset(WorkerExtension):
    """Resets the prefix cache itself, and does not look at the answer, which is False while requests hold a part."""

    weight_sync_resets_cache = True

    def end_update(self) -> int:
        count = super().end_update()
        engine_core().scheduler.reset_prefix_cache()
        return count


@mutant("inflight.refused", rf"{ANSWERS}|{DIFFER}", "vllm#57854", **CPU)
class SpoilsWhatItRefusesWhileRequestsRun(WorkerExtension):
    """Refuses an update, and has changed a weight by then where requests are in flight."""

    def begin_update(self, manifest: list[dict]) -> int:
        try:
            return super().begin_update(manifest)
        except Exception:
            if in_flight(self):
                with torch.no_grad():
                    for parameter in self.model_runner.get_model().parameters():
                        parameter.mul_(-1)
            raise


@mutant("inflight.versions", "tokens of the versions", "vllm#54443", **CPU)
class KeepsTheOldVersion(WorkerExtension):
    """Has the first version that is set after an update be lost, so that new tokens are said to be of the old one."""

    def end_update(self) -> int:
        if in_flight(self):
            core = engine_core()
            core.set_weight_version = lambda version: vars(core).pop("set_weight_version", None) and None
        return super().end_update()
