"""Whether a model can take an update, judged once for a manifest, and the plan of it, kept for the next update.

A plan is kept as long as the same tensors are announced for the same model, and the model's tensors are where they
were, in their shapes.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from extensions.layout import Layout
from extensions.manifest import Announced, ManifestError, check, require_none
from extensions.model.headers import checkpoint_layouts
from extensions.model.loading import processed_layers
from extensions.model.twin import HEAD, live_tensors, split
from extensions.model.views import parted
from extensions.plan import Plan, PlanError, planned

MAX_ALONE = 1024  # plans of tensors outside the bracket that are kept


@dataclass
class Kept:
    """The plans that were made for one model. `whole` is of the manifest that was announced last.

    A plan is None where none could be made, and the update fits the engine's checkpoint.
    """

    _model: weakref.ref | None = None
    _places: list[tuple[dict, str]] = field(default_factory=list)  # what holds each of its tensors, and the name there
    _layout: Layout | None = None  # of those, in their order
    _whole: tuple[Announced, Plan | None] | None = None
    _alone: dict[tuple, Plan | None] = field(default_factory=dict)
    kept: int = 0  # counts the models that plans were kept of: another one, or the same with its tensors elsewhere

    def whole(self, model: torch.nn.Module, vllm_config: object, announced: Announced) -> Plan | None:
        """The plan of an update of all weights. Raises ManifestError where the model can't take it."""
        if not self.holds(model) or self._whole is None or self._whole[0] != announced:
            plan = accepted(model, vllm_config, announced)
            self._keep(model)
            self._whole = (announced, plan)
        return self._whole[1]

    def alone(self, model: torch.nn.Module, vllm_config: object, announced: Announced) -> Plan | None:
        """The plan of tensors outside an update. Raises ManifestError where the model can't take them."""
        key = tuple(announced.items())
        if not self.holds(model) or key not in self._alone:
            plan = accepted(model, vllm_config, announced, whole=False)
            self._keep(model)
            if len(self._alone) >= MAX_ALONE:
                self._alone.clear()
            self._alone[key] = plan
        return self._alone[key]

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether plans are kept of this model, and its tensors are where they were."""
        if self._model is None or self._model() is not model:
            return False
        tensors = [holder.get(name) for holder, name in self._places]
        return not any(tensor is None for tensor in tensors) and self._layout.holds(tensors)

    def _keep(self, model: torch.nn.Module) -> None:
        """Keep plans of this model. Those of another one, or from before its tensors moved, are dropped."""
        if not self.holds(model):
            self._whole, self._alone, self.kept = None, {}, self.kept + 1
            self._model, self._places = weakref.ref(model), [*_places(model)]
            self._layout = Layout([holder[name] for holder, name in self._places])


def _places(model: torch.nn.Module) -> Iterator[tuple[dict, str]]:
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield holder, name


def accepted(model: torch.nn.Module, vllm_config: object, announced: Announced, whole: bool = True) -> Plan | None:
    """The plan of an update, or of tensors on their own, that the model can take.

    None where no plan can be made, and the tensors are those of the engine's own checkpoint. Raises ManifestError where
    the model can't take them, and where there is neither a plan nor a checkpoint to judge by. Nothing was touched then.
    """
    try:
        plan = planned(model, vllm_config, announced)
    except PlanError as error:
        _check_by_checkpoint(vllm_config, announced, whole, str(error))
        return None
    problems = plan.problems() if whole else plan.misfits()
    if not problems:
        views, problems = parted([view for view in plan.views if view.of in plan.into], model)
        plan = replace(plan, views=views)
        problems += _values_lost(plan, live_tensors(model), _made_anew(plan, model)) if whole else []
    require_none(problems)
    return plan


def _check_by_checkpoint(vllm_config: object, announced: Announced, whole: bool, reason: str) -> None:
    path = vllm_config.model_config.model
    try:
        layouts = checkpoint_layouts(path)
    except (OSError, ValueError, KeyError) as error:
        raise ManifestError(f"{reason}; and its checkpoint at {path} cannot be read: {error}") from error
    if not layouts:
        raise ManifestError(f"{reason}; and there is no checkpoint at {path} to judge the update by")
    tied = getattr(vllm_config.model_config.hf_text_config, "tie_word_embeddings", False)
    optional = {name for name in layouts if not whole or (tied and name.endswith(HEAD))}
    check(announced, layouts, optional)


def _made_anew(plan: Plan, model: torch.nn.Module) -> set[str]:
    """Scales of attention layers, which vLLM's reload makes anew, unset, before it loads those that come."""
    from vllm.model_executor.model_loader.reload import layerwise

    is_reloaded = hasattr(layerwise, "_reload_attention_scales") and processed_layers(model)
    return {*plan.scales} if is_reloaded else set()


def _values_lost(plan: Plan, live: dict[str, torch.Tensor], made_anew: set[str]) -> list[str]:
    """What no announced tensor fills in layers that are loaded, where processing has not left it as it was."""
    found = []
    for name in plan.left - made_anew:
        there, planned_as = live.get(name), plan.tensors[name]
        if split(name)[0] not in plan.layers or (there is None and name not in plan.parameters):
            continue
        if there is None or (there.shape, there.dtype) != (planned_as.shape, planned_as.dtype):
            found.append(f"{name}: no announced tensor fills it, and the engine has its value in another form")
    return found
