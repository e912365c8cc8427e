"""What vLLM's sleep loses of a model and no update brings: kept on the host, or an update is refused."""

from types import SimpleNamespace

import pytest
import torch

from extensions.asleep import SleepError
from suite.models import ALIBI
from suite.selftest import fakes
from suite.selftest.vllm_models import NO_ENGINE, Held

ENABLED = SimpleNamespace(**vars(fakes.VLLM_CONFIG), model_config=SimpleNamespace(enable_sleep_mode=True))
SLOPES = (1.0, 0.5)


class Attention(torch.nn.Module):
    """A layer with a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.slopes = torch.tensor(SLOPES)


class Sleeper(fakes.Worker):
    """A worker whose sleep at level 2 zeroes what is no buffer; `slept` says what it was asked."""

    vllm_config = ENABLED

    def __init__(self) -> None:
        super().__init__()
        self.model.attention, self.slept = Attention(), []
        for index, weight in enumerate(self.model.held.values()):
            self.model.register_buffer(f"weight{index}", weight)

    def sleep(self, level: int = 1) -> None:
        self.slept.append(level)
        self.model.attention.slopes.fill_(0 if level == 2 else 7)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.slept.append(tags)

    @property
    def slopes(self) -> tuple[float, ...]:
        return tuple(self.model.attention.slopes.tolist())


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Sleeper:
    monkeypatch.setattr("extensions.asleep.processed_layers", lambda model: model.packed)
    return fakes.fitted(monkeypatch, Sleeper)


@pytest.mark.parametrize("watched", ["update_state", "report_device_id", "begin"])
def test_what_sleep_loses_is_as_it_was_after_waking(worker: Sleeper, watched: str):
    fakes.begin(worker) if watched == "begin" else getattr(worker, watched)()
    for _ in range(2):
        worker.sleep(level=2)
        worker.wake_up()
        assert worker.slopes == SLOPES
    assert worker.slept == [2, None, 2, None]


def test_nothing_is_touched_before_the_weights_are_awake(worker: Sleeper):
    worker.update_state()
    worker.sleep(2)
    worker.wake_up(["kv_cache"])
    assert worker.slopes == (0, 0)
    worker.sleep(2)  # asleep already: there is nothing to be copied
    worker.wake_up(tags=["weights"])
    assert worker.slopes == SLOPES


def test_an_engine_that_sleeps_at_level_1_and_then_at_2_is_not_read_while_asleep(worker: Sleeper):
    worker.update_state()
    worker.sleep(1)  # what can be read from now on is 7
    worker.sleep(2)
    worker.wake_up()
    assert worker.slopes == (0, 0), "expected nothing to be put back that was read asleep"
    worker.model.attention.slopes.copy_(torch.tensor(SLOPES))
    worker.sleep(2)
    worker.wake_up()
    assert worker.slopes == SLOPES


def test_what_vllm_keeps_itself_is_left_to_it(worker: Sleeper):
    worker.update_state()
    worker.sleep()
    worker.wake_up()
    assert worker.slopes == (7, 7)
    assert worker.slept == [1, None]


def test_of_a_layer_that_loading_processes_only_what_is_small_is_kept(worker: Sleeper):
    worker.model.packed = ["attention"]
    worker.model.attention.derived = torch.ones(2**20)
    worker.update_state()
    worker.model.attention.derived.zero_()
    worker.sleep(2)
    worker.model.attention.derived.fill_(2)
    worker.wake_up()
    assert worker.slopes == SLOPES
    assert worker.model.attention.derived.eq(2).all()


def test_where_no_engine_sleeps_nothing_stands_before_its_methods(worker: Sleeper):
    worker.vllm_config = fakes.VLLM_CONFIG
    worker.update_state()
    assert "sleep" not in vars(worker)


def test_an_engine_that_slept_before_is_refused_by_name_and_left_as_it_is(worker: Sleeper):
    worker._sleep_mode_backend = object()
    for _ in range(2):
        with pytest.raises(SleepError, match=r"no update brings, here 1: attention\.slopes\. Start the engine"):
            fakes.begin(worker)
    assert fakes.untouched(worker)


def test_an_engine_that_slept_before_and_has_lost_nothing_is_updated(worker: Sleeper):
    worker._sleep_mode_backend, worker.model.packed = object(), ["attention"]
    fakes.begin(worker)
    worker._weight_sync_accept(fakes.tensors())
    assert worker.end_update() == len(fakes.SHAPES)


@pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))
@pytest.mark.parametrize(
    "changed",
    [(ALIBI, "asleep"), (ALIBI, "asleep unheard"), ("SmolLM3", "attention in a dict", "asleep")],
    ids=", ".join,
)
def test_a_model_that_slept_is_exact_after_an_update(held: Held, changed: tuple[str, ...]):
    found = held.judged(*changed)
    assert (found["stale"], found["state"]) == ([], "ready")
