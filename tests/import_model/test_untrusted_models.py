"""A model folder from anywhere runs no code of its own: neither by its weights nor by the modules that it names."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.import_model.checks import PICKLES, require_safe_model_folder
from components.rlhf.text.errors import InputError


class Touch:
    """Pickled, it is a program that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (Path.touch, (self.path,))


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        require_safe_model_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize("pattern", PICKLES)
def test_weights_that_are_a_pickle(folder: Path, pattern: str) -> None:
    (folder / "model.safetensors").unlink()
    hacked = folder.parent / "hacked"
    (folder / pattern.replace("*", "weights")).write_bytes(pickle.dumps(Touch(hacked)))
    assert "a format that can run code when it is loaded, and is not read; save the model as safetensors" in refusal(
        folder
    )
    assert not hacked.exists()
    pickle.loads((folder / pattern.replace("*", "weights")).read_bytes())
    assert hacked.exists()  # it would have


def test_a_pickle_beside_safetensors_is_not_looked_at(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    require_safe_model_folder(folder)


def test_code_that_comes_with_a_model(folder: Path) -> None:
    hacked = folder.parent / "hacked"
    (folder / "modeling_mine.py").write_text(f"open({str(hacked)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "needs code that comes with the model (auto_map in config.json), which is never run here" in refusal(folder)
    settings = json.dumps({"kind": "base_model", "source": str(folder)})
    command = [
        sys.executable,
        "-m",
        "components.import_model",
        "--model",
        str(folder.parent / "out"),
        "--settings",
        settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "which is never run here" in done.stderr and "Traceback" not in done.stderr
    assert not hacked.exists() and not (folder.parent / "out").exists()


def test_code_of_an_architecture_that_transformers_has_is_left_aside(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Model"}})
    )
    require_safe_model_folder(folder)


def test_code_that_comes_with_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}))
    assert "needs code that comes with its tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 5, None]
)
def test_an_index_that_names_other_files(folder: Path, name: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "which is no safetensors file of this folder" in refusal(folder)
