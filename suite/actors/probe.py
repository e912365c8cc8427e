"""The suite's own eyes inside an engine's workers, beside the extension under examination.

vLLM takes one extension class. So the workers get `ProbedExtension`: the subject's class, which the environment names,
with the probe's methods added. The subject's own methods stay as they are.
"""

import contextlib
import inspect
import math
import os
import time
import traceback
from collections.abc import Iterator
from functools import cache

import torch

from extensions.devices import device_id, synchronize
from extensions.group import Communicator, stateless_init_process_group
from extensions.model.drafter import drafter_of
from extensions.model.walk import every_tensor
from extensions.model.weights import applied_weight, effective_weights
from extensions.ranks import rank_in_engine
from suite.actors import arrived, memory, recording, settings
from suite.actors.checksum import checksum
from suite.processes import wire
from suite.processes.blame import examined, is_examined, of_the_suite
from suite.subjects import load
from suite.subjects.adapting import adapted

EXTENSION = "WEIGHT_SYNC_EXTENSION"
PROBED = "suite.actors.probe.ProbedExtension"
STATE = ("_weight_sync_", "_mutant_")  # what the attributes begin with that the suite's own extensions leave on workers
SHOWN = 5
PIECE_ELEMENTS = 1 << 26  # that are looked at as float32 at once: 256 MiB


class Probe:
    """Reads what the worker computes with; changes nothing."""

    _probe_group: Communicator | None = None

    def probe_call(self, method: str, args: list) -> dict:
        """Call a worker method and return {"result": ...} or {"error": what it raised}.

        Under tensor parallelism vLLM's executor stops reading replies at the first rank that raised. The replies of
        the other ranks stay in their queues and answer the calls that follow (seen in vLLM 0.32.0). An error that
        travels as a result leaves the queues in step, and tells what every rank found. What a method of the probe
        raises is the suite's own; what any other raises is not.
        """
        try:
            given = adapted(self, method, args)
            with contextlib.nullcontext() if hasattr(Probe, method) else examined():
                return {"result": getattr(self, method)(*given)}
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            return said | {"examined": is_examined(error)}

    def probe_call_encoded(self, text: str) -> dict[str, str]:
        """As `probe_call`, over HTTP: vLLM's /collective_rpc takes texts and gives dicts.

        `text` is [method, args] as suite.processes.wire has it, and so is {"encoded": what probe_call says}. A result
        that is no plain data arrives as a text, as vLLM's endpoint gives it.
        """
        said = self.probe_call(*wire.decode(text.encode()))
        try:
            encoded = wire.encode(said)
        except TypeError:
            encoded = wire.encode(said | {"result": str(said["result"])})
        return {"encoded": encoded.decode()}

    def probe_become(self, extension: str) -> None:
        """Exchange the extension in this worker's class for `pkg.module:Class`, and forget what it left behind."""
        holder = next(cls for cls in type(self).__mro__ if any(map(_is_probed, cls.__bases__)))
        holder.__bases__ = tuple(_probed(extension) if _is_probed(base) else base for base in holder.__bases__)
        for method in ("abort_update", "close_weight_update_group"):
            with contextlib.suppress(Exception):  # of what the former one left, anything may be
                getattr(self, method, lambda: None)()
        for name, value in [*vars(self).items()]:
            if name.startswith(STATE) or (inspect.ismethod(value) and hasattr(type(self), name)):
                delattr(self, name)
        if getattr(self, "_sleep_mode_backend", None) is not None:  # by which the extension knows an engine that slept
            self._sleep_mode_backend = None  # vLLM makes another when it sleeps again
        synchronize(self.device)
        self._probe_settings = settings.settings()

    def probe_save(self, path: str) -> None:
        """Write what this rank computes with, for `probe_compare`."""
        weights, beside = self._probe_copies()
        with of_the_suite("write what this engine computes with"):
            recording.write(path, self._probe_rank, weights, beside)

    def probe_record(self) -> None:
        """Remember what this rank computes with, after a cold load and an answer; see `suite.actors.recording`."""
        self._probe_recorded = self._probe_copies()

    def probe_settle(self, path: str) -> None:
        """Write what `probe_record` remembered, and what of it changes by itself: this rank has answered since."""
        weights, beside = self.__dict__.pop("_probe_recorded")
        answering = recording.unsteady_of(beside, recording.beside_of(self.model_runner.get_model(), weights))
        with of_the_suite("write what this engine computes with"):
            unsteady = recording.both(answering, recording.unsteady_loads(self.vllm_config, weights))
            recording.write(path, self._probe_rank, weights, beside, unsteady)
        self._probe_settings = settings.settings()  # anew: what vLLM sets when it first answers is not an update's

    def probe_compare(self, path: str, beside: list[str], unsteady: str) -> dict:
        """Compare bit by bit with what was written: what was looked at, and what differs where.

        path: where the weights are. beside: where the other tensors are; of several places, what they agree on counts.
        unsteady: of the cold engine that says what is left out.
        """
        shapes: dict[str, list[int]] = {}

        def looked_at() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in self._probe_weights():
                shapes[name] = list(weight.shape)
                yield name, weight

        with of_the_suite("read what another engine computes with"):
            expected = recording.read_weights(path, self._probe_rank)
            expected_beside, left_out = recording.agreed(beside, unsteady, self._probe_rank)
        weights = [*recording.differing_weights(looked_at(), expected)]
        found_beside = recording.beside_of(self.model_runner.get_model(), shapes)
        others = recording.differing_beside(found_beside, expected_beside, left_out)
        elements = sum(map(math.prod, shapes.values()))
        counts = {"elements": elements, "weights": len(shapes), "differing": len(weights), "others": len(others)}
        return {"rank": self._probe_rank, **counts, "first": [*weights, *others][:SHOWN], "shapes": shapes}

    def probe_drafter(self, path: str) -> dict:
        """Compare the draft model's weights, bit by bit, with what a cold engine wrote of its model at `path`."""
        drafter = drafter_of(self.model_runner, self.vllm_config)
        if drafter is None:
            raise RuntimeError("this engine has no draft model")
        found = dict(effective_weights(drafter.model))
        with of_the_suite("read what another engine computes with"):
            expected = recording.read_weights(path, self._probe_rank)
        differing = [*recording.differing_weights(found.items(), expected)]
        elements = sum(weight.numel() for weight in found.values())
        return {
            "rank": self._probe_rank,
            "elements": elements,
            "differing": len(differing),
            "first": differing[:SHOWN],
        }

    def probe_alike(self, path: str, other: str) -> dict:
        """Which weights equal, bit by bit, those that a cold engine wrote at `path`.

        Only those are looked at, and counted as "weights", in which `path` and `other`, of another checkpoint, differ.
        """
        with of_the_suite("read what another engine computes with"):
            expected = recording.telling(recording.read_weights(path, self._probe_rank), other, self._probe_rank)
        looked_at = {name: weight for name, weight in self._probe_weights() if name in expected}
        differing = {said.partition(": ")[0] for said in recording.differing_weights(looked_at.items(), expected)}
        same = [name for name in expected if name not in differing]
        return {"rank": self._probe_rank, "weights": len(expected), "same": len(same), "first": same[:SHOWN]}

    def probe_zero(self) -> dict:
        """How many effective elements there are, and which weights have some that aren't zero."""
        elements, nonzero = 0, []
        for name, weight in self._probe_weights():
            elements += weight.numel()
            if count := _nonzero(weight):
                nonzero.append(f"{name}: {count} of {weight.numel()} elements are not zero")
        return {"rank": self._probe_rank, "elements": elements, "differing": len(nonzero), "first": nonzero[:SHOWN]}

    def probe_checksums(self, manifest: list[dict]) -> dict[str, int]:
        """`{announced name: positional checksum}` of what this rank computes with; see `suite.actors.arrived`."""
        return arrived.checksums_of(self.model_runner.get_model(), self.vllm_config, manifest)

    def probe_weight_checksums(self, negated: bool) -> dict[str, int]:
        """`{weight: positional checksum}` of every effective weight as this rank has it, or of its negative."""
        return {name: checksum(-weight if negated else weight) for name, weight in self._probe_weights()}

    def probe_bits(self, name: str, count: int) -> list[int]:
        """The first `count` elements of an effective weight of 16-bit elements, as patterns of bits."""
        weight = dict(self._probe_weights())[name].contiguous().view(-1)[:count]
        return [pattern & 0xFFFF for pattern in weight.view(torch.int16).tolist()]

    def probe_embedding_and_head(self) -> dict:
        """How many rows this rank's embedding has, and how many of them the output layer applies to the same tokens.

        No rows where the two are not both on this rank: the ranks of a pipeline have some layers each.
        """
        model = self.model_runner.get_model()
        if not all(hasattr(layer, "weight") for layer in (model.model.embed_tokens, model.lm_head)):
            return {"rank": self._probe_rank, "rows": 0, "equal": 0}
        looked_up, applied = model.model.embed_tokens.weight.detach(), applied_weight(model.lm_head)
        return {
            "rank": self._probe_rank,
            "rows": len(looked_up),
            "equal": int((looked_up == applied).all(dim=1).sum()),
        }

    def probe_addresses(self) -> dict[str, int]:
        """`{path: address}` of every tensor on this rank's device that it computes with and that isn't empty."""
        found = every_tensor(self.model_runner.get_model())
        return {path: t.data_ptr() for path, t in found if t.numel() and t.device.type == self.device.type}

    def probe_buffers(self) -> dict[str, str]:
        """{buffer: digest} of every buffer, but for those that are a parameter's memory under another name."""
        model = self.model_runner.get_model()
        of_parameters = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
        return {
            name: recording.Kept.of(buffer).digest()
            for name, buffer in model.named_buffers()
            if buffer.untyped_storage().data_ptr() not in of_parameters
        }

    def probe_device(self) -> dict:
        """Which device this worker is on, and its process: what is asked first of a worker."""
        self._probe_settings = settings.settings()
        return {
            "rank": self._probe_rank,
            "pid": os.getpid(),
            "device": str(self.device),
            "id": device_id(self.device),
        }

    def probe_resources(self) -> dict[str, int]:
        """What this worker's process holds; see `memory.resources`."""
        return memory.resources(self.device)

    def probe_settings(self) -> list[str]:
        """Which settings of this worker's process are others than before its first update; see `settings`."""
        return settings.changed(self._probe_settings, settings.settings())

    def probe_random(self, draw: bool) -> str:
        """Where this worker's generators of random numbers stand; see `settings.random_state`."""
        return settings.random_state(draw)

    def probe_nothing(self, manifest: list[dict] | None = None) -> None:
        """Do nothing with what was sent: what is left is the call itself."""

    def probe_memory_mark(self) -> None:
        """From here on peak memory is measured."""
        self._probe_mark = memory.mark(self.device)

    def probe_memory_peak(self) -> int:
        """Bytes above the mark at the highest since."""
        return memory.peak_above(self._probe_mark, self.device)

    @of_the_suite("join the roofline's group")
    def probe_join(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Join a group of the probe's own, for rooflines."""
        if self._probe_group is not None:
            self._probe_group.close()
        self._probe_group = stateless_init_process_group(
            address, port, rank_offset + self._probe_rank, world_size, self.device
        )

    @of_the_suite("receive a roofline's broadcast")
    def probe_receive(self, nbytes: int) -> None:
        """Receive `nbytes`, piece by piece: what the hardware takes for the same bytes."""
        piece, buffer = min(nbytes, memory.PIECE_BYTES), getattr(self, "_probe_buffer", None)
        if buffer is None or buffer.numel() != piece:
            self._probe_buffer = torch.empty(piece, dtype=torch.uint8, device=self.device)
        for count in memory.pieces(nbytes):
            self._probe_group.broadcast(self._probe_buffer[:count], src=0)
        synchronize(self.device)

    @of_the_suite("copy for a roofline")
    def probe_copy(self, nbytes: int) -> float:
        """Seconds to copy `nbytes` on the worker's device, piece by piece."""
        piece = min(nbytes, memory.PIECE_BYTES)
        if getattr(self, "_probe_pair", None) is None or self._probe_pair[0].numel() != piece:
            source = torch.ones(piece, dtype=torch.uint8, device=self.device)
            self._probe_pair = (source, torch.empty_like(source))
        source, target = self._probe_pair
        synchronize(self.device)
        started = time.monotonic()
        for count in memory.pieces(nbytes):
            target[:count].copy_(source[:count])
        synchronize(self.device)
        return time.monotonic() - started

    def probe_forget(self) -> None:
        """Free the buffers of the rooflines."""
        self._probe_buffer = self._probe_pair = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _probe_rank(self) -> int:
        """This worker's rank among all of its engine's, with the data-parallel replicas in turn."""
        return rank_in_engine(self)

    def _probe_copies(self) -> tuple[recording.Tensors, recording.Beside]:
        """Copies of the weights, and of what is beside them."""
        model = self.model_runner.get_model()
        weights = recording.weights_of(model)
        return weights, recording.beside_of(model, weights)

    def _probe_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return effective_weights(self.model_runner.get_model())


def _nonzero(weight: torch.Tensor) -> int:
    """How many elements are not zero, counted in pieces: a whole copy may not fit beside the weights."""
    return sum(int(torch.count_nonzero(piece.float())) for piece in weight.reshape(-1).split(PIECE_ELEMENTS))


def __getattr__(name: str) -> type:
    """`ProbedExtension` is made when vLLM asks for it, since the environment names the subject."""
    if name != "ProbedExtension":
        raise AttributeError(name)
    return _probed(os.environ[EXTENSION])


def _is_probed(cls: type) -> bool:
    return cls.__name__ == "ProbedExtension"


@cache
def _probed(extension: str) -> type:
    return type("ProbedExtension", (Probe, load(extension)), {"__doc__": f"{extension}, with the probe beside it."})
