"""The command of prepare_data: its outputs for valid data, and its one-line errors for invalid data."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from components.import_model.__main__ import main as import_model
from components.prepare_data.__main__ import main as prepare_data
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.data.datasets import load_records, read_header
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText, Turn
from components.rlhf.data.token_files import encode_all
from components.rlhf.data.tokenizer import encode_record, load_tokenizer
from components.rlhf.text.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "demonstrations": "demonstrations",
    "preferences": "preferences",
    "judge_preferences": "preferences",
    "prompts": "prompts",
    "heldout_prompts": "prompts",
}
OUTPUTS = [*KINDS, "metrics", "summary", "report"]
NUM_SHARED, NUM_OWN = 120, 30  # prompts in all three files, and in only one file


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_sources(folder: Path) -> dict[str, Any]:
    """Write three files whose prompts overlap except for case and whitespace; return the data settings."""
    shared = [f"What is {number} plus one?" for number in range(NUM_SHARED)]

    def prompts_of_one_file(name: str) -> list[str]:
        return [f"Say {name} {number}." for number in range(NUM_OWN)]

    demos = [{"prompt": p, "completion": f" Answer to {p}"} for p in shared + prompts_of_one_file("demo")]
    demos += [demos[0], demos[1], {"prompt": "empty", "completion": "  "}]
    demos += [{"prompt": "x" * 41, "completion": "long prompt"}, {"prompt": "long text", "completion": "y" * 100}]
    write_jsonl(folder / "demos.jsonl", demos)
    pairs = [
        {"q": f"  {p.upper()}", "good": " Yes.", "bad": f" No {i}."}
        for p in shared + prompts_of_one_file("pair")
        for i in (1, 2)
    ]
    write_jsonl(folder / "pairs.jsonl", [*pairs, {"q": "same", "good": "a", "bad": "a"}])
    own = [{"prompt": f"Talk {number}"} for number in range(NUM_OWN)]
    write_jsonl(folder / "prompts.jsonl", [*({"prompt": p.replace(" ", "  ")} for p in shared), *own])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    return {
        "demonstrations": {"path": str(folder / "demos.jsonl")},
        "preferences": {"path": str(folder / "pairs.jsonl"), "columns": columns},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "held_out": 0.2,
        "num_validation_prompts": 5,
        "max_prompt_tokens": 40,
        "max_tokens": 100,
        "weights": {"sft": 1, "reward_model": 1, "judge": 1, "prompts": 1},
    }


def arguments(
    base: Path, out: Path, data: dict[str, Any], *, num_evaluation_prompts: int = 8, seed: int = 0
) -> list[str]:
    stage = PrepareDataStageConfig.model_validate(
        {"data": data, "num_evaluation_prompts": num_evaluation_prompts, "seed": seed}
    )
    options = [item for name in OUTPUTS for item in (f"--{name.replace('_', '-')}", str(out / name))]
    return ["--tokenizer", str(base), *options, "--settings", stage.canonical_json()]


def invoke(*args: Any, executor_input: str = "", **options: Any) -> Result:
    return CliRunner().invoke(prepare_data, [*arguments(*args, **options), "--executor-input", executor_input])


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "model"
    settings = ImportModelStageConfig(kind="base_model", source=str(tiny_model)).canonical_json()
    result = CliRunner().invoke(
        import_model,
        ["--model", str(target), "--tokenizer", str(target.with_name("tokenizer")), "--settings", settings],
    )
    assert result.exit_code == 0, result.stderr
    return target.with_name("tokenizer")


@pytest.fixture(scope="module")
def outputs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run with valid data."""
    folder = tmp_path_factory.mktemp("good")
    data = write_sources(folder)
    artifacts = {name: {"artifacts": [{"name": name, "uri": f"file://{folder / 'out' / name}"}]} for name in OUTPUTS}
    executor_input = json.dumps(
        {"outputs": {"artifacts": artifacts, "outputFile": str(folder / "out/executor_output.json")}}
    )
    result = invoke(base, folder / "out", data, executor_input=executor_input)
    assert result.exit_code == 0, result.stderr
    assert all(line.startswith("[prepare_data] ") for line in result.stderr.splitlines()), result.stderr
    assert result.stdout == ""
    return folder / "out"


def records_of(out: Path, output: str, split: str, record: Any) -> list[Any]:
    return load_records(out / output, split, record)


def prompts_by_role(out: Path) -> dict[str, list[str]]:
    """All written prompts by role."""
    splits: dict[str, list[tuple[str, str, Any]]] = {
        "sft": [("demonstrations", "train", Demonstration)],
        "reward_model": [("preferences", "train", PreferencePair)],
        "judge": [("judge_preferences", "train", PreferencePair), ("judge_preferences", "ratings", RatedText)],
        "prompts": [("prompts", "train", Prompt), ("prompts", "validation", Prompt)],
        "held out": [
            ("heldout_prompts", "heldout", Prompt),
            ("demonstrations", "heldout", Demonstration),
            ("preferences", "heldout", PreferencePair),
            ("judge_preferences", "heldout", PreferencePair),
        ],
    }
    return {
        role: [r.prompt for split in role_splits for r in records_of(out, *split)]
        for role, role_splits in splits.items()
    }


def normalized(prompt: str) -> str:
    return " ".join(re.findall(r"\w+", prompt.casefold()))


# --- valid data ---


def test_every_output_is_an_artifact_with_the_tokenizer_as_parent(outputs: Path, base: Path) -> None:
    parent = open_artifact(base, "tokenizer")
    for output, kind in KINDS.items():
        manifest = open_artifact(outputs / output, kind)
        assert manifest.parents == {"tokenizer": parent.digest}
        assert manifest.tokenizer_digest == parent.tokenizer_digest
        assert manifest.chat_template_digest == parent.chat_template_digest
        assert read_header(outputs / output).max_tokens == 100
    assert not [path for path in outputs.iterdir() if path.name.startswith(".")]


def test_no_prompt_has_two_roles(outputs: Path) -> None:
    keys = {role: {normalized(prompt) for prompt in prompts} for role, prompts in prompts_by_role(outputs).items()}
    assert all(keys.values())
    roles = list(keys)
    for number, role in enumerate(roles):
        for other in roles[number + 1 :]:
            assert not keys[role] & keys[other], f"{role} and {other}"
    # Training and validation prompts of PPO are disjoint, too.
    train = {r.prompt for r in records_of(outputs, "prompts", "train", Prompt)}
    assert not train & {r.prompt for r in records_of(outputs, "prompts", "validation", Prompt)}


def test_records_with_the_same_prompt_get_the_same_role(outputs: Path) -> None:
    """Roles are the same in all files, and only dropped records are missing."""
    shared = {normalized(f"What is {number} plus one?") for number in range(NUM_SHARED)}
    keys = {role: {normalized(prompt) for prompt in prompts} for role, prompts in prompts_by_role(outputs).items()}
    assert shared <= set().union(*keys.values())
    held_out = keys["held out"] & shared
    for output, split, record in (
        ("demonstrations", "heldout", Demonstration),
        ("preferences", "heldout", PreferencePair),
        ("heldout_prompts", "heldout", Prompt),
    ):
        assert {normalized(r.prompt) for r in records_of(outputs, output, split, record)} & shared == held_out
    own_pairs = {normalized(f"Say pair {number}.") for number in range(NUM_OWN)}
    assert own_pairs <= keys["reward_model"] | keys["judge"] | keys["held out"]
    for role in ("reward_model", "judge"):  # both pairs of a prompt have the same role
        prompts = [normalized(prompt) for prompt in prompts_by_role(outputs)[role]]
        assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_record_texts_are_unchanged(outputs: Path) -> None:
    for record in records_of(outputs, "demonstrations", "train", Demonstration):
        assert record.turns == (Turn(context=record.prompt, answer=f" Answer to {record.prompt}"),)
    pairs = records_of(outputs, "preferences", "train", PreferencePair)
    assert all(pair.prompt.startswith("  ") and pair.chosen == " Yes." and pair.margin is None for pair in pairs)
    prompts = records_of(outputs, "prompts", "train", Prompt) + records_of(
        outputs, "heldout_prompts", "heldout", Prompt
    )
    assert any(record.prompt.startswith("Talk ") for record in prompts)
    assert len({record.id for record in prompts}) == len(prompts)


def test_reward_model_and_judge_have_the_same_heldout_pairs(outputs: Path) -> None:
    pairs, judge_pairs = (
        records_of(outputs, name, "heldout", PreferencePair) for name in ("preferences", "judge_preferences")
    )
    assert pairs == judge_pairs and pairs


def test_metrics_and_summary_report_counts(outputs: Path) -> None:
    metrics = json.loads((outputs / "metrics").read_text(encoding="utf-8"))
    read = {name: value for name, value in metrics.items() if not name.startswith("size_")}
    assert read.pop("prompts_in_two_roles") == 0
    assert read == {
        "demonstrations_read": 155,
        "demonstrations_kept": 150,
        "demonstrations_dropped_duplicate": 2,
        "demonstrations_dropped_empty_text": 1,
        "demonstrations_dropped_prompt_longer_than_max_prompt_tokens": 1,
        "demonstrations_dropped_text_longer_than_max_tokens": 1,
        "preferences_read": 301,
        "preferences_kept": 300,
        "preferences_dropped_equal_answers": 1,
        "prompts_read": 150,
        "prompts_kept": 150,
    }
    sizes = {
        "sft": len(records_of(outputs, "demonstrations", "train", Demonstration)),
        "heldout_demonstrations": len(records_of(outputs, "demonstrations", "heldout", Demonstration)),
        "reward_model_pairs": len(records_of(outputs, "preferences", "train", PreferencePair)),
        "judge_pairs": len(records_of(outputs, "judge_preferences", "train", PreferencePair)),
        "judge_ratings": 0,
        "heldout_pairs": len(records_of(outputs, "preferences", "heldout", PreferencePair)),
        "ppo_prompts": len(records_of(outputs, "prompts", "train", Prompt)),
        "validation_prompts": 5,
        "heldout_prompts": len(records_of(outputs, "heldout_prompts", "heldout", Prompt)),
    }
    assert {name.removeprefix("size_"): n for name, n in metrics.items() if name.startswith("size_")} == sizes
    summary = (outputs / "summary").read_text(encoding="utf-8")
    assert (
        "/demos.jsonl) | 155 | 150 | 2 duplicate (1.3%), 1 empty text (0.6%), 1 prompt longer than max_prompt_tokens (0.6%), "
        "1 text longer than max_tokens (0.6%) | none | none |"
    ) in summary
    assert "/prompts.jsonl) | 150 | 150 | none | none | none |" in summary
    assert "no prompt of one role occurs or nearly occurs" in summary
    assert f"| sft | {sizes['sft']} |" in summary


def test_executor_output_lists_every_output(outputs: Path) -> None:
    reported = json.loads((outputs / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    assert set(reported) == set(OUTPUTS)
    metadata = reported["prompts"]["artifacts"][0]["metadata"]
    assert metadata["num_validation"] == 5
    assert metadata["digest"] == open_artifact(outputs / "prompts", "prompts").digest


def test_output_is_reproducible_and_roles_do_not_depend_on_line_order(
    outputs: Path, base: Path, tmp_path: Path
) -> None:
    data = write_sources(tmp_path)
    assert invoke(base, tmp_path / "one", data).exit_code == 0
    assert invoke(base, tmp_path / "two", data).exit_code == 0
    for output, kind in KINDS.items():
        digests = {open_artifact(tmp_path / name / output, kind).digest for name in ("one", "two")}
        assert len(digests) == 1, output
    for source in ("demos", "pairs", "prompts"):
        path = tmp_path / f"{source}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[::-1]), encoding="utf-8")
    assert invoke(base, tmp_path / "three", data).exit_code == 0
    reversed_order = {
        role: {normalized(prompt) for prompt in prompts}
        for role, prompts in prompts_by_role(tmp_path / "three").items()
    }
    assert reversed_order == {
        role: {normalized(prompt) for prompt in prompts} for role, prompts in prompts_by_role(outputs).items()
    }


@pytest.mark.parametrize("name", ["valid", "rated"])
def test_ids_of_what_is_trained_on_are_written(
    name: str, outputs: Path, base: Path, movies: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the written records, also of pairs that were built from ratings and cut."""
    out, max_tokens = outputs, 100
    if name == "rated":
        out, max_tokens = tmp_path / "out", 32
        assert invoke(base, out, movies | {"max_tokens": max_tokens}, num_evaluation_prompts=4).exit_code == 0
    assert {str(path.relative_to(out)) for path in out.glob("*/*.safetensors")} == {
        "demonstrations/train.tokens.safetensors",
        "demonstrations/heldout.tokens.safetensors",
        "preferences/train.tokens.safetensors",
    }
    tokenizer, log = load_tokenizer(base), list[str]()
    for output, split, record in (
        ("demonstrations", "train", Demonstration),
        ("demonstrations", "heldout", Demonstration),
        ("preferences", "train", PreferencePair),
    ):
        records = records_of(out, output, split, record)
        wanted = [text for record in records for text in encode_record(record, tokenizer, max_tokens=max_tokens)]
        with monkeypatch.context() as patch:
            patch.setattr("components.rlhf.data.token_files.pack", None)  # nothing is encoded
            found = encode_all(
                records, tokenizer, max_tokens=max_tokens, folder=out / output, split=split, log=log.append
            )
        assert list(found) == wanted and wanted
        assert name == "valid" or split == "heldout" or any(text.truncated for text in wanted)
    assert log == []


def test_changed_ids_are_refused_with_the_artifact(outputs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(outputs / "demonstrations", tmp_path / "demonstrations")
    path = folder / "train.tokens.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"train\.tokens\.safetensors does not match its manifest"):
        open_artifact(folder, "demonstrations")


def test_demonstrations_are_optional(base: Path, tmp_path: Path) -> None:
    data = write_sources(tmp_path) | {"demonstrations": None}
    result = invoke(base, tmp_path / "out", data)
    assert result.exit_code == 0, result.stderr
    assert records_of(tmp_path / "out", "demonstrations", "train", Demonstration) == []


def test_max_pairs_per_prompt(base: Path, tmp_path: Path) -> None:
    result = invoke(base, tmp_path / "out", write_sources(tmp_path) | {"max_pairs_per_prompt": 1})
    assert result.exit_code == 0, result.stderr
    prompts = [pair.prompt for pair in records_of(tmp_path / "out", "preferences", "train", PreferencePair)]
    assert len(prompts) == len(set(prompts))


# --- rated texts ---


@pytest.fixture
def movies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A package in the format of the real ratings, in the package cache; returns data settings."""
    openings = [
        f"{a} {b}" for a in ("the", "a", "this", "my") for b in ("film", "plot", "cast", "score", "end", "joke")
    ]
    snippets = [f"{start} of number {n} is {'good' if n % 2 else 'bad'} fun" for start in openings for n in range(8)]
    # Texts whose common prefix is longer than max_prompt_tokens.
    snippets += [f"{n} very {'long ' * 30}opening {end}" for n in range(12) for end in ("good", "bad")]
    ratings = [3.0 if "good" in text else -3.0 for text in snippets]
    rows = list(zip(snippets, ratings, strict=True))
    texts = "".join(f"{n}\t{rating}\t{text}\n" for n, (text, rating) in enumerate(rows))
    raw = "".join(f"{n}\t{rating}\t0\t[{rating}, {rating}]\n" for n, (_, rating) in enumerate(rows))
    folder = "hutto_ICWSM_2014/movieReviewSnippets_"
    inner = make_tar({f"{folder}GroundTruth.txt": texts, f"{folder}anonDataRatings.txt": raw})
    package = tmp_path / "cache/packages/ratings-1.0"
    package.mkdir(parents=True)
    (package / "ratings-1.0.tar.gz").write_bytes(make_tar({"r/hutto_ICWSM_2014.tar.gz": inner}))
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "cache"))
    source = {"path": "pypi:ratings==1.0", "format": "movie_ratings"}
    return {
        "demonstrations": source,
        "preferences": source,
        "prompts": source,
        "held_out": 0.2,
        "max_prompt_tokens": 30,
        "max_tokens": 40,
        "over_length": "cut",
        "weights": {"sft": 1, "reward_model": 1, "judge": 1, "prompts": 1},
    }


def make_tar(files: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_movie_ratings(base: Path, movies: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(base, out, movies, num_evaluation_prompts=4)
    assert result.exit_code == 0, result.stderr
    rated = records_of(out, "judge_preferences", "ratings", RatedText)
    assert rated and {text.rating for text in rated} == {3.0, -3.0}
    for role in ("preferences", "judge_preferences"):
        for pair in records_of(out, role, "train", PreferencePair):
            assert "good" in pair.chosen and "bad" in pair.rejected and pair.margin == 6.0
            assert len(pair.prompt) <= 30  # max_prompt_tokens; the common prefix of two texts can be longer

    # All texts that begin with the same two words belong to one role.
    def openings(texts: Iterable[str]) -> set[str]:
        return {" ".join(text.split()[:2]) for text in texts}

    seen = {
        "sft": openings(r.prompt for r in records_of(out, "demonstrations", "train", Demonstration)),
        "reward_model": openings(
            r.prompt + text
            for r in records_of(out, "preferences", "train", PreferencePair)
            for text in (r.chosen, r.rejected)
        ),
        "judge": openings(r.prompt for r in rated),
        "ppo": openings(r.prompt for r in records_of(out, "prompts", "train", Prompt)),
        "held out": openings(r.prompt for r in records_of(out, "heldout_prompts", "heldout", Prompt)),
    }
    assert all(seen.values())
    assert sum(len(group) for group in seen.values()) == len(set().union(*seen.values()))


# --- invalid data ---


def spoil(name: str, line: int, content: bytes) -> Callable[[Path, dict[str, Any]], None]:
    """Replace one line (from 1) of a source."""

    def change(folder: Path, _data: dict[str, Any]) -> None:
        path = folder / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines[line - 1] = content + b"\n"
        path.write_bytes(b"".join(lines))

    return change


def mostly_empty(folder: Path, _data: dict[str, Any]) -> None:
    rows = [{"prompt": f"p{n}", "completion": "c" if n < 79 else ""} for n in range(100)]
    write_jsonl(folder / "demos.jsonl", rows)


def change_data(**changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda _folder, data: data.update(changes)


INVALID_DATA: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "missing file": (
        lambda folder, _data: (folder / "prompts.jsonl").unlink(),
        "{folder}/prompts.jsonl does not exist; correct the path in the params file.",
    ),
    "not UTF-8": (
        spoil("demos", 3, b'{"prompt": "caf\xe9", "completion": "c"}'),
        "{folder}/demos.jsonl:3 is not UTF-8 (byte 16 of the line); save the file as UTF-8.",
    ),
    "malformed JSON": (
        spoil("pairs", 7, b'{"q": "a", "good": }'),
        "{folder}/pairs.jsonl:7 is not JSON (Expecting value, column 20); each line must be one object.",
    ),
    "wrong column": (
        spoil("pairs", 1, b'{"question": "a", "good": "b", "bad": "c"}'),
        "{folder}/pairs.jsonl:1 has no column 'q' (found: question, good, bad); correct columns in the params file.",
    ),
    "unpaired surrogate": (
        spoil("demos", 4, b'{"prompt": "\\ud800", "completion": "c"}'),
        "{folder}/demos.jsonl:4 is not JSON (it contains a lone UTF-16 surrogate, \\ud800 to \\udfff); each line must be one object.",
    ),
    "less than 80% usable": (
        mostly_empty,
        "data.demonstrations ({folder}/demos.jsonl): only 79 of 100 records are usable, at least 80% must be: "
        "21 empty text (for example {folder}/demos.jsonl:80: completion is empty).",
    ),
    "nothing held out": (
        change_data(held_out=0),
        "Only 0 prompts are held out, but evaluation.num_prompts is 8; "
        "raise data.held_out, add prompts, or lower evaluation.num_prompts.",
    ),
    "a role without records": (
        change_data(weights={"judge": 1e-9, "reward_model": 1}),
        "No records are left for judge after splitting; raise data.weights.judge or add data.",
    ),
}


def is_empty(out: Path) -> bool:
    """No outputs and no temporary files."""
    return not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize(("change", "message"), INVALID_DATA.values(), ids=INVALID_DATA.keys())
def test_bad_data_prints_one_line_and_writes_no_output(
    change: Callable[[Path, dict[str, Any]], None], message: str, base: Path, tmp_path: Path
) -> None:
    data = write_sources(tmp_path)
    change(tmp_path, data)
    result = invoke(base, tmp_path / "out", data)
    assert result.stderr == f"error: {message.format(folder=tmp_path)}\n"
    assert (result.exit_code, result.stdout) == (1, "")
    assert is_empty(tmp_path / "out")


def test_too_few_heldout_prompts(base: Path, tmp_path: Path) -> None:
    result = invoke(base, tmp_path / "out", write_sources(tmp_path), num_evaluation_prompts=1000)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: Only ") and "evaluation.num_prompts is 1000" in result.stderr
    assert is_empty(tmp_path / "out")


def test_bad_data_in_a_subprocess(base: Path, tmp_path: Path) -> None:
    """No traceback and no output of libraries."""
    data = write_sources(tmp_path)
    INVALID_DATA["malformed JSON"][0](tmp_path, data)
    command = [sys.executable, "-m", "components.prepare_data", *arguments(base, tmp_path / "out", data)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stderr == f"error: {INVALID_DATA['malformed JSON'][1].format(folder=tmp_path)}\n"
    assert (result.returncode, result.stdout) == (1, "")
    assert is_empty(tmp_path / "out")


def test_artifact_of_wrong_kind_is_rejected(outputs: Path, tmp_path: Path) -> None:
    result = invoke(outputs / "prompts", tmp_path / "out", write_sources(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {outputs / 'prompts'} is a prompts, expected a tokenizer; pass the right artifact.\n"
    )
    assert is_empty(tmp_path / "out")


def test_modified_artifact_is_rejected(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    content = bytearray((copy / "tokenizer.json").read_bytes())
    content[-1] ^= 1
    (copy / "tokenizer.json").write_bytes(content)
    result = invoke(copy, tmp_path / "out", write_sources(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {copy / 'tokenizer.json'} does not match its manifest (sha256 differs); create the artifact again.\n"
    )
    assert is_empty(tmp_path / "out")


def test_model_folder_without_manifest_is_rejected(tiny_model: Path, tmp_path: Path) -> None:
    result = invoke(tiny_model, tmp_path / "out", write_sources(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tiny_model} has no manifest.json")
    assert is_empty(tmp_path / "out")
