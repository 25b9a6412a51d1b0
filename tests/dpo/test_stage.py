"""The program of the stage: its artifact, its outputs, and its one-line errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from components.dpo.__main__ import main
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import read_manifest, write_manifest
from components.rlhf.data.datasets import load_records, save_dataset
from components.rlhf.data.records import LabeledText, ValidationSample
from tests.support.dpo_runs import HELDOUT, LABELED, PAIRS, config_of

OUTPUTS = ("model", "manifest", "metrics", "report")


def write_inputs(folder: Path, tiny_model: Path, **splits: Any) -> dict[str, Path]:
    sft, data = shutil.copytree(tiny_model, folder / "sft"), folder / "data"
    write_manifest(sft, kind="sft_model")
    data.mkdir()
    save_dataset(data, {"train": PAIRS, "heldout": HELDOUT} | splits, max_tokens=64, counts={})
    write_manifest(data, kind="preferences")
    return {"sft-model": sft, "preferences": data}


def invoke(folder: Path, inputs: dict[str, Path], settings: str, **options: str) -> Result:
    paths = inputs | {name: folder / name for name in OUTPUTS}
    arguments = [item for name, path in paths.items() for item in (f"--{name}", str(path))]
    more = [item for name, value in options.items() for item in (f"--{name}", value)]
    return CliRunner().invoke(main, [*arguments, "--settings", settings, *more])


@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto"])
def test_artifact_is_a_policy_as_that_of_ppo(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    inputs = write_inputs(tmp_path, tiny_model, labeled=LABELED)
    storage = json.dumps({"checkpoint_uri": str(tmp_path / "checkpoints")})
    done = invoke(tmp_path, inputs, config_of(loss).canonical_json(), storage=storage)
    assert done.exit_code == 0, (done.stderr, done.exception)
    manifest = open_artifact(tmp_path / "model", "policy_model")
    assert manifest == read_manifest(tmp_path / "manifest")
    parents = {
        role: read_manifest(path).digest
        for role, path in zip(("sft_model", "preferences"), inputs.values(), strict=True)
    }
    assert manifest.parents == parents
    numbers = json.loads((tmp_path / "metrics").read_text())
    assert manifest.facts["heldout_accuracy"] == numbers["heldout_accuracy"] == 1.0
    assert manifest.facts["loss_name"] == loss and manifest.facts["training_engine"].startswith("torch")
    assert f"held-out pairs in the right order: 100.0%, margin {numbers['heldout_margin']:.3f}" in done.stderr
    history = [json.loads(line) for line in (tmp_path / "model/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert numbers["loss"] == history[-1]["loss"] and numbers["rewards_chosen"] == history[-1]["rewards/chosen"]
    assert load_records(tmp_path / "model", "validation", ValidationSample) == []
    start, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model, tmp_path / "model"))
    assert any((a != b).any() for a, b in zip(start.parameters(), trained.parameters(), strict=True))
    page = (tmp_path / "report").read_text()
    assert f"Loss {loss}" in page and "<svg" in page and "3 held-out pairs 100.0%" in page
    assert not list((tmp_path / "checkpoints").rglob("step-*"))  # deleted at the end


def test_held_out_pairs_are_optional(tiny_model: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, tiny_model, train=[], heldout=[], labeled=LABELED)
    done = invoke(tmp_path, inputs, config_of("kto").canonical_json())
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "heldout" not in (tmp_path / "metrics").read_text()


@pytest.mark.parametrize(
    ("loss", "splits", "message"),
    [
        ("dpo", {"train": []}, "has no pairs, which dpo.loss dpo learns from"),
        ("kto", {}, "has no labeled answers, which dpo.loss kto learns from; set data.desirable_rating"),
        ("kto", {"labeled": LABELED[:1]}, "has 1 labeled answers, and dpo.loss kto compares each with another one"),
    ],
)
def test_data_that_the_loss_cannot_learn_from(
    tiny_model: Path, tmp_path: Path, loss: str, splits: dict[str, list[LabeledText]], message: str
) -> None:
    inputs = write_inputs(tmp_path, tiny_model, **splits)
    done = invoke(tmp_path, inputs, config_of(loss).canonical_json())
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")
    assert not any((tmp_path / name).exists() for name in OUTPUTS)


def test_preferences_of_another_tokenizer_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, tiny_model)
    (inputs["preferences"] / "manifest.json").unlink()
    write_manifest(inputs["preferences"], kind="preferences", tokenizer_digest="0" * 64)
    (inputs["sft-model"] / "manifest.json").unlink()
    write_manifest(inputs["sft-model"], kind="sft_model", tokenizer_digest="1" * 64)
    done = invoke(tmp_path, inputs, config_of().canonical_json())
    assert done.exit_code == 1 and "have different tokenizers" in done.stderr
