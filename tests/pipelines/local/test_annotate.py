"""Pairs of a run for people, their answers in every form, and the preferences that follow from them."""

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from components.rlhf.data.fields import Fields
from components.rlhf.data.preferences import to_preferences
from components.rlhf.maths.intervals import wilson_interval
from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.local.annotate import DISAGREEMENT, RANDOM, Pair, make_pairs, read_pairs
from pipelines.local.annotate_agreement import cohen_kappa, krippendorff_alpha
from pipelines.local.annotate_import import import_answers
from pipelines.settings import dump_yaml, load_params
from tests.support.annotated_runs import sample, write_run
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["annotate", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Judge and reward model agree on rows 0 to 5, and disagree on 6 and 7, on 7 with the larger gap.
REWARDS = [(0.0, 1.0)] * 6 + [(1.0, 0.5), (3.0, 0.0)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [sample(i, f" sft {i}", f" ppo {i}", win=1.0, rewards=rewards) for i, rewards in enumerate(REWARDS)]
    return write_run(tmp_path / "run", rows)


@pytest.fixture
def pairs(run: Path) -> list[Pair]:
    """All pairs of the run, as they are written to run/annotate."""
    result = invoke(run)
    assert result.exit_code == 0 and "wrote 8 pairs" in result.output, result.output
    return read_pairs(run / "annotate")


def test_largest_disagreements_are_selected_beside_a_random_fifth(run: Path) -> None:
    for seed in range(20):
        chosen = make_pairs(run, 3, seed)
        drawn = [p for p in chosen if p.chosen_by == RANDOM]
        others = [p.prompt for p in chosen if p.chosen_by == DISAGREEMENT]
        assert len(drawn) == 1 and len(chosen) == 3 == len({p.pair for p in chosen})
        left = [f"Prompt {i}" for i in (7, 6) if f"Prompt {i}" != drawn[0].prompt]
        assert sorted(others) == sorted(left)
    assert Counter(p.prompt for s in range(64) for p in make_pairs(run, 1, s)).keys() == {
        f"Prompt {i}" for i in range(8)
    }


def test_without_a_reward_model_those_are_selected_that_the_judge_is_least_sure_of(tmp_path: Path) -> None:
    rows = [sample(i, f" s{i}", f" p{i}", win=1.0) for i in range(5)]
    for row, gap in zip(rows, (3.0, 0.1, 2.0, 4.0, 5.0), strict=True):
        row["sft"]["judge_score"], row["ppo"]["judge_score"] = 0.0, gap
    rows.append(sample(5, " s5", " p5", win=None))
    chosen = make_pairs(write_run(tmp_path / "run", rows), 3, 0)
    assert {p.prompt for p in chosen if p.chosen_by != RANDOM} <= {"Prompt 5", "Prompt 1", "Prompt 2", "Prompt 0"}
    assert {p.judge for p in chosen if p.prompt == "Prompt 5"} <= {""}


def test_sides_are_balanced_and_say_who_prefers_what(tmp_path: Path) -> None:
    rows = [sample(i, f" s{i}", f" p{i}", win=0.0, rewards=(0.0, 1.0)) for i in range(200)]
    pairs = make_pairs(write_run(tmp_path / "run", rows), 200, 0)
    for pair in pairs:
        sides = {"a": (pair.a, pair.a_is), "b": (pair.b, pair.b_is)}
        assert {is_what for _, is_what in sides.values()} == {"SFT", "PPO"}
        assert sides[pair.judge][0].startswith(" s") and sides[pair.judge][1] == "SFT"
        assert sides[pair.reward_model][0].startswith(" p") and sides[pair.reward_model][1] == "PPO"
    assert 70 < sum(pair.a_is == "PPO" for pair in pairs) < 130


def test_files_for_raters_show_texts_only(run: Path, pairs: list[Pair]) -> None:
    argilla, tasks = lines(run / "annotate/argilla.jsonl"), json.loads((run / "annotate/label_studio.json").read_text())
    assert [row["id"] for row in argilla] == [task["data"]["pair"] for task in tasks] == [p.pair for p in pairs]
    for pair, row, task in zip(pairs, argilla, tasks, strict=True):
        texts = {"prompt": pair.prompt, "response_a": pair.a, "response_b": pair.b}
        assert row == {"id": pair.pair, **texts} and task == {"data": {"pair": pair.pair, **texts}}
    named = re.findall(r'value="\$(\w+)"', (run / "annotate/label_studio.xml").read_text())
    assert set(named) == {"prompt", "response_a", "response_b"}


def test_responses_that_cannot_be_compared_are_left_out(tmp_path: Path) -> None:
    rows = [
        sample(0, " same", " same ", win=1.0),
        sample(1, " ", " text", win=1.0),
        sample(2, " good", " better", win=1.0),
        sample(2, " good", " better", win=0.0),
    ]
    rows.append(sample(3, "Prompt 3 is long and on", "Prompt 3 is long and off", win=1.0, prompt="Prompt 3 is long"))
    rows.append(sample(4, "x", "y", win=1.0))
    rows[-1]["ppo"]["turns"] = [{"speaker": "model", "text": "y"}]
    folder = write_run(tmp_path / "run", rows)
    assert [p.prompt for p in make_pairs(folder, 9, 0)] == ["Prompt 2"]


# --- answers ---

VOTES = {"ann": "aab", "bob": "abt", "cat": "a-b"}  # of the first three pairs; t is a tie, - a skip
WORDS = {"a": "a", "b": "b", "t": "tie", "-": "skip"}


def own(pairs: Sequence[Pair]) -> str:
    return "".join(
        json.dumps({"pair": pair.pair, "rater": rater, "answer": WORDS[vote], "time": "2026-01-01T00:00:00+00:00"})
        + "\n"
        for rater, votes in VOTES.items()
        for pair, vote in zip(pairs, votes, strict=False)
    )


def given_by(number: int, *, upper: bool) -> list[tuple[str, str]]:
    found = [(rater, WORDS[votes[number]]) for rater, votes in VOTES.items()]
    return [(r, w.upper() if upper and w != "tie" else w) for r, w in found]


def argilla(pairs: Sequence[Pair]) -> str:
    records = []
    for number, pair in enumerate(pairs[:3]):
        responses = [{"value": w, "user_id": r} for r, w in given_by(number, upper=True) if w != "SKIP"]
        fields = {"prompt": pair.prompt, "response_a": pair.a, "response_b": pair.b}
        record = {
            "id": pair.pair,
            "fields": fields,
            "metadata": {},
            "suggestions": {},
            "vectors": {},
            "_server_id": "1",
        }
        records.append(record | {"responses": {"better": responses}})
    return json.dumps([*records, {"id": pairs[3].pair, "fields": {}, "responses": {}}])


def argilla_flat(pairs: Sequence[Pair]) -> str:
    rows = []
    for number, pair in enumerate(pairs[:3]):
        found = given_by(number, upper=True)
        rows.append(
            {
                "id": pair.pair,
                "response_a": pair.a,
                "better.responses": ["A" if w == "SKIP" else w for _, w in found],
                "better.responses.users": [r for r, _ in found],
                "better.responses.status": ["discarded" if w == "SKIP" else "submitted" for _, w in found],
            }
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


def label_studio(pairs: Sequence[Pair]) -> str:
    tasks = []
    for number, pair in enumerate(pairs[:3]):
        annotations: list[Mapping[str, Any]] = []
        for rater, word in given_by(number, upper=True):
            choice = {"value": {"choices": [word]}, "from_name": "better", "to_name": "prompt", "type": "choices"}
            skipped = word == "SKIP"
            result = [] if skipped else [choice]
            annotations.append({"completed_by": {"id": 1, "email": rater}, "result": result, "was_cancelled": skipped})
        tasks.append({"id": number, "data": {"pair": pair.pair}, "annotations": annotations, "predictions": []})
    return json.dumps(tasks)


def label_studio_min(pairs: Sequence[Pair]) -> str:
    rows = []
    for number, pair in enumerate(pairs[:3]):
        for rater, word in given_by(number, upper=True):
            better = {} if word == "SKIP" else {"better": word}
            rows.append({"id": number, "pair": pair.pair, "annotator": rater, "annotation_id": 5} | better)
    return json.dumps(rows)


FORMS = {
    "own.jsonl": own,
    "argilla.json": argilla,
    "argilla_flat.jsonl": argilla_flat,
    "label_studio.json": label_studio,
    "label_studio_min.json": label_studio_min,
}


@pytest.mark.parametrize("name", FORMS)
def test_answers_in_every_form_become_the_same_preferences(
    run: Path, pairs: list[Pair], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(FORMS[name](pairs))
    result = invoke(run, "--import", tmp_path / name)
    assert result.exit_code == 0, result.output
    first, third = pairs[0], pairs[2]
    rows = lines(run / "annotate/preferences.jsonl")
    # Pair 0 is a by all. Pair 1 is a by ann and b by bob: no majority. Pair 2 is b by two, and a tie by one.
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        (first.prompt, first.a, first.b),
        (third.prompt, third.b, third.a),
    ]
    assert [(row["votes"], row["votes_against"]) for row in rows] == [(3, 0), (2, 1)]
    summary = json.loads((run / "annotate/agreement.json").read_text())
    assert summary["answers"] == {"a": 4, "b": 3, "tie": 1} and summary["without_majority"] == 1
    assert summary["contradictions"] == [{"pair": pairs[1].pair, "answers": {"ann": "a", "bob": "b"}}]
    # Labels of the items: aaa, ab, btb. Unequal ordered pairs: 0, 2/1, 4/2. Totals a 4, b 3, tie 1 of 8: 64 - 16 - 9 - 1 = 38.
    assert summary["krippendorff_alpha"] == pytest.approx(1 - 7 * 4 / 38)
    # ann aab, bob abt: 1 of 3 alike; by chance (2 * 1 + 1 * 1) / 9 = 1/3.
    assert {tuple(each["raters"]): each["kappa"] for each in summary["cohen_kappa"]}["ann", "bob"] == pytest.approx(0.0)
    assert "Raters contradict one another on 1 pair" in result.output and "--set seed=8" in result.output


def test_later_answer_of_a_rater_counts_and_a_contradiction_is_reported(
    run: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    rows = [
        {"pair": pairs[0].pair, "rater": "ann", "answer": a, "time": f"2026-01-0{d}"} for d, a in ((2, "b"), (1, "a"))
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = import_answers(run / "annotate", [tmp_path / "x.jsonl"])
    assert summary["changed"] == [{"pair": pairs[0].pair, "rater": "ann"}]
    assert lines(run / "annotate/preferences.jsonl")[0]["chosen"] == pairs[0].b


def test_agreement_with_judge_and_reward_model_is_of_the_majority(run: Path, pairs: list[Pair], tmp_path: Path) -> None:
    """People choose the policy every time, as the judge does; the reward model prefers it on six of eight."""
    rows = [{"pair": p.pair, "rater": "ann", "answer": "a" if p.a_is == "PPO" else "b"} for p in pairs]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = import_answers(run / "annotate", [tmp_path / "x.jsonl"])["with_models"]
    hits = {name: sum(found[group][name]["hits"] for group in found) for name in ("judge", "reward_model", "policy")}
    assert hits == {"judge": 8, "reward_model": 6, "policy": 8}
    assert found["random"]["policy"]["of"] == 2


CALL = {"name": "add", "arguments": '{"a": 2}', "id": "1"}


def test_chat_prompts_keep_their_messages(tmp_path: Path) -> None:
    empty = {"name": "", "reasoning": "", "tool_calls": [], "tool_call_id": "", "is_learned": True}
    messages = [
        empty | {"role": "system", "content": "Add."},
        empty | {"role": "user", "content": "2+2?"},
        empty | {"role": "assistant", "content": "", "tool_calls": [CALL]},
        empty | {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    tools = '[{"type": "function", "function": {"name": "add"}}]'
    conversation = {"messages": messages, "tools": tools}
    folder = write_run(tmp_path / "run", [sample(0, "Four", "4", win=1.0)], {"heldout-0": conversation})
    assert invoke(folder).exit_code == 0
    (pair,) = read_pairs(folder / "annotate")
    assert pair.messages[2] == ("assistant", 'add({"a": 2})') and "user: 2+2?" in pair.prompt
    (tmp_path / "x.jsonl").write_text(json.dumps({"pair": pair.pair, "rater": "ann", "answer": "a"}))
    import_answers(folder / "annotate", [tmp_path / "x.jsonl"])
    (example,) = to_preferences(Fields(lines(folder / "annotate/preferences.jsonl")[0]))
    assert [(m.role, m.content) for m in example.prompt.messages] == [(m["role"], m["content"]) for m in messages]
    assert example.prompt.messages[2].tool_calls[0].name == "add" and example.prompt.tools
    assert [answer.messages[0].content for answer in example.answers] == [pair.a, pair.b]


text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip)


@given(prompt=text, sft=text, policy=text)
def test_prepare_data_reads_every_text_unchanged(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, sft: str, policy: str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder / "run", [sample(0, sft, policy, win=1.0, prompt=prompt), sample(1, " x", " y", win=1.0)])
    assert invoke(folder / "run").exit_code == 0
    pairs = read_pairs(folder / "run/annotate")
    answers = "".join(json.dumps({"pair": p.pair, "rater": "ann", "answer": "a"}) + "\n" for p in pairs)
    (folder / "x.jsonl").write_text(answers)
    import_answers(folder / "run/annotate", [folder / "x.jsonl"])
    for pair, row in zip(pairs, lines_of_any_text(folder / "run/annotate/preferences.jsonl"), strict=True):
        (example,) = to_preferences(Fields(row))
        assert example.prompt.messages[0].content == pair.record
        assert [answer.messages[0].content for answer in example.answers] == [pair.a, pair.b]


def lines_of_any_text(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"pair": "0", "rater": "ann", "answer": "a"}', "which is not among the pairs"),
        ('{"pair": "PAIR", "rater": "ann", "answer": "c"}', "has the answer 'c'"),
        ('{"pair": "PAIR", "rater": " ", "answer": "a"}', "does not say who answered"),
        ('{"pair": "PAIR", "rater": null, "answer": "a"}', "cannot be read as answers"),
        ('{"pair": "PAIR", "rater": "ann", "answer": "tie"}', "contain no preference"),
        ('{"id": "PAIR", "prompt": "x"}', "no answers in a known form"),
        ('{"data": {"pair": "PAIR"}, "annotations": [{"result": []}]}', "cannot be read as answers"),
        ('{"id": "PAIR", "responses": {"better": ["A"]}}', "cannot be read as answers"),
        ("not JSON", "is not JSON"),
        ("", "contain no preference"),
    ],
)  # fmt: skip
def test_answers_that_mean_nothing_are_refused(
    run: Path, pairs: list[Pair], tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content.replace("PAIR", pairs[0].pair))
    assert problem in refusal(run, "--import", tmp_path / "x.jsonl")
    assert {path.name for path in (run / "annotate").iterdir()} == {
        "key.jsonl", "argilla.jsonl", "label_studio.json", "label_studio.xml",
    }  # fmt: skip


def test_other_mistakes_are_one_sentence(run: Path, pairs: list[Pair], tmp_path: Path) -> None:
    assert "has other pairs, which people may be answering" in refusal(run, "--pairs", 3)
    assert "give one of both" in refusal(run, "--page", "--import", "x")
    assert "does not exist" in refusal(run, "--import", tmp_path / "none.jsonl")
    assert "has no pairs" in refusal(run, "--out", tmp_path, "--import", "x")
    key = run / "annotate/key.jsonl"
    key.write_text(key.read_text().replace('"a": " ppo', '"a": " PPO'))
    assert "was changed" in refusal(run, "--import", "x")
    assert invoke(run, "--out", tmp_path / "again").exit_code == 0
    empty = write_run(tmp_path / "equal", [sample(0, "x", "x", win=0.5)])
    assert "no two different responses" in refusal(empty)
    old = write_run(tmp_path / "old", [{"id": "heldout-0", "prompt": "p"}])
    assert "is not a sample of an evaluation" in refusal(old)


# --- agreement ---


def test_krippendorff_alpha_of_the_published_example() -> None:
    """Krippendorff 2011, example C: four observers, twelve units, missing data; alpha is 0.743."""
    table = ["123321412...", "123322412" + "5.3", ".33323422" + "51.", "123324412" + "51."]
    units = [[row[i] for row in table if row[i] != "."] for i in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["a"]]) is None and krippendorff_alpha([["a"], ["b"]]) is None


def test_cohen_kappa_by_hand() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5, so 0.4."""
    answers = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    first, second = ({str(i): pair[side] for i, pair in enumerate(answers)} for side in (0, 1))
    assert cohen_kappa(first, second | {"more": "y"}) == pytest.approx(0.4)
    assert cohen_kappa({"1": "a"}, {"1": "a"}) is None and cohen_kappa({"1": "a"}, {"2": "a"}) is None


@given(st.lists(st.tuples(st.sampled_from("abt"), st.sampled_from("abt")), min_size=2, max_size=30))
def test_cohen_kappa_is_that_of_scikit_learn(answers: list[tuple[str, str]]) -> None:
    first, second = zip(*answers, strict=True)
    kappa = cohen_kappa(*({str(i): label for i, label in enumerate(each)} for each in (first, second)))
    if kappa is None:
        assert len(set(first) | set(second)) == 1
    else:
        assert kappa == pytest.approx(cohen_kappa_score(first, second))


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"), [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval(hits: int, of: int, low: float, high: float) -> None:
    assert wilson_interval(hits, of, confidence=0.95) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.slow
def test_printed_command_of_the_next_run_reads_the_preferences(
    tmp_path: Path, tiny_model: Path, resident: Resident
) -> None:
    data = write_data(tmp_path)
    params = load_params(write_params(tmp_path / "toy.yaml", toy_params(tiny_model, data)))
    rows = [sample(i, " bad", f" good {i}", win=1.0, prompt=f"The place {i * i} is") for i in range(30)]
    run = write_run(tmp_path / "it's a run", rows)
    (run / "params.yaml").write_text(dump_yaml(params))
    assert invoke(run).exit_code == 0
    answers = [
        {"pair": p.pair, "rater": "ann", "answer": "b" if p.a_is == "SFT" else "a"}
        for p in read_pairs(run / "annotate")
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    printed = invoke(run, "--import", tmp_path / "x.jsonl").output
    program, command, *arguments = shlex.split(printed.strip().splitlines()[-1])
    assert (program, command) == ("kfp-rlhf", "run") and arguments[-2:] == ["--set", "seed=1"]
    done = resident.run([sys.executable, "-m", "pipelines", "data", *arguments], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "preferences.jsonl): 30 read, 30 kept" in text
    found = re.search(r"(\d+) reward model pairs, (\d+) judge pairs", text)
    assert found and int(found[1]) + int(found[2]) >= 10
