"""What both reference extensions share: the bracket around an update, and the check that every tensor arrived.

    begin_update(manifest)      refuses a manifest that does not fit the model, and touches nothing then
    ... tensors arrive ...      in any order
    end_update()                raises unless all of them have arrived, and are where they belong

After an update the engine's prefix cache still holds keys and values of the old weights. The driver therefore calls
`reset_prefix_cache()` on the engine after `end_update()`, as vLLM's own weight-transfer API asks of its callers.
"""

from dataclasses import dataclass, field, replace

import torch

from extensions.asleep import KeepsAsleep
from extensions.devices import synchronize
from extensions.kept import Kept
from extensions.manifest import Announced, Layout, Manifest, parse, require_name
from extensions.model.drafter import (
    DRAFT,
    Drafter,
    DraftLoad,
    drafter_of,
    of_the_drafter,
    parted,
)
from extensions.model.load import Load
from extensions.model.loading import new_load, processed_layers
from extensions.model.weights import all_zero


class UpdateError(RuntimeError):
    """An update that cannot go on. The message says in which state the weights are."""


@dataclass
class Update:
    """One update between `begin_update` and its end: what it announced, what has arrived, and how it is loaded."""

    load: Load | DraftLoad
    announced: Announced
    arrived: set[str] = field(default_factory=set)
    failed: bool = False  # a call of load.load() raised: some of its tensors may be loaded, some not
    patches: bool = False  # the model's tensors arrive element by element, which `announced` does not list

    @property
    def of_model(self) -> bool:
        """Whether it brings tensors of the model."""
        return self.patches or any(not name.startswith(DRAFT) for name in self.announced)

    @property
    def of_drafter(self) -> bool:
        """Whether it brings tensors of the draft model."""
        return any(name.startswith(DRAFT) for name in self.announced)

    def missing(self) -> list[str]:
        """The announced names that have not arrived, in the order of the manifest."""
        if self.announced.keys() <= self.arrived:
            return []
        return [name for name in self.announced if name not in self.arrived]

    def awaited(self, name: str) -> Layout:
        """The dtype and shape announced for `name`. Raises UpdateError unless a tensor of this name is awaited."""
        if self.failed:
            raise UpdateError(f"{name}: a load of this update has failed before; call abort_update() and begin again")
        if name not in self.announced:
            raise UpdateError(f"{name} was not announced in this update's manifest; it was not loaded")
        if name in self.arrived:
            raise UpdateError(f"{name} has arrived before in this update; the second was not loaded")
        return self.announced[name]

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load tensors that have arrived. Raises UpdateError, and loads none, unless all are as announced."""
        for name, tensor in tensors.items():
            expected, found = self.awaited(name), (tensor.dtype, tuple(tensor.shape))
            if expected != found:
                raise UpdateError(f"{name}: announced as {expected}, arrived as {found}; it was not loaded")
        try:
            self.load.load(tensors)
        except BaseException:
            self.failed = True
            raise
        self.arrived.update(tensors)


@dataclass(frozen=True)
class State:
    """The state of a worker between and during updates."""

    update: Update | None = None
    inconsistent: bool = False  # some weights are new and some old: a load was begun and not completed
    stale: bool = False  # the draft model has the weights of another update than the model


class UpdateBracket(KeepsAsleep):
    """Mixed into a vLLM worker. vLLM does not call `__init__` here, so the first state is a class attribute."""

    # The states, as update_state() names them, and what leads out of each:
    #   ready         begin_update() to updating
    #   stale draft   the same: the model was updated and its draft model was not, or not in whole, so that the engine
    #                 answers right and slower; an update that brings the draft model's tensors makes it ready
    #   updating      end_update() to ready; abort_update(), or an end_update() that raises, to inconsistent if a tensor
    #                 was loaded, else to the state before
    #   inconsistent  begin_update() to updating, which remembers it: only an end_update() that succeeds makes it ready
    # An update of the draft model alone makes the model neither inconsistent nor ready again.
    # A tensor outside the bracket leaves the state as it is; if its load fails, the state is inconsistent.
    weight_sync_drafts = DRAFT  # the prefix of a draft model's tensor names
    _weight_sync_state: State = State()
    _weight_sync_kept: dict[str, Kept] | None = None  # by the prefix of a model's tensor names

    def begin_update(self, manifest: Manifest) -> int:
        """Announce all tensors of an update, `[{"name", "dtype", "shape"}, ...]` with full (unsharded) shapes.

        In an engine with a draft model they may be the model's tensors, the draft model's, or both. The names of the
        draft model's tensors begin with `draft.`. Where each has an update of its own, update the model first.

        Returns the number of tensors announced. Raises ManifestError where names are missing, unknown or there twice,
        or where a shape or dtype does not fit; UpdateError inside another update. Nothing has been changed then.

        The first call for a manifest plans the update (10 to 100 ms for a small model). The plan is kept for the next
        updates with the same manifest.
        """
        self._weight_sync_require_none()
        announced = parse(manifest)
        self._weight_sync_open(self._weight_sync_load(announced), announced)
        return len(announced)

    def end_update(self) -> int:
        """Finish the update. Returns the number of tensors loaded since `begin_update`: all that were announced.

        Raises UpdateError where announced tensors have not arrived, and LoadError where one was not written to where it
        belongs; the update is aborted then.
        """
        state = self._weight_sync_state
        update = state.update
        if update is None:
            raise UpdateError("no update is under way: call begin_update(manifest) first")
        if missing := update.missing():
            became = self.abort_update()
            raise UpdateError(f"{len(missing)} announced tensors have not arrived, first {missing[0]}; {became}")
        if update.failed:
            became = self.abort_update()
            raise UpdateError(f"a tensor of this update was lost or its load failed; {became}")
        try:
            update.load.end()
            synchronize(self.device)
        except BaseException:
            self.abort_update()  # so that the next update finds every layer ready for loading
            raise
        inconsistent = state.inconsistent and not update.of_model
        stale = self._weight_sync_drafter() is not None and not update.of_drafter
        self._weight_sync_state = State(inconsistent=inconsistent, stale=stale)
        return len(update.announced)

    def abort_update(self) -> str:
        """Give up the update under way, if there is one. Returns a sentence on the state of the weights."""
        state = self._weight_sync_state
        if state.update is not None:
            before = replace(state, update=None)
            spoilt = State(
                inconsistent=state.inconsistent or state.update.of_model,
                stale=state.stale or state.update.of_drafter,
            )
            self._weight_sync_state = spoilt  # this stays where load.abort() raises
            untouched = state.update.load.abort()
            self._weight_sync_state = before if untouched else spoilt
        if self._weight_sync_state.inconsistent:
            return "part of the weights is new: the model is inconsistent until a whole update succeeds"
        if self._weight_sync_state.stale:
            return "the model's weights are as they were before the update; the draft model is stale"
        return "the weights are as they were before the update"

    def update_state(self) -> str:
        """`ready`, `updating`, `inconsistent`, or `stale draft` where only the draft model's weights are not right."""
        self._weight_sync_watch_sleep()
        state = self._weight_sync_state
        if state.update is not None:
            return "updating"
        if state.inconsistent:
            return "inconsistent"
        return "stale draft" if state.stale else "ready"

    def check_weights_changed(self) -> bool:
        """Whether every weight element that the model computes with is zero, and there is at least one.

        The name is that of vLLM's RLHF examples, where an update to zeros proves that weights arrive. Raises
        UpdateError inside an update: layers may have no weights at all then.
        """
        if self._weight_sync_state.update is not None:
            raise UpdateError("an update is under way: call end_update() or abort_update() before looking at weights")
        return all_zero(self.model_runner.get_model())

    def _weight_sync_require_none(self) -> None:
        """Raise UpdateError where an update is under way."""
        if self._weight_sync_state.update is not None:
            raise UpdateError("an update is under way: call end_update() or abort_update() first; nothing was touched")

    def _weight_sync_drafter(self) -> Drafter | None:
        """This worker's draft model, where it has one with weights of its own."""
        return drafter_of(self.model_runner, self.vllm_config)

    def _weight_sync_load(self, announced: Announced) -> Load | DraftLoad:
        """The load of an update. Raises ManifestError where a model can't take its tensors.

        Raises SleepError where some that the update does not bring may be lost.
        """
        self._weight_sync_watch_sleep()
        self._weight_sync_refuse_lost()
        drafter = self._weight_sync_drafter()
        of_model, of_drafter = parted(announced) if drafter else (announced, {})
        model, found = self.model_runner.get_model(), None
        if of_model or not of_drafter:
            plan = self._weight_sync_plans().whole(model, self.vllm_config, of_model)
            found = new_load(model, self.vllm_config, plan)
        if not of_drafter:
            return found
        with of_the_drafter():
            config = drafter.vllm_config
            plan = self._weight_sync_plans(DRAFT).whole(drafter.model, config, of_drafter)
        return DraftLoad(found, new_load(drafter.model, config, plan))

    def _weight_sync_open(self, load: Load | DraftLoad, announced: Announced) -> Update:
        """Begin an update that the model can take."""
        update = Update(load, announced)
        self._weight_sync_state = replace(self._weight_sync_state, update=update)
        try:
            load.begin()
        except BaseException:
            self.abort_update()
            raise
        return update

    def _weight_sync_plans(self, of: str = "") -> Kept:
        """The plans of the model, or of the draft model, whose tensors' names begin with DRAFT."""
        if self._weight_sync_kept is None:
            self._weight_sync_kept = {}
        return self._weight_sync_kept.setdefault(of, Kept())

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load tensors that have arrived, inside the bracket or outside it. Loads none unless all are right."""
        for name in tensors:
            require_name(name)
        if self._weight_sync_state.update is None:
            self._weight_sync_accept_alone(tensors)
        else:
            self._weight_sync_state.update.take(tensors)

    def _weight_sync_accept_alone(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load tensors outside the bracket, where the model's parameters are as loaded."""
        model = self.model_runner.get_model()
        self._weight_sync_refuse_alone(model)
        announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        plan = self._weight_sync_plans().alone(model, self.vllm_config, announced)
        before = replace(self._weight_sync_state, stale=self._weight_sync_drafter() is not None)
        self._weight_sync_state = replace(before, inconsistent=True)  # stays if the load fails
        load = new_load(model, self.vllm_config, plan)
        load.load(tensors)
        load.end()
        synchronize(self.device)
        self._weight_sync_state = before

    def _weight_sync_refuse_alone(self, model: torch.nn.Module) -> None:
        """Raise UpdateError where a tensor outside the bracket would be lost."""
        if layers := processed_layers(model):
            raise UpdateError(
                f"{len(layers)} layers of this model hold repacked or quantised weights, first {layers[0]}: a tensor"
                " loaded on its own would be lost or corrupt them. Call begin_update(manifest) before and end_update()"
                " after; nothing was touched"
            )
