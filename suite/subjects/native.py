"""vLLM's native weight transfer, whichever backend moves the weights: init, start, update, finish.

The engine's half calls vllm.LLM's own methods, as a training loop does. Nothing is added to the workers.
"""

from typing import Any, ClassVar

from suite.subjects.native_versions import Api, installed
from suite.subjects.protocol import Engine, EngineHalf, Subject, no_beginning

DRAFT = "draft."  # the suite's: vLLM's updates of a draft model have the names of its checkpoint
NO_DRAFTS = {"draft.updated": "vLLM's worker lets this backend update the model alone"}
METHODS = "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"


class NativeWorker:
    """The extension of an engine that needs none."""


class NativeEngine(EngineHalf):
    """Drives the four calls. An update that was started and has not failed is given up by finishing it.

    vLLM has no call to give an update up: before the first tensor, finishing puts the old ones back.
    """

    def __init__(self, subject: "Native", engine: Engine) -> None:
        super().__init__(subject, engine)
        self._api, self._started = installed(), False

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Have the workers meet the trainer."""
        information = self.subject.init_information(self._api, address, port, rank_offset, world_size)
        self._call("init_weight_transfer_engine", {"init_info": information})

    def begin(self, manifest: list[dict]) -> None:
        """Start the update; vLLM does not ask what comes."""
        if self._api.brackets:
            drafts = any(entry["name"].startswith(DRAFT) for entry in manifest)
            self._call("start_draft_weight_update" if drafts else "start_weight_update")
            self._started = True

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers receive and load all tensors, in the order of the manifest."""
        tensors = [entry | {"name": entry["name"].removeprefix(DRAFT)} for entry in manifest]
        try:
            self._call("update_weights", {"update_info": self.update_information(tensors)})
        except Exception:
            self._started = self._started and not self._api.ends_when_failing
            raise

    def end(self) -> None:
        """Finish the update. No cache is reset by it: that is the caller's."""
        if self._api.brackets:
            self._call("finish_weight_update")
            self._started = False

    def abort(self) -> None:
        """Finish an update that vLLM takes for one under way: else it refuses every later one."""
        if self._started:
            self._started = False
            self._call("finish_weight_update")

    def state(self) -> list[str]:
        """Nothing: vLLM does not say whether its weights are whole."""
        return []

    def update_information(self, manifest: list[dict]) -> dict[str, Any]:
        """What the workers are told of the tensors that come."""
        return self.subject.update_information(manifest, self._api)

    def _call(self, method: str, *args: Any) -> None:
        self.engine.call_llm(method, *args)


class Native(Subject):
    """A backend of vLLM's native weight transfer.

    backend: its name in weight_transfer_config.
    """

    backend: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = METHODS
    calls: ClassVar[tuple[str, ...]] = (
        'LLM.init_weight_transfer_engine({"init_info": ...}), once',
        "LLM.start_weight_update(), from vLLM 0.21 on; for a draft model start_draft_weight_update(), from 0.26 on",
        'LLM.update_weights({"update_info": ...}), while the trainer sends',
        "LLM.finish_weight_update(), from vLLM 0.21 on",
        "LLM.reset_prefix_cache(), which vLLM leaves to its caller",
    )

    def draft_prefix(self) -> str:
        """From vLLM 0.26 on, updates of the draft model are told from others by this."""
        return "" if "draft.updated" in self.lacks else DRAFT

    def engine_arguments(self) -> dict[str, Any]:
        """The backend, without which vLLM takes no update."""
        return {"weight_transfer_config": {"backend": self.backend}}

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return NativeEngine(self, engine)

    def init_information(self, api: Api, address: str, port: int, rank_offset: int, world_size: int) -> dict[str, Any]:
        """What the workers are told before the first update."""
        return {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
        }

    def update_information(self, manifest: list[dict], api: Api) -> dict[str, Any]:
        """What the workers are told at every update: names, dtypes and shapes, each in a list of its own."""
        columns = (("names", "name"), ("dtype_names", "dtype"), ("shapes", "shape"))
        return {column: [entry[key] for entry in manifest] for column, key in columns}


def lacks(api: Api) -> dict[str, str]:
    """What every backend lacks; see Subject.lacks."""
    found = {
        "update.zeroed": "vLLM's native transfer has no check_weights_changed(); update.repeated sends zeros too",
        "names.free": "native transfer is part of vLLM's worker, and adds no names to it",
        "draft.stale": "vLLM's native transfer has no call that says what state the weights are in",
    }
    drafts = {} if api.updates_drafts else {"draft.updated": "vLLM before 0.26 does not update draft models"}
    return found | drafts | ({} if api.brackets else no_beginning("vLLM's native transfer before 0.21"))
