"""`kfp-rlhf annotate`: pairs of responses of a finished run for people to compare, without saying which model gave which.

key.jsonl has everything about the pairs and is not for raters; the other files show a prompt and the responses A and B only.
"""

import hashlib
import json
import os
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.rlhf.config.policy import TITLES
from components.rlhf.data.files import read_jsonl
from components.rlhf.text.errors import InputError
from pipelines.local.run_dir import artifacts

KEY, ARGILLA, LABEL_STUDIO, LABELS = "key.jsonl", "argilla.jsonl", "label_studio.json", "label_studio.xml"
RANDOM_SHARE = 0.2  # of the pairs; only these tell how often people agree with the judge on all prompts
DISAGREEMENT, OTHER, RANDOM = "disagreement", "other", "random"
REPEATED_PROMPT = 12  # characters; prepare_data takes two longer openings for a repeated prompt


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to a held-out prompt. judge and reward_model are the side that each prefers: a, b, or empty."""

    pair: str  # digest of prompt, a and b, so that an answer can never be read with the sides exchanged
    prompt: str  # as it is shown
    record: Any  # the prompt as prepare_data reads it: a text, or messages
    tools: str  # JSON text, or empty
    a: str
    b: str
    a_is: str  # the model: SFT, PPO or DPO
    b_is: str
    judge: str
    reward_model: str
    chosen_by: str  # DISAGREEMENT, OTHER or RANDOM

    @property
    def messages(self) -> list[tuple[str, str]]:
        """Role and text of each message of the prompt; a plain text has no role."""
        if isinstance(self.record, str):
            return [("", self.record)]
        return [(str(m["role"]), text_of(m)) for m in self.record]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of an evaluation: both responses, and by how much judge and reward model prefer the policy's (None: no opinion)."""

    method: str
    prompt: str
    record: Any
    tools: str
    sft: str
    policy: str
    judge: float | None
    reward_model: float | None


def make_pairs(run: Path, num_pairs: int, seed: int) -> list[Pair]:
    """Pairs of a run, in the order in which they are shown.

    RANDOM_SHARE of them are a random sample of all rows. The others are those on which judge and reward model disagree most: with the
    gaps of both in units of their standard deviation, those with the smallest product. Without a reward model, those on which the judge
    is least sure. Raises InputError for a run without an evaluation or usable pairs.
    """
    rows = list(_rows(run))
    if not rows:
        raise InputError(f"{run} has no two different responses to compare; kfp-rlhf report {run} shows them.")
    order = random.Random(seed)
    num_pairs = min(num_pairs, len(rows))
    drawn = order.sample(range(len(rows)), max(1, round(RANDOM_SHARE * num_pairs)))
    judge, reward = _in_deviations([r.judge for r in rows]), _in_deviations([r.reward_model for r in rows])
    if any(row.reward_model is not None for row in rows):
        doubt = [j * r for j, r in zip(judge, reward, strict=True)]
    else:
        doubt = [abs(j) for j in judge]
    rest = sorted(set(range(len(rows))) - set(drawn), key=lambda i: (doubt[i], i))[: num_pairs - len(drawn)]
    pairs = [as_pair(rows[i], RANDOM, seed) for i in drawn]
    pairs += [as_pair(rows[i], DISAGREEMENT if doubt[i] < 0 else OTHER, seed) for i in rest]
    order.shuffle(pairs)
    return pairs


def _in_deviations(gaps: Sequence[float | None]) -> list[float]:
    known = [gap for gap in gaps if gap is not None]
    deviation = statistics.pstdev(known, mu=0) if known else 0.0
    return [0.0 if gap is None or not deviation else gap / deviation for gap in gaps]


def as_pair(row: Row, chosen_by: str, seed: int) -> Pair:
    """The pair, with its sides exchanged for half of all texts and seeds."""
    policy, sides = TITLES.get(row.method, row.method.upper()), {1: "a", -1: "b"}
    sign = (
        1 if hashlib.sha256("\x1f".join([str(seed), row.prompt, row.sft, row.policy]).encode()).digest()[0] % 2 else -1
    )
    a, b = (row.policy, row.sft) if sign == 1 else (row.sft, row.policy)

    def side(gap: float | None) -> str:
        return sides[sign if gap > 0 else -sign] if gap else ""

    return Pair(
        pair=hashlib.sha256("\x1f".join([row.prompt, a, b]).encode()).hexdigest()[:16],
        prompt=row.prompt,
        record=row.record,
        tools=row.tools,
        a=a,
        b=b,
        a_is=policy if sign == 1 else "SFT",
        b_is="SFT" if sign == 1 else policy,
        judge=side(row.judge),
        reward_model=side(row.reward_model),
        chosen_by=chosen_by,
    )


# --- the evaluation of a run ---


def _rows(run: Path) -> Iterator[Row]:
    """The rows of all evaluations of a run whose responses can be a preference, each pair of texts once."""
    found = dict(artifacts(run))
    evaluations = [path for path, kind in found.items() if kind == "evaluation"]
    if not evaluations:
        raise InputError(f"{run} has no evaluation yet; kfp-rlhf status {run} shows how far it is.")
    prompts: dict[str, dict[str, Any]] = {}
    for path in (path for path, kind in found.items() if kind == "prompts" and path.name == "heldout_prompts"):
        prompts |= {str(row.get("id")): row for _, row in read_jsonl(path / "heldout.jsonl")}
    seen = set()
    for folder in evaluations:
        for location, sample in read_jsonl(folder / "samples.jsonl"):
            row = _row(sample, prompts, location)
            texts = (row.prompt, *sorted((row.sft, row.policy))) if row else ()
            if row and texts not in seen:
                seen.add(texts)
                yield row


def _row(sample: Mapping[str, Any], prompts: Mapping[str, Mapping[str, Any]], location: str) -> Row | None:
    """None if the responses cannot be a preference: one is empty or has several turns, or both are equal or repeat the prompt."""
    try:
        method = next(name for name in TITLES if name in sample)
        sft, policy = sample["sft"], sample[method]
        texts = str(sft["response"]), str(policy["response"])
        source = prompts[str(sample["id"])]
        if source["prompt"] != sample["prompt"]:
            raise KeyError("prompt")
        record, tools = _record(source)
        win = next(iter(sample["wins"].values()), None)  # of the first judge, whose scores judge_score are
        gap = abs(policy.get("judge_score", 1.0) - sft.get("judge_score", 0.0))
        judge = None if win is None else 0.0 if win == 0.5 else gap if win > 0.5 else -gap
        reward = policy["reward"] - sft["reward"] if "reward" in policy and "reward" in sft else None
    except (KeyError, StopIteration, TypeError, AttributeError) as error:
        raise InputError(
            f"{location} is not a sample of an evaluation of this version ({error!r}); run it again."
        ) from None
    if (
        "turns" in sft
        or "turns" in policy
        or not all(text.strip() for text in texts)
        or texts[0].strip() == texts[1].strip()
    ):
        return None
    if isinstance(record, str) and len(record) >= REPEATED_PROMPT and all(text.startswith(record) for text in texts):
        return None
    prompt = record if isinstance(record, str) else "\n\n".join(f"{m['role']}: {text_of(m)}" for m in record)
    return Row(
        method=method, prompt=prompt, record=record, tools=tools, sft=texts[0], policy=texts[1], judge=judge, reward_model=reward
    )  # fmt: skip


def _record(prompt: Mapping[str, Any]) -> tuple[Any, str]:
    """The prompt as the data of a next run has it, text or messages, and the tools as JSON text."""
    if prompt["conversation"] is None:
        return str(prompt["prompt"]), ""
    return [_message(m) for m in prompt["conversation"]["messages"]], str(prompt["conversation"]["tools"])


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in message["tool_calls"]
    ]
    optional = {
        "name": message["name"],
        "reasoning_content": message["reasoning"],
        "tool_calls": calls,
        "tool_call_id": message["tool_call_id"],
    }
    return {"role": message["role"], "content": message["content"]} | {k: v for k, v in optional.items() if v}


def text_of(message: Mapping[str, Any]) -> str:
    """A message as a person reads it: its content, and the functions that it calls."""
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], *calls]))


# --- files ---

LABELING = """<View>
  <Header value="Prompt"/>
  <Text name="prompt" value="$prompt"/>
  <View style="display: flex; gap: 2em">
    <View style="flex: 1"><Header value="A"/><Text name="a" value="$response_a"/></View>
    <View style="flex: 1"><Header value="B"/><Text name="b" value="$response_b"/></View>
  </View>
  <Header value="Which response is better?"/>
  <Choices name="better" toName="prompt" choice="single" required="true">
    <Choice value="A" hotkey="a"/>
    <Choice value="B" hotkey="b"/>
    <Choice value="tie" hotkey="t"/>
  </Choices>
</View>
"""


def write_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """Write the files for Argilla and Label Studio, and the key last. Raises InputError if the folder has the key of other pairs."""
    key = as_lines(asdict(pair) for pair in pairs)
    path = folder / KEY
    if path.is_file() and path.read_text(encoding="utf-8") != key:
        raise InputError(f"{path} has other pairs, which people may be answering; pass another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    shown = [{"prompt": p.prompt, "response_a": p.a, "response_b": p.b} for p in pairs]
    write(folder / ARGILLA, as_lines({"id": p.pair, **texts} for p, texts in zip(pairs, shown, strict=True)))
    tasks = [{"data": {"pair": p.pair, **texts}} for p, texts in zip(pairs, shown, strict=True)]
    write(folder / LABEL_STUDIO, json.dumps(tasks, ensure_ascii=False, indent=1) + "\n")
    write(folder / LABELS, LABELING)
    write(path, key)


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs of a key. Raises InputError if there is none, or it is not one."""
    path = folder / KEY
    if not path.is_file():
        raise InputError(f"{folder} has no pairs ({KEY}); write them first with kfp-rlhf annotate RUN.")
    try:
        pairs = [Pair(**row) for _, row in read_jsonl(path)]
    except TypeError as error:
        raise InputError(f"{path} is not a key of this version ({error}); write the pairs again with --out.") from None
    for pair in pairs:
        if pair.pair != hashlib.sha256("\x1f".join([pair.prompt, pair.a, pair.b]).encode()).hexdigest()[:16]:
            raise InputError(
                f"{path} was changed: the texts of {pair.pair} are others; restore it, or write the pairs again."
            )
    return pairs


def as_lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> None:
    """Write a file at once: it has its old or its new content, never a part."""
    draft = path.with_name(f".{path.name}.writing")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
