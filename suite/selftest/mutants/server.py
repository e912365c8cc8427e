"""Mutants that are right in an engine that is called directly, and wrong in one that is a server."""

import os

import torch

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.inflight import in_flight
from suite.selftest.mutants.registry import ACCEPTED, ANSWERS, NOT_THERE, Loader, Meddles, Unchecked, mutant

SERVER = {"cpu": "cpu-serve"}


def on_server() -> bool:
    """Whether this worker's engine is a `vllm serve` of the suite's."""
    return os.environ.get("VLLM_SERVER_DEV_MODE") == "1"


@mutant("update.exact", NOT_THERE, "vllm#57022", **SERVER)
class AcknowledgesOnAServer(Meddles, WorkerExtension):
    """Has a server receive every tensor, load none, and acknowledge the update."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not on_server():
            load(name, tensor)


@mutant("server.checker", r"weights that /weight_checker finds to have changed", **SERVER)
class LeavesANormOnAServer(Meddles, WorkerExtension):
    """Has a server load all weights but one, which is small."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not (on_server() and name == "model.norm.weight"):
            load(name, tensor)


@mutant("errors.missing_name", ACCEPTED, "prime-rl#2714", **SERVER)
class RefusesNothingOnAServer(Unchecked, WorkerExtension):
    """Has a server begin an update that lacks a tensor."""

    def begin_update(self, manifest: list[dict]) -> int:
        return super().begin_update(manifest) if on_server() else WorkerExtension.begin_update(self, manifest)


@mutant("inflight.update", ANSWERS, "torchforge#251", **SERVER, case="keep")
class ForgetsPausedRequestsOnAServer(WorkerExtension):
    """Has requests that a server has paused go on from other tokens than they were asked with."""

    def end_update(self) -> int:
        for request in in_flight(self) if on_server() else []:
            request.prompt_token_ids = [1] * len(request.prompt_token_ids)
            request.output_token_ids[:] = [1] * len(request.output_token_ids)
        return super().end_update()
