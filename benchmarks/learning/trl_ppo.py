"""Trains the SFT model with TRL's PPO, in the environment of TRL 1.12: `python -m benchmarks.learning.trl_ppo JOB`.

JOB is a JSON file that benchmarks/learning/arms.py describes. Every few iterations the policy is saved as a model folder.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    logging,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

NEVER = -1e4  # a logit of probability 0; TRL multiplies logits with probabilities, where -inf would give nan


class SaveMetrics(TrainerCallback):
    """Appends TRL's metrics of an iteration to a file."""

    def __init__(self, path: Path, iteration: int) -> None:
        self.path, self.iteration = path, iteration

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(logs | {"iteration": self.iteration}) + "\n")
        shown = {name: round(logs[name], 4) for name in ("objective/scores", "objective/kl", "val/ratio")}
        print(f"iteration {self.iteration}: {shown}", flush=True)


def config_of(job: dict[str, Any], folder: Path, *, seed: int) -> PPOConfig:
    """The settings of one iteration."""
    return PPOConfig(
        output_dir=str(folder / "unused"),
        # With accumulation TRL would take one optimizer step per rollout, whatever num_mini_batches says, because accelerate counts
        # the microbatches of the whole rollout. Without it each minibatch is one microbatch and one step.
        per_device_train_batch_size=job["rollouts"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["rollouts"] // job["minibatch"],
        num_ppo_epochs=job["epochs"],
        total_episodes=job["rollouts"],
        local_rollout_forward_batch_size=job["rollouts"],
        response_length=job["response"],
        temperature=job["temperature"],
        kl_coef=job["kl_coef"],
        cliprange=job["clip_range"],
        cliprange_value=job["value_clip_range"],
        gamma=job["gamma"],
        lam=job["gae_lambda"],
        learning_rate=job["learning_rate"],
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=seed,
    )


def never_stop(policy: Any, stop_ids: Sequence[int]) -> None:
    """Give the stop tokens probability 0 wherever the policy computes logits: in generation and in all log-probs alike.

    suppress_tokens of a generation config would change the log-probs of TRL's rollouts only, and not those of its reference and of
    its updates, so that the first ratio would not be 1.
    """
    stops = torch.tensor(list(stop_ids))

    def mask(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, stops, NEVER)

    policy.get_output_embeddings().register_forward_hook(mask)


def freeze(model: Any, num_frozen_layers: int) -> None:
    """Train only the layers above the frozen ones, the last norm, and a scalar head; not the embeddings, to which the logits are tied."""
    for name, parameter in model.named_parameters():
        number = name.removeprefix("model.layers.").partition(".")[0]
        above = number.isdigit() and int(number) >= num_frozen_layers
        parameter.requires_grad_(above or name.startswith(("model.norm.", "score.")))


def load_policy(job: dict[str, Any]) -> Any:
    policy = AutoModelForCausalLM.from_pretrained(job["sft_model"], dtype=torch.float32, trust_remote_code=False)
    never_stop(policy, job["stop_ids"])
    return policy


def load_scalar(job: dict[str, Any]) -> Any:
    """The reward model, with the normalization of its scores as part of its head, because TRL has none."""
    model = AutoModelForSequenceClassification.from_pretrained(
        job["reward_model"], num_labels=1, dtype=torch.float32, trust_remote_code=False
    )
    old = model.score
    head = nn.Linear(old.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(old.weight / job["reward_std"])
        head.bias.fill_(-job["reward_mean"] / job["reward_std"])
    model.score = head
    return model


class Learner:
    """Everything that changes in training: the trained weights and the optimizer. TRL's PPO carries nothing else over to an iteration.

    So each iteration is a call of PPOTrainer.train with the prompts that our iteration has, and a killed run goes on with the next one.
    """

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.path, self.done = folder / "state.pt", 0
        self.policy, self.value = load_policy(job), load_scalar(job)
        for model in (self.policy, self.value):
            freeze(model, job["num_frozen_layers"])
        self.trained = {
            f"{name}.{key}": parameter
            for name, model in (("policy", self.policy), ("value", self.value))
            for key, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        rate, betas = job["learning_rate"], tuple(job["betas"])
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=rate, betas=betas, weight_decay=0.0, fused=True)
        if self.path.is_file():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.path, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]

    def save(self) -> None:
        """Count the iteration as done, and keep the state for a run that goes on."""
        self.done += 1
        draft = self.path.with_suffix(".writing")
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        torch.save({"done": self.done, "weights": weights, "optimizer": self.optimizer.state_dict()}, draft)
        draft.rename(self.path)

    def save_policy(self, target: Path) -> None:
        draft = target.with_name(f".{target.name}.writing")
        shutil.rmtree(draft, ignore_errors=True)
        self.policy.save_pretrained(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)


def iterate(job: dict[str, Any], folder: Path, learner: Learner, tokenizer: Any, reference: Any, reward: Any) -> None:
    """One iteration of TRL's PPO."""
    seed = 1000 * job["seed"] + learner.done
    np.random.seed(seed)  # of which TRL draws the order of an epoch
    rate = job["learning_rate"] * job["rate_factors"][learner.done]
    for group in learner.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    schedule = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda _: 1.0)
    first = learner.done * job["rollouts"]
    PPOTrainer(
        args=config_of(job, folder, seed=seed),
        processing_class=tokenizer,
        model=learner.policy,
        ref_model=reference,
        reward_model=reward,
        value_model=learner.value,
        train_dataset=Dataset.from_dict({"input_ids": job["prompt_ids"][first : first + job["rollouts"]]}),
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(learner.optimizer, schedule),
        callbacks=[SaveMetrics(folder / "history.jsonl", learner.done + 1)],
    ).train()


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = Path(sys.argv[1])
    job, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
    tokenizer = AutoTokenizer.from_pretrained(job["sft_model"], padding_side="left", trust_remote_code=False)
    # A stop token pads, because no response can contain one.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(job["stop_ids"][0])
    learner, reference, reward = Learner(job, folder), load_policy(job), load_scalar(job)
    for number in range(learner.done + 1, job["iterations"] + 1):
        iterate(job, folder, learner, tokenizer, reference, reward)
        if number % job["every"] == 0:
            learner.save_policy(folder / f"iteration-{number:02d}")
        learner.save()


if __name__ == "__main__":
    main()
