"""Measured process, in the environment of TRL 1.12: its PPO, whole iterations or only the scores and updates of given responses.

Written for trl 1.12.0 (trl.experimental.ppo), the last release with PPO.
"""

import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    logging,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers import chat_lengths
from benchmarks.peers.inputs import MODEL, REWARD_MODEL, read_texts
from benchmarks.peers.measure import Marks, print_result, read_job

LEARNING_RATE, KL_COEF, SEED = 3e-6, 0.05, 1
WARM_UP_TOKENS = 8  # of each prompt and response of the batch that is not measured
PAD = 0  # a token that no text contains; the tokenizer's own padding is its EOS, which TRL would take for the end


class MarkIterations(TrainerCallback):
    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.mark()


def config_of(job: dict[str, Any], folder: str, *, num_rows: int) -> PPOConfig:
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=num_rows // job["microbatch"],
        local_rollout_forward_batch_size=job["forward_batch"],
        num_mini_batches=1,
        num_ppo_epochs=job.get("epochs", 1),
        total_episodes=num_rows * (1 + job["iterations"]),
        response_length=job.get("response", 24),
        temperature=1.0,
        kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
    )


def train(
    job: dict[str, Any], rows: list[list[int]], marks: Marks, collate: Callable[[Any], Any] | None = None
) -> None:
    """Run one iteration more than is measured, on prompts given as ids."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left", trust_remote_code=False)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False) for _ in range(2)
    )
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(
            REWARD_MODEL, num_labels=1, dtype=torch.float32, trust_remote_code=False
        )
        for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        PPOTrainer(
            args=config_of(job, folder, num_rows=len(rows)),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            data_collator=collate or DataCollatorWithPadding(tokenizer),
            callbacks=[MarkIterations(marks)],
        ).train()


def measure_iterations(job: dict[str, Any], marks: Marks) -> tuple[int, int]:
    ids = read_texts()["prompts"][job["prompts"]]["ids"]
    train(job, ids, marks)
    return len(ids), sum(len(row) + job["response"] for row in ids)


def measure_given(job: dict[str, Any], marks: Marks) -> tuple[int, int]:
    """Scores and updates of given responses, after an unmeasured batch of short ones.

    In place of its generation TRL gets the responses, and as their scores zeros that take no memory. TRL takes the log-probs of
    its policy from these scores, so it needs no pass of the policy for them, as it needs none after its own generation.
    """
    rows = chat_lengths.random_ids(chat_lengths.load(job["rows"]))
    short = [(prompt[:WARM_UP_TOKENS], response[:WARM_UP_TOKENS]) for prompt, response in rows]
    batches = [short] + [rows] * job["iterations"]
    prompts, given = iter(batches + [rows] * 2), iter(batches)  # the loader of TRL collates batches ahead

    def collate(_: Any) -> dict[str, Tensor]:
        return {"input_ids": pad([prompt for prompt, _ in next(prompts)], left=True)}

    def batch_generation(model: Any, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        responses = pad([response for _, response in next(given)], left=False)
        scores = torch.zeros(1, 1, 1).expand(*responses.shape, model.config.vocab_size)
        return torch.cat((queries, responses), dim=1), scores

    ppo_trainer.batch_generation = batch_generation
    train(job, [[1]] * len(rows), marks, collate)
    return len(rows), sum(len(prompt) + len(response) for prompt, response in rows)


def pad(rows: list[list[int]], *, left: bool) -> Tensor:
    width = max(map(len, rows))
    missing = [[PAD] * (width - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, missing, strict=True)])


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job, marks = read_job(), Marks()
    measure_of = measure_given if job["program"] == "chat" else measure_iterations
    samples, tokens = measure_of(job, marks)
    packages = ("trl", "torch", "transformers")
    print_result(marks, version=", ".join(f"{p} {version(p)}" for p in packages), samples=samples, tokens=tokens)


if __name__ == "__main__":
    sys.exit(main())
