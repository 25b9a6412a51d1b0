"""An untrusted model folder cannot run code, neither through its weights nor through modules that it refers to."""

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
    """An object that creates a file when it is unpickled."""

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
def test_pickled_weights_are_refused(folder: Path, pattern: str) -> None:
    (folder / "model.safetensors").unlink()
    hacked = folder.parent / "hacked"
    (folder / pattern.replace("*", "weights")).write_bytes(pickle.dumps(Touch(hacked)))
    assert "a format that can run code when it is loaded; save the model as safetensors" in refusal(folder)
    assert not hacked.exists()
    pickle.loads((folder / pattern.replace("*", "weights")).read_bytes())
    assert hacked.exists()  # the pickle is effective


def test_pickle_next_to_safetensors_is_ignored(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    require_safe_model_folder(folder)


def test_code_of_a_model_is_refused(folder: Path) -> None:
    hacked = folder.parent / "hacked"
    (folder / "modeling_mine.py").write_text(f"open({str(hacked)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "needs code that comes with the model (auto_map in config.json), which is never run" in refusal(folder)
    settings = json.dumps({"kind": "base_model", "source": str(folder)})
    command = [
        sys.executable,
        "-m",
        "components.import_model",
        "--model",
        str(folder.parent / "out"),
        "--tokenizer",
        str(folder.parent / "tokenizer"),
        "--settings",
        settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "which is never run" in done.stderr and "Traceback" not in done.stderr
    assert not hacked.exists() and not (folder.parent / "out").exists()


def test_code_of_a_known_architecture_is_ignored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Model"}})
    )
    require_safe_model_folder(folder)


def test_code_of_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}))
    assert "needs code that comes with its tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 5, None]
)
def test_index_with_unsafe_file_names_is_refused(folder: Path, name: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "which is not a safetensors file in this folder" in refusal(folder)
