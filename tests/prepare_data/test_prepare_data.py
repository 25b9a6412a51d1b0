"""prepare_data as a program: what it writes from good data, and the one line it says of bad data."""

import io
import json
import os
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
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "demonstrations": "demonstrations",
    "preferences": "preferences",
    "judge_preferences": "preferences",
    "prompts": "prompts",
    "heldout_prompts": "prompts",
}
OUTPUTS = [*KINDS, "metrics", "summary"]
NUM_SHARED, NUM_OWN = 120, 30  # prompts that all three files have, and that one file alone has


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_sources(folder: Path) -> dict[str, Any]:
    """Three files whose prompts overlap, up to case and white space; returns the settings that name them."""
    shared = [f"What is {number} plus one?" for number in range(NUM_SHARED)]

    def own(name: str) -> list[str]:
        return [f"Say {name} {number}." for number in range(NUM_OWN)]

    demos = [{"prompt": p, "completion": f" Answer to {p}"} for p in shared + own("demo")]
    demos += [demos[0], demos[1], {"prompt": "empty", "completion": "  "}]
    demos += [{"prompt": "x" * 41, "completion": "long prompt"}, {"prompt": "long text", "completion": "y" * 100}]
    write_jsonl(folder / "demos.jsonl", demos)
    pairs = [{"q": f"  {p.upper()}", "good": " Yes.", "bad": f" No {i}."} for p in shared + own("pair") for i in (1, 2)]
    write_jsonl(folder / "pairs.jsonl", [*pairs, {"q": "same", "good": "a", "bad": "a"}])
    messages = [{"messages": [{"role": "user", "content": f"Talk {number}"}]} for number in range(NUM_OWN)]
    write_jsonl(folder / "prompts.jsonl", [*({"prompt": p.replace(" ", "  ")} for p in shared), *messages])
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
    return ["--base-model", str(base), *options, "--settings", stage.canonical_json()]


def call(*given: Any, executor_input: str = "", **options: Any) -> Result:
    return CliRunner().invoke(prepare_data, [*arguments(*given, **options), "--executor-input", executor_input])


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "model"
    settings = ImportModelStageConfig(kind="base_model", source=str(tiny_model)).canonical_json()
    done = CliRunner().invoke(import_model, ["--model", str(target), "--settings", settings])
    assert done.exit_code == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one good run."""
    folder = tmp_path_factory.mktemp("good")
    data = write_sources(folder)
    artifacts = {name: {"artifacts": [{"name": name, "uri": f"file://{folder / 'out' / name}"}]} for name in OUTPUTS}
    given = json.dumps({"outputs": {"artifacts": artifacts, "outputFile": str(folder / "out/executor_output.json")}})
    done = call(base, folder / "out", data, executor_input=given)
    assert done.exit_code == 0, done.stderr
    assert all(line.startswith("[prepare_data] ") for line in done.stderr.splitlines()), done.stderr
    assert done.stdout == ""
    return folder / "out"


def texts_of(out: Path, output: str, split: str, record: Any) -> list[Any]:
    return load_records(out / output, split, record)


def by_role(out: Path) -> dict[str, list[str]]:
    """Every prompt that was written, by who sees it."""
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
    return {role: [r.prompt for place in places for r in texts_of(out, *place)] for role, places in splits.items()}


def key(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()


# --- good data ---


def test_every_output_is_a_whole_artifact_made_from_the_base_model(good: Path, base: Path) -> None:
    parent = open_artifact(base, "base_model")
    for output, kind in KINDS.items():
        manifest = open_artifact(good / output, kind)
        assert manifest.parents == {"base_model": parent.digest}
        assert manifest.tokenizer_digest == parent.tokenizer_digest
        assert manifest.chat_template_digest == parent.chat_template_digest
        assert read_header(good / output).max_tokens == 100
    assert not [path for path in good.iterdir() if path.name.startswith(".")]


def test_no_prompt_is_seen_by_two(good: Path) -> None:
    keys = {role: {key(prompt) for prompt in prompts} for role, prompts in by_role(good).items()}
    assert all(keys.values())
    roles = list(keys)
    for number, role in enumerate(roles):
        for other in roles[number + 1 :]:
            assert not keys[role] & keys[other], f"{role} and {other}"
    # PPO's prompts and those that say when it has converged are drawn apart, too.
    train = {r.prompt for r in texts_of(good, "prompts", "train", Prompt)}
    assert not train & {r.prompt for r in texts_of(good, "prompts", "validation", Prompt)}


def test_every_record_goes_where_its_prompt_belongs(good: Path) -> None:
    """The keys of a role are the same in all files, and nothing but what was dropped is lost."""
    shared = {key(f"What is {number} plus one?") for number in range(NUM_SHARED)}
    keys = {role: {key(prompt) for prompt in prompts} for role, prompts in by_role(good).items()}
    assert shared <= set().union(*keys.values())
    held_out = keys["held out"] & shared
    for output, split, record in (
        ("demonstrations", "heldout", Demonstration),
        ("preferences", "heldout", PreferencePair),
        ("heldout_prompts", "heldout", Prompt),
    ):
        assert {key(r.prompt) for r in texts_of(good, output, split, record)} & shared == held_out
    own_pairs = {key(f"Say pair {number}.") for number in range(NUM_OWN)}
    assert own_pairs <= keys["reward_model"] | keys["judge"] | keys["held out"]
    for role in ("reward_model", "judge"):  # both pairs of a prompt stay together
        prompts = [key(prompt) for prompt in by_role(good)[role]]
        assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_records_are_written_as_they_were_read(good: Path) -> None:
    for record in texts_of(good, "demonstrations", "train", Demonstration):
        assert record.completion == f" Answer to {record.prompt}"
    pairs = texts_of(good, "preferences", "train", PreferencePair)
    assert all(pair.prompt.startswith("  ") and pair.chosen == " Yes." and pair.margin is None for pair in pairs)
    prompts = texts_of(good, "prompts", "train", Prompt) + texts_of(good, "heldout_prompts", "heldout", Prompt)
    assert any(record.prompt.startswith("<user>Talk ") for record in prompts)  # messages went through the template
    assert len({record.id for record in prompts}) == len(prompts)


def test_the_two_models_of_opinion_are_measured_on_the_same_pairs(good: Path) -> None:
    one, other = (texts_of(good, name, "heldout", PreferencePair) for name in ("preferences", "judge_preferences"))
    assert one == other and one


def test_counts(good: Path) -> None:
    metrics = json.loads((good / "metrics").read_text(encoding="utf-8"))
    read = {name: value for name, value in metrics.items() if not name.startswith("size_")}
    assert read == {
        "demonstrations_read": 155,
        "demonstrations_kept": 150,
        "demonstrations_dropped_duplicate": 2,
        "demonstrations_dropped_empty": 1,
        "demonstrations_dropped_long_prompt": 1,
        "demonstrations_dropped_long_text": 1,
        "preferences_read": 301,
        "preferences_kept": 300,
        "preferences_dropped_chosen_equals_rejected": 1,
        "prompts_read": 150,
        "prompts_kept": 150,
    }
    sizes = {
        "sft": len(texts_of(good, "demonstrations", "train", Demonstration)),
        "heldout_demonstrations": len(texts_of(good, "demonstrations", "heldout", Demonstration)),
        "reward_model_pairs": len(texts_of(good, "preferences", "train", PreferencePair)),
        "judge_pairs": len(texts_of(good, "judge_preferences", "train", PreferencePair)),
        "judge_ratings": 0,
        "heldout_pairs": len(texts_of(good, "preferences", "heldout", PreferencePair)),
        "ppo_prompts": len(texts_of(good, "prompts", "train", Prompt)),
        "validation_prompts": 5,
        "heldout_prompts": len(texts_of(good, "heldout_prompts", "heldout", Prompt)),
    }
    assert {name.removeprefix("size_"): value for name, value in metrics.items() if name not in read} == sizes
    summary = (good / "summary").read_text(encoding="utf-8")
    assert "| demonstrations | 155 | 150 | 2 duplicate, 1 empty, 1 long prompt, 1 long text |" in summary
    assert "| prompts | 150 | 150 | none |" in summary
    assert f"| sft | {sizes['sft']} |" in summary


def test_kfp_is_told_of_every_output(good: Path) -> None:
    reported = json.loads((good / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    assert set(reported) == set(OUTPUTS)
    metadata = reported["prompts"]["artifacts"][0]["metadata"]
    assert metadata["num_validation"] == 5
    assert metadata["digest"] == open_artifact(good / "prompts", "prompts").digest


def test_the_same_again_and_another_order_of_lines(good: Path, base: Path, tmp_path: Path) -> None:
    data = write_sources(tmp_path)
    assert call(base, tmp_path / "one", data).exit_code == 0
    assert call(base, tmp_path / "two", data).exit_code == 0
    for output, kind in KINDS.items():
        digests = {open_artifact(tmp_path / name / output, kind).digest for name in ("one", "two")}
        assert len(digests) == 1, output
    for source in ("demos", "pairs", "prompts"):
        path = tmp_path / f"{source}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[::-1]), encoding="utf-8")
    assert call(base, tmp_path / "three", data).exit_code == 0
    backwards = {role: {key(prompt) for prompt in prompts} for role, prompts in by_role(tmp_path / "three").items()}
    assert backwards == {role: {key(prompt) for prompt in prompts} for role, prompts in by_role(good).items()}


def test_no_demonstrations_where_a_model_replaces_them(base: Path, tmp_path: Path) -> None:
    data = write_sources(tmp_path) | {"demonstrations": None}
    done = call(base, tmp_path / "out", data)
    assert done.exit_code == 0, done.stderr
    assert texts_of(tmp_path / "out", "demonstrations", "train", Demonstration) == []


def test_a_cap_on_the_pairs_of_a_prompt(base: Path, tmp_path: Path) -> None:
    done = call(base, tmp_path / "out", write_sources(tmp_path) | {"max_pairs_per_prompt": 1})
    assert done.exit_code == 0, done.stderr
    prompts = [pair.prompt for pair in texts_of(tmp_path / "out", "preferences", "train", PreferencePair)]
    assert len(prompts) == len(set(prompts))


# --- rated texts ---


@pytest.fixture
def movies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ratings in the form of the real ones, in the cache of packages; returns data settings."""
    openings = [
        f"{a} {b}" for a in ("the", "a", "this", "my") for b in ("film", "plot", "cast", "score", "end", "joke")
    ]
    snippets = [f"{start} of number {n} is {'good' if n % 2 else 'bad'} fun" for start in openings for n in range(8)]
    # Texts that share more words than a prompt may have tokens.
    snippets += [f"{n} very {'long ' * 30}opening {end}" for n in range(12) for end in ("good", "bad")]
    ratings = [3.0 if "good" in text else -3.0 for text in snippets]
    rows = list(zip(snippets, ratings, strict=True))
    texts = "".join(f"{n}\t{rating}\t{text}\n" for n, (text, rating) in enumerate(rows))
    raw = "".join(f"{n}\t{rating}\t0\t[{rating}, {rating}]\n" for n, (_, rating) in enumerate(rows))
    folder = "hutto_ICWSM_2014/movieReviewSnippets_"
    inner = tarred({f"{folder}GroundTruth.txt": texts, f"{folder}anonDataRatings.txt": raw})
    package = tmp_path / "cache/packages/ratings-1.0"
    package.mkdir(parents=True)
    (package / "ratings-1.0.tar.gz").write_bytes(tarred({"r/hutto_ICWSM_2014.tar.gz": inner}))
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


def tarred(files: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_rated_texts(base: Path, movies: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(base, out, movies, num_evaluation_prompts=4)
    assert done.exit_code == 0, done.stderr
    rated = texts_of(out, "judge_preferences", "ratings", RatedText)
    assert rated and {text.rating for text in rated} == {3.0, -3.0}
    for role in ("preferences", "judge_preferences"):
        for pair in texts_of(out, role, "train", PreferencePair):
            assert "good" in pair.chosen and "bad" in pair.rejected and pair.margin == 6.0
            assert len(pair.prompt) <= 30  # one token a character: what people share can be longer, a prompt cannot

    # No text crosses: whoever sees a text sees all that open with the same two words.
    def openings(texts: Iterable[str]) -> set[str]:
        return {" ".join(text.split()[:2]) for text in texts}

    seen = {
        "sft": openings(r.prompt for r in texts_of(out, "demonstrations", "train", Demonstration)),
        "reward_model": openings(
            r.prompt + text
            for r in texts_of(out, "preferences", "train", PreferencePair)
            for text in (r.chosen, r.rejected)
        ),
        "judge": openings(r.prompt for r in rated),
        "ppo": openings(r.prompt for r in texts_of(out, "prompts", "train", Prompt)),
        "held out": openings(r.prompt for r in texts_of(out, "heldout_prompts", "heldout", Prompt)),
    }
    assert all(seen.values())
    assert sum(len(group) for group in seen.values()) == len(set().union(*seen.values()))


# --- bad data ---


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


def settings_of(**changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda _folder, data: data.update(changes)


BAD: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
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
        spoil("pairs", 2, b'{"question": "a", "good": "b", "bad": "c"}'),
        "{folder}/pairs.jsonl:2 has no column 'q' (columns there: question, good, bad); correct columns in the params file.",
    ),
    "missing field": (
        spoil("demos", 5, b'{"prompt": "a", "answer": "b"}'),
        "{folder}/demos.jsonl:5 has no field 'completion' (fields there: prompt, answer); "
        "name it in columns or correct the data.",
    ),
    "wrong type": (
        spoil("prompts", 4, b'{"prompt": 3}'),
        "{folder}/prompts.jsonl:4: prompt is a int; it must be text.",
    ),
    "no tokens in it": (
        spoil("demos", 4, b'{"prompt": "\\ud800", "completion": "c"}'),
        "{folder}/demos.jsonl:4 is not JSON (it contains a lone UTF-16 surrogate, \\ud800 to \\udfff); each line must be one object.",
    ),
    "less than 80% usable": (
        mostly_empty,
        "data.demonstrations ({folder}/demos.jsonl): only 79 of 100 records are usable (21 empty); at least 80% must be. "
        "Correct the data, or its columns in the params file.",
    ),
    "nothing held out": (
        settings_of(held_out=0),
        "Only 0 prompts are held out, and evaluation.num_prompts is 8; "
        "raise data.held_out, add prompts, or evaluate on fewer.",
    ),
    "a role without records": (
        settings_of(weights={"judge": 0, "reward_model": 1}),
        "No records are left for judge after splitting; raise data.weights.judge or add data.",
    ),
}


def is_empty(out: Path) -> bool:
    """Neither outputs nor drafts of them."""
    return not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
def test_bad_data_is_one_line_and_leaves_nothing(
    change: Callable[[Path, dict[str, Any]], None], said: str, base: Path, tmp_path: Path
) -> None:
    data = write_sources(tmp_path)
    change(tmp_path, data)
    done = call(base, tmp_path / "out", data)
    assert done.stderr == f"error: {said.format(folder=tmp_path)}\n"
    assert (done.exit_code, done.stdout) == (1, "")
    assert is_empty(tmp_path / "out")


def test_too_few_prompts_held_out(base: Path, tmp_path: Path) -> None:
    done = call(base, tmp_path / "out", write_sources(tmp_path), num_evaluation_prompts=1000)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: Only ") and "evaluation.num_prompts is 1000" in done.stderr
    assert is_empty(tmp_path / "out")


def test_bad_data_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    """No traceback, and no library adds a word."""
    data = write_sources(tmp_path)
    BAD["malformed JSON"][0](tmp_path, data)
    command = [sys.executable, "-m", "components.prepare_data", *arguments(base, tmp_path / "out", data)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == f"error: {BAD['malformed JSON'][1].format(folder=tmp_path)}\n"
    assert (done.returncode, done.stdout) == (1, "")
    assert is_empty(tmp_path / "out")


def test_an_artifact_of_the_wrong_kind(good: Path, tmp_path: Path) -> None:
    done = call(good / "prompts", tmp_path / "out", write_sources(tmp_path))
    assert done.exit_code == 1
    assert done.stderr == (f"error: {good / 'prompts'} is a prompts, expected a base_model; pass the right artifact.\n")
    assert is_empty(tmp_path / "out")


def test_an_artifact_that_was_altered(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    done = call(copy, tmp_path / "out", write_sources(tmp_path))
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {copy / 'model.safetensors'} does not match its manifest (sha256 differs); create the artifact again.\n"
    )
    assert is_empty(tmp_path / "out")


def test_a_plain_model_folder_is_no_artifact(tiny_model: Path, tmp_path: Path) -> None:
    done = call(tiny_model, tmp_path / "out", write_sources(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {tiny_model} has no manifest.json")
    assert is_empty(tmp_path / "out")
