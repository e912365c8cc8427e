"""The trainer holds what was written, gives it out under the checkpoint's names, trains, and speaks for itself."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from suite import models
from suite.actors import checkpoint
from suite.actors.trainer import LoadError, Trainer
from suite.driver.expecting import CLEAR_GAP, LOGPROB_TOLERANCE
from suite.models import MODELS, TIED
from suite.processes.call import Process, gather
from suite.processes.local import LocalLauncher

pytestmark = pytest.mark.selftest

TINY = [name for name, spec in MODELS.items() if spec.purpose == "tiny" and spec.computed]
SEED = 1
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [100, 3, 200, 300, 400, 500]]
START_DEADLINE_S = 120
DEADLINE_S = 60


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every tiny model."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: models.write_checkpoint(MODELS[name], SEED, root / name) for name in TINY}


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    """One rank, in this process."""
    trainer = Trainer()
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[list[Process]]:
    """Two ranks, in processes of their own."""
    with LocalLauncher(tmp_path_factory.mktemp("pair") / "logs") as launcher:
        port = launcher.free_port()
        both = [
            launcher.start(
                f"trainer-{rank}",
                "suite.actors.trainer:Trainer",
                {"rank": rank, "world_size": 2, "master_port": port},
            )
            for rank in range(2)
        ]
        for process in both:
            process.ready(START_DEADLINE_S)
        yield both


def on_all(processes: list[Process], method: str, *args: object) -> list:
    return gather([process.submit(method, *args) for process in processes], DEADLINE_S)


def expected(name: str, seed: int) -> dict[str, torch.Tensor]:
    return {tensor: models.values(tensor, shape, seed, "bfloat16") for tensor, shape in models.tensors(MODELS[name])}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        different = int((found[name] != tensor).sum())
        assert not different, f"{name}: {different} of {tensor.numel()} elements differ"


def read(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", TINY)
def test_gives_out_the_checkpoints_tensors(trainer, written, name):
    sizes = trainer.load(str(written[name]))
    assert sizes == {"parameters": len(models.tensors(MODELS[name])), "elements": MODELS[name].elements}
    assert_same(dict(trainer.named_tensors()), expected(name, SEED))
    layout = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in trainer.named_layout()]
    assert layout == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in trainer.named_tensors()]


@pytest.mark.parametrize("name", TINY)
def test_tensors_are_views_of_the_weights(trainer, written, name):
    trainer.load(str(written[name]))
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer._model.parameters()}
    copied = [name for name, tensor in trainer.named_tensors() if tensor.untyped_storage().data_ptr() not in own]
    assert not copied, f"copied instead of viewed: {copied}"


@pytest.mark.parametrize("name", TINY)
def test_fill_writes_the_seeds_weights_and_zero(trainer, written, name):
    trainer.load(str(written[name]))
    trainer.fill(2)
    assert_same(dict(trainer.named_tensors()), expected(name, 2))
    trainer.fill(None)
    assert not any(tensor.any() for _, tensor in trainer.named_tensors())


@pytest.mark.parametrize("change", [lambda t: t.fill(3), lambda t: t.negate(), lambda t: t.step(1, 0, 0.1)])
def test_a_checkpoint_that_is_loaded_again_is_as_it_was_whatever_became_of_the_first(trainer, written, change):
    name = next(iter(TINY))
    trainer.load(str(written[name]))
    change(trainer)
    trainer.load(str(written[name]))
    assert_same(dict(trainer.named_tensors()), expected(name, SEED))


def test_two_checkpoints_stay_loaded_and_a_third_takes_the_place_of_the_older(trainer, written, tmp_path):
    first, other = (str(models.write_checkpoint(MODELS[TIED], seed, tmp_path / str(seed))) for seed in (0, 2))
    places = []
    for path in (first, other, first, str(written[TIED]), first, other):
        trainer.load(path)
        places.append(next(trainer.named_tensors())[1].data_ptr())
    assert places[0] == places[2] == places[4], "the first stays"
    assert places[1] != places[0], "each has memory of its own"
    assert_same(dict(trainer.named_tensors()), expected(TIED, 2))


def test_what_an_engine_has_written_into_a_checkpoint_that_stays_loaded_is_not_sent_again(trainer, written, tmp_path):
    trainer.load(str(written[TIED]))
    for _, handed_over in trainer.named_tensors():
        handed_over.view(-1)[-1] += 1
    trainer.load(str(models.write_checkpoint(MODELS[TIED], 0, tmp_path / "other")))
    trainer.load(str(written[TIED]))
    assert_same(dict(trainer.named_tensors()), expected(TIED, SEED))


def test_a_checkpoint_that_was_written_anew_is_loaded_anew(trainer, tmp_path):
    for seed in (0, 2):
        path = models.write_checkpoint(MODELS[TIED], seed, tmp_path / "it")
        trainer.load(str(path))
        assert_same(dict(trainer.named_tensors()), expected(TIED, seed))


def test_negating_twice_gives_the_weights_back(trainer, written):
    name = next(iter(TINY))
    trainer.load(str(written[name]))
    trainer.negate()
    assert_same(dict(trainer.named_tensors()), {key: -tensor for key, tensor in expected(name, SEED).items()})
    trainer.negate()
    assert_same(dict(trainer.named_tensors()), expected(name, SEED))


@pytest.mark.parametrize("name", TINY)
def test_saves_the_file_that_was_loaded(trainer, written, name, tmp_path):
    trainer.load(str(written[name]))
    trainer.save(str(tmp_path))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (written[name] / file).read_bytes(), file


@pytest.mark.parametrize("name", TINY)
def test_a_step_moves_weights_and_only_reports_what_moved(trainer, written, name):
    trainer.load(str(written[name]))
    before = {name: tensor.clone() for name, tensor in trainer.named_tensors()}
    report = trainer.step(count=6, seed=3, learning_rate=0.01)
    changed = sum(int((tensor != before[name]).sum()) for name, tensor in trainer.named_tensors())
    assert report["changed_elements"] == changed > 0.8 * report["elements"], report
    assert report["elements"] == MODELS[name].elements
    assert report["loss"][0] > report["loss"][-1] > 0, "steps towards uniform tokens should lower the loss"
    assert trainer.step(count=1, seed=4, learning_rate=0.0)["changed_elements"] == 0


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_transformers(trainer, written, name):
    trainer.load(str(written[name]))
    found = trainer.greedy(PROMPTS, 12)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        generated = trainer._model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        theirs = generated[0, len(prompt) :].tolist()
        close = next((i for i, gap in enumerate(answer["gaps"]) if gap < 0.5), 12)
        assert answer["tokens"][:close] == theirs[:close], f"first close call at {close}"
        assert len(answer["tokens"]) == len(answer["logprobs"]) == len(answer["gaps"]) == 12
        assert min(answer["gaps"]) >= 0
        assert max(answer["logprobs"]) <= 0
    assert any(answer["gaps"][0] >= 0.5 for answer in found), "no token was compared"


@pytest.mark.parametrize("name", TINY)
def test_scores_of_greedy_tokens_are_their_logprobs(trainer, written, name):
    trainer.load(str(written[name]))
    answers = trainer.greedy(PROMPTS, 8)
    scores = trainer.score(PROMPTS, [answer["tokens"] for answer in answers])
    for answer, score in zip(answers, scores, strict=True):
        assert score == pytest.approx(answer["logprobs"], abs=0.5)
    others = trainer.score(PROMPTS, [[(token + 1) % 512 for token in answer["tokens"]] for answer in answers])
    assert max(sum(score) for score in others) < min(sum(score) for score in scores), "other tokens are likelier"


@pytest.mark.parametrize("name", TINY)
def test_another_precision_agrees_within_the_tolerance(trainer, written, name):
    """What the tolerances of update.behaviour rest on: bfloat16 differs from float32 by less, and by not much less."""
    draw = random.Random(0)
    prompts = [[draw.randrange(512) for _ in range(12)] for _ in range(24)]
    trainer.load(str(written[name]))
    answers = trainer.greedy(prompts, 6)
    trainer.load(str(written[name]), "float32")
    scores = trainer.score(prompts, [answer["tokens"] for answer in answers])
    ours = [logprob for answer in answers for logprob in answer["logprobs"]]
    theirs = [logprob for score in scores for logprob in score]
    apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    assert LOGPROB_TOLERANCE / 5 < apart < LOGPROB_TOLERANCE
    for answer, exact in zip(answers, trainer.greedy(prompts, 6), strict=True):
        clear = next((i for i, gap in enumerate(answer["gaps"]) if gap < CLEAR_GAP), 6)
        assert answer["tokens"][:clear] == exact["tokens"][:clear]


def test_orders(trainer, written):
    trainer.load(str(written["qwen3-moe-tiny"]))
    names = [name for name, _ in trainer.named_tensors()]
    assert [name for name, _ in trainer.named_tensors("reversed")] == names[::-1]
    shuffled = [name for name, _ in trainer.named_tensors("shuffled:7")]
    assert shuffled != names
    assert sorted(shuffled) == sorted(names)
    assert shuffled == [name for name, _ in trainer.named_layout("shuffled:7")]
    assert_same(dict(trainer.named_tensors("shuffled:7")), expected("qwen3-moe-tiny", SEED))
    with pytest.raises(ValueError, match="expected order checkpoint"):
        list(trainer.named_tensors("sideways"))


def test_alterations(trainer, written):
    trainer.load(str(written["qwen3-untied-tiny"]))
    alter = {
        "rename": {"model.norm.weight": "model.nrom.weight"}, "drop": ["model.layers.0.self_attn.q_proj.weight"],
        "truncate": ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.q_norm.weight"],
        "cast": {"model.layers.0.mlp.up_proj.weight": "int32"},
        "lengthen": ["model.layers.0.mlp.gate_proj.weight"], "turn": ["model.layers.0.mlp.down_proj.weight"],
        "duplicate": ["model.layers.1.mlp.down_proj.weight"],
        "add": {"lm_head.weight": "lm_foot.weight"},
    }  # fmt: skip
    plain = dict(trainer.named_tensors())
    sent = list(trainer.named_tensors("checkpoint", alter))
    by_name = dict(sent)
    assert set(by_name) ^ set(plain) == {
        "model.norm.weight", "model.nrom.weight", "model.layers.0.self_attn.q_proj.weight", "lm_foot.weight",
    }  # fmt: skip
    for part, rows in {"0.self_attn.k_proj": 127, "1.self_attn.q_norm": 63, "0.mlp.gate_proj": 257}.items():
        assert len(by_name[f"model.layers.{part}.weight"]) == rows
    assert torch.equal(by_name["model.layers.0.mlp.down_proj.weight"], plain["model.layers.0.mlp.down_proj.weight"].t())
    assert by_name["model.layers.0.mlp.up_proj.weight"].dtype == torch.int32
    assert [name for name, _ in sent].count("model.layers.1.mlp.down_proj.weight") == 2
    assert torch.equal(by_name["lm_foot.weight"], plain["lm_head.weight"])
    announced = [(name, tensor.shape, tensor.dtype) for name, tensor in trainer.named_layout("checkpoint", alter)]
    assert announced == [(name, tensor.shape, tensor.dtype) for name, tensor in sent]


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_layouts(trainer, written, layout):
    trainer.load(str(written[TIED]))
    matrix, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    plain = dict(trainer.named_tensors())
    laid = [matrix] if layout == "transposed" else [matrix, norm]
    alter = {"lay": dict.fromkeys(laid, layout)}
    sent, announced = dict(trainer.named_tensors(alter=alter)), dict(trainer.named_layout(alter=alter))
    for name in laid:
        expected = plain[name][:1].expand_as(plain[name]) if layout == "expanded" else plain[name]
        assert torch.equal(sent[name], expected)
        assert not sent[name].is_contiguous()
        assert (announced[name].shape, announced[name].dtype) == (expected.shape, expected.dtype)
    assert all(tensor.is_contiguous() for name, tensor in sent.items() if name not in laid)


def test_a_slice_has_other_numbers_between_its_own():
    laid = checkpoint.LAYOUTS["sliced"](torch.ones(4, 3))
    assert laid.storage_offset() > 0
    assert laid.as_strided((4, 3), (3, 1)).isnan().any(), "what moves memory from the address on would move the values"


@pytest.mark.parametrize("kind", ["drop", "rename"])
def test_altering_nothing_is_an_error(trainer, written, kind):
    trainer.load(str(written[TIED]))
    alter = {"drop": {"drop": ["lm_head.weight"]}, "rename": {"rename": {"lm_head.weight": "x"}}}[kind]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        list(trainer.named_tensors(alter=alter))


def test_a_float32_trainer_holds_more_than_bfloat16(trainer, written):
    trainer.load(str(written["llama-tiny"]), "float32")
    trainer.fill(2)
    tensor = dict(trainer.named_tensors())["lm_head.weight"]
    assert tensor.dtype == torch.float32
    assert not torch.equal(tensor, tensor.bfloat16().float())
    assert torch.equal(tensor.bfloat16(), expected("llama-tiny", 2)["lm_head.weight"])


def test_random_weights_without_a_model(trainer, tmp_path):
    spec = MODELS["qwen3-moe-tiny"]
    sizes = trainer.load_random(str(models.write_config(spec, tmp_path)), "bfloat16", 3)
    assert sizes == {"parameters": len(models.tensors(spec)), "elements": spec.elements}
    assert_same(dict(trainer.named_tensors()), expected(spec.name, 3))
    with pytest.raises(RuntimeError, match=r"call load\(\)"):
        trainer.greedy(PROMPTS, 1)


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.purpose == "tiny"])
def test_random_weights_are_those_of_the_checkpoint(trainer, tmp_path, name):
    trainer.load_random(str(models.write_config(MODELS[name], tmp_path)), "bfloat16", 3)
    assert_same(dict(trainer.named_tensors()), read(models.write_checkpoint(MODELS[name], 3, tmp_path)))


def test_some_random_weights_are_in_float32(trainer, tmp_path):
    spec = MODELS["glm4-moe-tiny"]
    trainer.load_random(str(models.write_config(spec, tmp_path)), "bfloat16", 3)
    sent = dict(trainer.named_tensors())
    in_float32 = [name for name, tensor in sent.items() if tensor.dtype == torch.float32]
    prefix = "model.layers.1.mlp.gate."
    assert sorted(in_float32) == [f"{prefix}e_score_correction_bias", f"{prefix}weight"]
    assert set(in_float32) == {tensor["name"] for tensor in models.manifest(spec) if tensor["dtype"] == "float32"}
    assert all((sent[name].bfloat16() != sent[name]).all() for name in in_float32)


def test_a_checkpoint_with_a_missing_tensor_is_refused(trainer, tmp_path):
    spec = MODELS[TIED]
    weights = expected(spec.name, 1)
    del weights["model.layers.1.mlp.up_proj.weight"]
    models.save(spec, weights, tmp_path)
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        trainer.load(str(tmp_path))
    with pytest.raises(RuntimeError, match="holds no weights"):
        list(trainer.named_tensors())


def test_peak_memory_is_seen(trainer):
    trainer.memory_mark()
    held = torch.ones(64 * 1024 * 1024, dtype=torch.uint8)
    del held
    assert 60e6 < trainer.memory_peak() < 100e6


def test_fused_experts_are_split_by_name():
    gate_up = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    views = checkpoint.views("model.layers.5.mlp.experts.gate_up_proj", gate_up, first_expert=6)
    assert [name.removeprefix("model.layers.5.mlp.experts.") for name, _ in views] == [
        "6.gate_proj.weight", "6.up_proj.weight", "7.gate_proj.weight", "7.up_proj.weight",
    ]  # fmt: skip
    assert torch.equal(views[2][1], gate_up[1, :2])
    assert torch.equal(views[3][1], gate_up[1, 2:])


@pytest.mark.parametrize("name", [TIED, "qwen3-moe-tiny"])
def test_two_ranks_hold_and_train_one_model(pair, trainer, written, name, tmp_path):
    sizes = on_all(pair, "load", str(written[name]))
    trainer.load(str(written[name]))
    assert sizes[0] == sizes[1] == {"parameters": len(models.tensors(MODELS[name])), "elements": MODELS[name].elements}
    assert_answers_close(on_all(pair, "greedy", PROMPTS, 6), trainer.greedy(PROMPTS, 6))

    on_all(pair, "fill", 2)
    on_all(pair, "save", str(tmp_path / "filled"))
    assert_same(read(tmp_path / "filled"), expected(name, 2))

    reports = on_all(pair, "step", 1, 3, 0.01)
    on_all(pair, "save", str(tmp_path / "trained"))
    trained = read(tmp_path / "trained")
    changed = sum(int((tensor != trained[key]).sum()) for key, tensor in expected(name, 2).items())
    assert reports[0]["changed_elements"] == reports[1]["changed_elements"] == changed > 0.8 * MODELS[name].elements
    assert reports[0]["loss"] != reports[1]["loss"], "the ranks should train on different tokens"
    trainer.load(str(tmp_path / "trained"))
    assert_answers_close(on_all(pair, "greedy", PROMPTS, 6), trainer.greedy(PROMPTS, 6))


def test_tensors_without_a_model_are_given_as_they_are_now(trainer, tmp_path):
    for seed, name in ((3, TIED), (4, "qwen3-untied-tiny"), (5, TIED)):
        trainer.load_random(str(models.write_config(MODELS[name], tmp_path)), "bfloat16", seed)
        for order in ("checkpoint", "reversed", "checkpoint"):
            found = [*trainer.named_tensors(order)]
            layout = [(name, tuple(tensor.shape)) for name, tensor in trainer.named_layout(order)]
            assert [(name, tuple(tensor.shape)) for name, tensor in found] == layout
            assert_same(dict(found), expected(name, seed))
        first = next(iter(dict(found)))
        assert first not in dict(trainer.named_tensors(alter={"drop": [first]}))
        trainer.negate()
        assert_same(dict(trainer.named_tensors()), {n: -tensor for n, tensor in expected(name, seed).items()})
    trainer.forget()
    with pytest.raises(RuntimeError, match="holds no weights"):
        [*trainer.named_tensors()]


def test_two_ranks_hold_random_weights(pair, tmp_path):
    spec = MODELS["qwen3-moe-tiny"]
    on_all(pair, "load_random", str(models.write_config(spec, tmp_path)), "bfloat16", 3)
    on_all(pair, "save", str(tmp_path / "saved"))
    assert_same(read(tmp_path / "saved"), expected(spec.name, 3))


def assert_answers_close(of_ranks: list[list[dict]], alone: list[dict]) -> None:
    """All ranks compute with the whole model: they answer alike, and as one rank does."""
    assert of_ranks[0] == of_ranks[1]
    for found, wanted in zip(of_ranks[0], alone, strict=True):
        close = next((i for i, gap in enumerate(wanted["gaps"]) if gap < 0.5), len(wanted["gaps"]))
        assert found["tokens"][:close] == wanted["tokens"][:close]
        assert found["logprobs"][:close] == pytest.approx(wanted["logprobs"][:close], abs=0.5)
