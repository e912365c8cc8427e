"""A user's own model: what is read of its directory, what is written of it, and what is refused."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from suite import ROOT, models
from suite.conformance.requirements import catalogue
from suite.driver.engines import engine_options
from suite.models import own
from suite.selftest.runs import ONE_CASE, examine
from suite.session import selection
from suite.stages import STAGES

CONFIG = {
    "model_type": "olmo2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a config alone."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "mine"


@pytest.fixture
def whole(directory: Path) -> Path:
    """A directory with a whole checkpoint, whose names transformers does not know."""
    tensors = {
        "a.embed": torch.randn(8, 4, dtype=torch.bfloat16), "b": torch.randn(6), "c": torch.randn(3, 2).half(),
    }  # fmt: skip
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "new", "architectures": ["NewModel"]}))
    return directory


def test_a_config_gives_the_names_that_transformers_writes(directory: Path, tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = own.spec_of(directory)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert dict(models.tensors(spec)) == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert spec.config["architectures"] == ["Olmo2ForCausalLM"]
    assert (spec.name, spec.purpose, spec.computed, spec.config["vocab_size"]) == ("mine", "own", False, 32)


def test_experts_have_the_names_of_published_checkpoints():
    config = CONFIG | {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 32, "head_dim": 16}
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in own.layout_of(config).tensors


def test_two_seeds_differ_in_every_element_and_what_is_written_is_read_again(directory: Path, tmp_path: Path):
    spec = own.spec_of(directory)
    first, second = (models.write_checkpoint(spec, seed, tmp_path / str(seed)) for seed in (0, 1))
    read, other = (load_file(path / "model.safetensors") for path in (first, second))
    assert not any((read[name] == other[name]).any() for name in read)
    again = models.read_spec(first)
    assert (again.layout, again.source, again.purpose) == (spec.layout, "", "own")


def test_a_whole_checkpoint_is_itself_and_perturbed_for_another_seed(whole: Path, tmp_path: Path):
    spec, real = own.spec_of(whole), load_file(whole / "model.safetensors")
    assert {name: dtype for name, (dtype, _) in spec.layout.items()} == {
        "a.embed": "bfloat16", "b": "float32", "c": "float16",
    }  # fmt: skip
    assert spec.config["vocab_size"] == 8
    for seed in (0, 1):
        written = load_file(models.write_checkpoint(spec, seed, tmp_path / str(seed)) / "model.safetensors")
        assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in real.items()}
        for name, tensor in written.items():
            same = tensor.bfloat16() == real[name].bfloat16()
            assert same.all() if seed == 0 else not same.any()
            torch.testing.assert_close(tensor, real[name], rtol=0.05, atol=1e-6)


def test_only_the_files_that_an_engine_loads_are_read(whole: Path):
    names = set(own.spec_of(whole).layout)
    own._headers.cache_clear()
    save_file({"layers.0.wq.weight": torch.zeros(2, 2)}, whole / "consolidated.safetensors")
    assert set(own.spec_of(whole).layout) == names
    own._headers.cache_clear()
    (whole / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(own.UnknownModel, match="expected readable safetensors files, found 'weight_map'"):
        own.spec_of(whole)


def test_a_shard_is_filled_as_the_whole(whole: Path):
    spec = own.spec_of(whole)
    part = torch.empty(2, 4, dtype=torch.bfloat16)
    models.fill(spec, part, "a.embed", (8, 4), 1, start=12)
    assert torch.equal(part, own.perturbed(whole, "a.embed", 1)[3:5])


# ---- directories that are refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "expected a model's config.json, found No such file"),
        ("{", "config.json: expected JSON, found"),
        ("[]", "expected an object with a model_type"),
        (
            '{"model_type": "unheard"}',
            "cannot build a model_type 'unheard'.*Give a directory with the whole checkpoint",
        ),
    ],
)
def test_a_directory_without_a_model_is_refused(tmp_path: Path, config: str | None, message: str):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(own.UnknownModel, match=message):
        own.spec_of(tmp_path)


def test_a_quantised_or_unreadable_checkpoint_is_refused(whole: Path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, whole / "other.safetensors")
    with pytest.raises(own.UnknownModel, match="a is of dtype I8, expected one of BF16, F16, F32: a quantised"):
        own.spec_of(whole)
    own._headers.cache_clear()
    (whole / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(own.UnknownModel, match="expected readable safetensors files"):
        own.spec_of(whole)


# ---- models that take more than text


@pytest.fixture
def sees(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a model with a vision tower, its processor in files that are links, as a download cache has."""
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    config = json.loads((whole / "config.json").read_text()) | {"vision_config": {}}
    (whole / "config.json").write_text(json.dumps(config))
    for name in ("preprocessor_config.json", "tokenizer.json"):
        blob = whole.parent / f"blob-of-{name}"
        blob.write_text(name)
        (whole / name).symlink_to(blob)
    return whole


def test_a_processor_is_beside_every_checkpoint_that_is_written(sees: Path, tmp_path: Path, monkeypatch):
    spec = own.spec_of(sees)
    for times in range(2):  # an engine may ask for a config that is there
        written = models.write_checkpoint(spec, times, tmp_path / "written")
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (written / name).read_text() == name
    monkeypatch.setitem(models.MODELS, spec.name, spec)
    options = engine_options(STAGES[0], spec.name)
    assert (options["skip_tokenizer_init"], options["skip_mm_profiling"]) == (False, True)
    assert engine_options(STAGES[0], models.TIED)["skip_tokenizer_init"]


def test_a_model_of_text_alone_gets_no_tokenizer(whole: Path, tmp_path: Path):
    (whole / "tokenizer.json").write_text("{}")
    spec = own.spec_of(whole)
    assert spec.processor == ""
    assert not (models.write_config(spec, tmp_path / "written") / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("preprocessor_config.json", r"its tokenizer and its processor; found no \*processor_config.json there"),
        ("tokenizer.json", r"its tokenizer and its processor; found no tokenizer\* there\. Put the model's files"),
    ],
)
def test_a_model_of_pictures_without_its_processor_is_refused(sees: Path, lacks: str, message: str):
    (sees / lacks).unlink()
    with pytest.raises(own.UnknownModel, match=f"{sees}: a new takes more than text, and vLLM starts no .*{message}"):
        own.spec_of(sees)


def test_a_model_of_pictures_is_refused_where_vllm_cannot_import_its_class(sees: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        own.UnknownModel, match=r"starts no engine of one without torchvision, .*: import of torchvision"
    ):
        own.spec_of(sees)


# ---- the option


def test_the_option_takes_names_and_directories(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    assert selection._model(models.TIED, directory.parent) == models.TIED
    assert selection._model("mine", directory.parent) == "mine"
    assert models.MODELS["mine"].layout
    with pytest.raises(pytest.UsageError, match=r"--model nowhere: expected one of a directory with a config\.json"):
        selection._model("nowhere", directory.parent)
    (directory.parent / "empty").mkdir()
    with pytest.raises(pytest.UsageError, match=r"--model empty: .*expected a model's config.json"):
        selection._model("empty", directory.parent)


def test_a_directory_with_the_name_of_another_model_gets_a_name_of_its_own(directory: Path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    directory.rename(directory.parent / models.TIED)
    assert selection._model(f"./{models.TIED}", directory.parent) == f"own-{models.TIED}"
    assert models.MODELS[models.TIED].layout is None


def test_what_is_left_out_are_requirements_and_the_readme_names_them():
    (section,) = re.findall(r"## Your own model\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    assert set(own.LEFT_OUT) <= set(catalogue())
    assert set(re.findall(r"`(\w+\.\w+)`", section)) - {"config.json"} == set(own.LEFT_OUT)


def test_a_test_alters_a_matrix_that_every_model_has(directory: Path):
    from suite.driver.together import Together

    spec = own.spec_of(directory)
    name = Together.weight.fget(SimpleNamespace(spec=spec))
    assert len(spec.layout[name][1]) == 2
    assert ".layers." in name


TAKEN = """
@judged("update.tied")
def test_names_tensors(subject, stage, model):
    pass

@judged("update.exact")
def test_takes_any(subject, stage, model):
    pass
"""


def test_what_needs_the_catalogues_model_is_not_applicable_before_anything_starts(whole: Path, tmp_path: Path):
    finished = examine(tmp_path, TAKEN, *ONE_CASE, f"--model={whole}")
    assert [*finished.verdicts.values()] == ["not-applicable", "pass"]
    assert finished.detail("names_tensors") == f"update.tied {own.NAMES}"
