"""Invalid local inputs are reported before the first stage starts."""

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


def check_toy_inputs(model: Path, data: dict[str, Path], **sections: dict[str, Any]) -> None:
    check_inputs(Params.model_validate(toy_params(model, data, **sections)))


def test_valid_inputs_pass(tmp_path: Path, tiny_model: Path) -> None:
    check_toy_inputs(tiny_model, write_data(tmp_path))


def test_messages_are_valid_without_a_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(20)
    ]
    data["demonstrations"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_toy_inputs(tiny_model, data)


def test_error_names_the_line_that_is_not_an_object(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    with data["demonstrations"].open("a") as file:
        file.write("[1]\n")
    with pytest.raises(InputError, match=r"demonstrations\.jsonl:61 is a JSON list"):
        check_toy_inputs(tiny_model, data)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "preferences",
            '{"prompt": "a", "chosen": "b"}',
            "preferences.jsonl:61: no field 'rejected' (found: prompt, chosen)",
        ),
        ("prompts", '{"prompt": 3}', "prompts.jsonl:61: prompt has type int; it must be a string"),
        (
            "demonstrations",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "demonstrations.jsonl:61: messages have no message of",
        ),
    ],
)
def test_few_unusable_records_pass_and_many_are_reported_with_an_example(
    tmp_path: Path, tiny_model: Path, name: str, line: str, message: str
) -> None:
    data = write_data(tmp_path)
    with data[name].open("a") as file:
        file.write(line + "\n")
    check_toy_inputs(tiny_model, data)
    with data[name].open("a") as file:
        file.write((line + "\n") * 20)
    with pytest.raises(InputError) as error:
        check_toy_inputs(tiny_model, data)
    assert "only 60 of 81 records are usable" in str(error.value) and message in str(error.value)


def test_messages_and_plain_texts_cannot_be_mixed_in_a_plain_run(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    data["prompts"].write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(InputError) as error:
        params = toy_params(tiny_model, data)
        check_inputs(Params.model_validate(params | {"data": params["data"] | {"template": "plain"}}))
    prompts, demonstrations = (f"data.{name} ({data[name]})" for name in ("prompts", "demonstrations"))
    assert str(error.value) == (
        f"{prompts} holds messages and {demonstrations} plain texts, and data.template is plain, which cannot render messages; "
        "set it to chat."
    )


def test_error_names_the_missing_file(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    data["prompts"].unlink()
    with pytest.raises(InputError, match=r"prompts\.jsonl does not exist"):
        check_toy_inputs(tiny_model, data)


def test_mostly_empty_data_is_rejected(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    data["prompts"].write_text('{"prompt": "a"}\n' + '{"prompt": ""}\n' * 9)
    with pytest.raises(InputError, match="only 1 of 10 records are usable"):
        check_toy_inputs(tiny_model, data)


def test_model_folder_without_tokenizer_is_rejected(tmp_path: Path, tiny_model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model\.source: .*bare has no tokenizer"):
        check_toy_inputs(bare, write_data(tmp_path))


def test_user_models_are_checked(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"sft\.use: .*nowhere is not a folder"):
        check_toy_inputs(tiny_model, write_data(tmp_path), sft={"use": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(("in_list", "key"), [(False, "judge.use"), (True, "judge.1.use")])
def test_model_of_a_judge_is_checked(tmp_path: Path, tiny_model: Path, in_list: bool, key: str) -> None:
    def check(use: Path) -> None:
        judge = {"kind": "reward_model", "use": str(use)}
        params = toy_params(tiny_model, write_data(tmp_path)) | {"judge": [{}, judge] if in_list else judge}
        check_inputs(Params.model_validate(params))

    with pytest.raises(InputError, match=rf"^{key}: .*nowhere is not a folder; correct the path\.$"):
        check(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"^{key}: .*empty has no config\.json"):
        check(tmp_path / "empty")
    check(tiny_model)


@pytest.mark.parametrize("key", ["checkpoint_uri", "publish_uri", "answers_uri"])
def test_unreachable_store_is_reported_before_the_first_stage(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    for name, value in credentials().items():
        monkeypatch.setenv(name, value)
    storage = {key: "s3://bucket/x", "endpoint_url": f"http://127.0.0.1:{free_port()}", "retry_minutes": 0}
    params = Params.model_validate(toy_params(tiny_model, write_data(tmp_path), storage=storage))
    with pytest.raises(InputError, match=rf"^storage\.{key}: s3://bucket/x: could not read .*Could not connect"):
        check_stores(params)
    check_stores(Params.model_validate(toy_params(tiny_model, write_data(tmp_path), storage={key: str(tmp_path)})))
