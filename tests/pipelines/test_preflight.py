"""What is wrong on this machine is said before the first stage starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.preflight import check_inputs, check_stores
from tests.support.seaweed import credentials, free_port
from tests.support.toy_pipeline import toy_params, write_data


def checked(model: Path, data: dict[str, Path], **sections: dict[str, Any]) -> None:
    check_inputs(Params.model_validate(toy_params(model, data, **sections)))


def test_good_inputs_pass(tmp_path: Path, tiny_model: Path) -> None:
    checked(tiny_model, write_data(tmp_path))


def test_messages_pass_without_a_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(20)
    ]
    data["demonstrations"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked(tiny_model, data)


@pytest.mark.parametrize(
    ("name", "line", "sentence"),
    [
        ("preferences", '{"prompt": "a", "chosen": "b"}', "preferences.jsonl:61 has no field 'rejected'"),
        ("prompts", '{"prompt": 3}', "prompts.jsonl:61: prompt has type int; it must be a string"),
        ("demonstrations", "[1]", "demonstrations.jsonl:61 is a JSON list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, tiny_model: Path, name: str, line: str, sentence: str) -> None:
    data = write_data(tmp_path)
    with data[name].open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError) as error:
        checked(tiny_model, data)
    assert sentence in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    data["prompts"].unlink()
    with pytest.raises(InputError, match=r"prompts\.jsonl does not exist"):
        checked(tiny_model, data)


def test_mostly_empty_data_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    data["prompts"].write_text('{"prompt": "a"}\n' + '{"prompt": ""}\n' * 9)
    with pytest.raises(InputError, match="only 1 of 10 records are usable"):
        checked(tiny_model, data)


def test_a_model_folder_without_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model\.source: .*bare has no tokenizer"):
        checked(bare, write_data(tmp_path))


def test_own_models_are_looked_at(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"sft\.use: .*nowhere is not a folder"):
        checked(tiny_model, write_data(tmp_path), sft={"use": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("key", ["checkpoint_uri", "publish_uri"])
def test_a_store_that_cannot_be_used_is_said_before_the_first_stage(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    for name, value in credentials().items():
        monkeypatch.setenv(name, value)
    storage = {key: "s3://bucket/x", "endpoint_url": f"http://127.0.0.1:{free_port()}", "retry_minutes": 0}
    params = Params.model_validate(toy_params(tiny_model, write_data(tmp_path), storage=storage))
    with pytest.raises(InputError, match=rf"^storage\.{key}: s3://bucket/x: could not read .*Could not connect"):
        check_stores(params)
    check_stores(Params.model_validate(toy_params(tiny_model, write_data(tmp_path), storage={key: str(tmp_path)})))
