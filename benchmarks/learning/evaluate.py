"""Samples, scores and judges saved policies of any system: `python -m benchmarks.learning.evaluate JOB`.

JOB is a JSON file that benchmarks/learning/arms.py describes. Each measured policy is printed as one line, RESULT and a JSON object.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import logging

from benchmarks.peers.measure import RESULT
from benchmarks.record import read_rows
from components.evaluation.compare import sequence_kl
from components.evaluation.statistics import distinct_2, pairwise_wins
from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import share_trunk
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.rewards.judges import JudgeResources, open_judge, read_judges
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rollout.hf import HfRolloutEngine

MICROBATCH_TOKENS = 4096


class Evaluator:
    """What all policies of a seed are measured with: prompts, seeds, reference, reward model and judge."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.sft_model, self.samples = Path(job["sft_model"]), Path(job["samples"])
        self.frozen: int = job["num_frozen_layers"]
        self.dtype = compute_dtype(job["precision"])
        self.prompts = load_records(Path(job["heldout_prompts"]), "heldout", Prompt)[: job["num_prompts"]]
        # The same draws for every policy, so that only their weights differ.
        self.seeds = [derive_seed("evaluation", job["seed"], row) for row in range(len(self.prompts))]
        self.sampling = SamplingConfig.model_validate(job["sampling"])
        self.tokenizer, self.stop_ids = load_tokenizer(self.sft_model), load_stop_ids(self.sft_model)
        self.distribution = SamplingDistribution(
            temperature=self.sampling.temperature,
            min_new_tokens=self.sampling.min_new_tokens,
            stop_ids=self.stop_ids,
        )
        self.reference = self.load(self.sft_model)
        self.reward = load_reward_scorer(
            Path(job["reward_model"]),
            dtype=self.dtype,
            device=default_device(),
            microbatch_tokens=MICROBATCH_TOKENS,
        )
        self.judge = open_scorer(Path(job["judge"]))

    def load(self, folder: Path) -> Any:
        return load_causal_lm(folder, num_frozen_layers=0, dtype=self.dtype, trainable=False, device=default_device())

    def measure(self, name: str, folder: Path) -> dict[str, Any]:
        """Means over the prompts; each response goes to NAME.jsonl. The SFT model must have been measured first."""
        lm = self.reference if folder == self.sft_model else self.load(folder)
        engine = HfRolloutEngine(lm, self.tokenizer, stop_ids=self.stop_ids)
        completions = engine.generate(self.prompts, self.sampling, self.seeds)
        kl = self._kl(lm, completions) if lm is not self.reference else [0.0] * len(completions)
        rewards, judged = self.reward.score(completions).tolist(), self.judge.score(completions).tolist()
        rows = [
            {"prompt": c.prompt.prompt, "response": c.response, "kl": k, "reward": r, "judge": j}
            for c, k, r, j in zip(completions, kl, rewards, judged, strict=True)
        ]
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.samples / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sft = read_rows(self.samples / "SFT-00.jsonl")
        distinct, _ = distinct_2([row["response"] for row in rows], [row["response"] for row in sft])
        gains = [row["judge"] - before["judge"] for row, before in zip(rows, sft, strict=True)]
        return {
            "num_prompts": len(rows),
            "kl": statistics.fmean(kl),
            "reward": statistics.fmean(rewards),
            "judge": statistics.fmean(judged),
            "judge_gain_error": statistics.stdev(gains) / len(gains) ** 0.5,
            "win_rate": float(pairwise_wins(judged, [row["judge"] for row in sft]).mean()),
            "distinct2": distinct,
            "length": statistics.fmean(len(c.response_ids) for c in completions),
        }

    def _kl(self, lm: Any, completions: Sequence[Completion]) -> list[float]:
        """The exact KL of the next-token distributions to the SFT model in nats, summed over each response."""
        frozen = self.frozen if share_trunk(self.reference, [lm], self.frozen) else 0
        policy, reference = (Actor(each, num_frozen_layers=frozen, dtype=self.dtype) for each in (lm, self.reference))
        _, exact = sequence_kl(policy, reference, completions, self.distribution, default_device())
        return exact


def open_scorer(folder: Path) -> Scorer:
    """The first judge of an artifact, which must give scores."""
    resources = JudgeResources(precision="auto", storage=StorageConfig(), log=print)
    scorer = open_judge(read_judges(folder)[0], folder, resources).scorer
    assert scorer is not None, "the judge of the movie task gives scores"
    return scorer


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    evaluator = Evaluator(job)
    for policy in job["policies"]:
        found = evaluator.measure(f"{policy['system']}-{policy['iteration']:02d}", Path(policy["folder"]))
        print(f"{RESULT}{json.dumps(policy | found)}", flush=True)


if __name__ == "__main__":
    main()
