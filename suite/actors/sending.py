"""The trainer's half of every update, whatever trains: it needs `named_tensors`, `named_layout`, `rank`,
`world_size` and `device`.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from extensions.broadcast import BroadcastSender
from extensions.colocate import HandleSender
from extensions.group import Communicator, stateless_init_process_group
from extensions.manifest import manifest_of
from suite.actors import link, memory
from suite.actors.attending import TOLD_S, Refused, expect_ended, send_attended
from suite.subjects import SENDERS, load


class Sending:
    """Mixed into the trainer. Several engines may be fed at once."""

    rank: int
    world_size: int
    device: torch.device

    _links: tuple[link.Link, ...] = ()
    _fault: dict | None = None
    _call_off: bool = False
    _sender: str = ""
    _broadcaster: BroadcastSender | None = None
    _hander: HandleSender | None = None
    _roofline: Communicator | None = None
    _roofline_buffer: torch.Tensor | None = None

    def connect(self, link_paths: list[str], deadline_s: float, sender: str = "") -> None:
        """Connect to the engines that listen at these paths, and hang up on earlier ones.

        `sender` is `pkg.module:Class` of what sends to them; by default the reference's for the transport.
        """
        if self._hander is not None:
            self._hander.release()
        self._hander, self._sender = None, sender
        for old in self._links:
            old.close()
        self._links = tuple(link.connect(path, deadline_s) for path in link_paths)

    def open_group(self, address: str, port: int, world_size: int) -> None:
        """Serve the group of this trainer's rank 0 and all workers of the connected engines."""
        if self._broadcaster is not None:
            self._broadcaster.close()
        self._broadcaster = load(self._sender or SENDERS["broadcast"])(address, port, world_size, self.device)

    def update(
        self,
        transport: str,
        deadline_s: float,
        order: str = "checkpoint",
        alter: dict | None = None,
        relabel: str | None = None,
        fault: dict | None = None,
        call_off: bool = False,
    ) -> dict:
        """This rank's half of one update. Returns when it started and ended (monotonic clock) and what was sent.

        `order` and `alter` are those of `named_tensors`. `relabel` names the device of the handles falsely; where it
        is empty there are none. `fault` has {"moment": "before" | "during" | "after" the transfer, "signal": "KILL" or
        "STOP"} sent to this process then, or to that of "pid". `call_off` ends the update when all engines have begun
        it. Raises Refused where an engine refuses, and where it is called off. What else it raises, engines are told.
        """
        started, self._fault, self._call_off = time.monotonic(), fault, call_off
        try:
            if transport == "broadcast":
                sent = self._update_by_broadcast(deadline_s, order, alter)
            else:
                sent = self._update_by_handles(deadline_s, order, alter, relabel)
        except Refused:
            raise
        except Exception as error:
            self._say_failed(error)
            raise
        return {"started_s": started, "ended_s": time.monotonic(), **sent}

    def join_roofline(self, address: str, port: int, world_size: int) -> None:
        """Serve the probes' group."""
        if self._roofline is not None:
            self._roofline.close()
        self._roofline = stateless_init_process_group(address, port, 0, world_size, self.device)

    def send_roofline(self, nbytes: int) -> dict:
        """Broadcast `nbytes`, piece by piece; returns when it started and ended (monotonic clock)."""
        piece = min(nbytes, memory.PIECE_BYTES)
        if self._roofline_buffer is None or self._roofline_buffer.numel() != piece:
            self._roofline_buffer = torch.ones(piece, dtype=torch.uint8, device=self.device)
        started = time.monotonic()
        for count in memory.pieces(nbytes):
            self._roofline.broadcast(self._roofline_buffer[:count], src=0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {"started_s": started, "ended_s": time.monotonic()}

    def disconnect(self) -> None:
        """Close groups and lines, and release what was handed over."""
        for closing in (self._broadcaster, self._roofline, *self._links):
            if closing is not None:
                closing.close()
        if self._hander is not None:
            self._hander.release()
        self._broadcaster = self._roofline = self._roofline_buffer = self._hander = None
        self._links = ()

    def _update_by_broadcast(self, deadline_s: float, order: str, alter: dict | None) -> dict:
        manifest = manifest_of(self.named_layout(order, alter))
        go = True
        if self.rank == 0:
            refusals = self._announce({"manifest": manifest}, deadline_s)
            go = not refusals
        if not self._agreed(go):
            raise Refused("; ".join(refusals) if self.rank == 0 else "an engine refused rank 0's update")
        sent = 0
        if self.rank == 0:
            named = self._struck_half_way(self.named_tensors(order, alter), len(manifest))
            sent = send_attended(self._broadcaster, named, self._links, deadline_s, lambda: self._strike("after"))
        else:
            for _ in self.named_tensors(order, alter):
                pass  # every rank takes part in gathering; rank 0 sends
        return {"bytes_sent": sent, "tensors": len(manifest)}

    def _update_by_handles(self, deadline_s: float, order: str, alter: dict | None, relabel: str | None) -> dict:
        if self._hander is None:
            self._hander = load(self._sender or SENDERS["handles"])(self.device)
        named = list(self.named_tensors(order, alter))
        handles = self._hander.handles(named)
        if relabel is not None:
            handles = {relabel: next(iter(handles.values()))} if relabel else {}
        manifest = manifest_of(named)
        refusals = self._announce({"manifest": manifest, "handles": handles}, deadline_s)
        if not refusals:
            self._strike("during")
            self._await_end(deadline_s)
            self._strike("after")
        if self.device.type == "cuda":
            self._hander.release()
        if refusals:
            raise Refused("; ".join(refusals))
        return {"bytes_sent": sum(t.numel() * t.element_size() for _, t in named), "tensors": len(named)}

    def _announce(self, message: dict[str, Any], deadline_s: float) -> list[str]:
        """Announce the update to all engines, and have all start it or none. Returns why engines refused."""
        for engine in self._links:
            engine.send(message, deadline_s)
        answers = [engine.receive(deadline_s) for engine in self._links]
        refusals = [answer["refused"] for answer in answers if "refused" in answer]
        if self._call_off and not refusals:
            refusals.append(link.CALLED_OFF)
        self._strike("before")
        for engine, answer in zip(self._links, answers, strict=True):
            if "refused" not in answer:
                engine.send({"go": not refusals}, deadline_s)
        return refusals

    def _await_end(self, deadline_s: float) -> None:
        """Wait until every engine has acknowledged: only then may the tensors be changed or freed."""
        expect_ended([engine.receive(deadline_s) for engine in self._links])

    def _say_failed(self, error: Exception) -> None:
        """Tell the engines, which may wait for what now never comes."""
        for engine in self._links:
            with contextlib.suppress(link.LinkError):
                engine.send({"failed": f"{type(error).__name__}: {error}"}, TOLD_S)

    def _agreed(self, go: bool) -> bool:
        """Rank 0's decision, on all ranks of the trainer."""
        if self.world_size == 1:
            return go
        decision = torch.tensor([int(go)], device=self.device)
        torch.distributed.broadcast(decision, src=0)
        return bool(decision.item())

    def _struck_half_way(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], count: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for index, named in enumerate(named_tensors):
            if index == count // 2:
                self._strike("during")
            yield named

    def _strike(self, moment: str) -> None:
        if self._fault and self._fault["moment"] == moment:
            number = signal.Signals[f"SIG{self._fault['signal']}"]
            os.kill(self._fault.get("pid", os.getpid()), number)
