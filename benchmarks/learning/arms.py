"""What each system is told to do: one JSON file for each process, and the settings that its rows are known by."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.runs import Artifacts, params_of
from benchmarks.peers.environments import OURS, TRL_PPO
from benchmarks.record import settings_digest
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.data.batching import stream_slice
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import encode_prompt, load_tokenizer
from components.rlhf.engine.schedule import learning_rate_at
from components.rlhf.models.loading import load_stop_ids, reward_normalization

Job = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One system with its settings."""

    name: str
    folder: str
    module: str  # program in benchmarks.learning that trains it
    environment: str


SFT = "SFT"  # the start of all systems, measured like them
OURS_ARM = Arm(name="ours", folder="ours", module="ours_ppo", environment=OURS)
TRL = Arm(name="TRL", folder="trl", module="trl_ppo", environment=TRL_PPO)
TRL_OWN = Arm(name="TRL, its defaults", folder="trl-defaults", module="trl_ppo", environment=TRL_PPO)
# Of TRL's PPOConfig and, for the optimizer and a linear decay, of the arguments of transformers.
TRL_DEFAULTS = {
    "epochs": 4,
    "learning_rate": 3e-6,
    "betas": [0.9, 0.999],
    "kl_coef": 0.05,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "gamma": 1.0,
    "gae_lambda": 0.95,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of every seed."""

    num_iterations: int | None  # None: as many as the params file says
    every: int  # iterations between two saved policies
    num_prompts: int  # held-out prompts that each policy answers

    def params(self, seed: int) -> Params:
        return params_of(seed, self.num_iterations)

    def iterations(self, seed: int) -> list[int]:
        return list(range(self.every, self.params(seed).ppo.num_iterations + 1, self.every))


def settings_of(arm: Arm, plan: Plan, seed: int) -> Job:
    """The settings of an arm beside those of the params file, as far as they do not depend on the artifacts of the run."""
    params = plan.params(seed)
    if arm == OURS_ARM:
        return {}
    ppo, sampling = params.ppo, params.ppo.rollout.sampling
    job = {
        "seed": seed,
        "iterations": ppo.num_iterations,
        "rollouts": ppo.rollout.num_prompts,
        "minibatch": ppo.minibatch,
        "epochs": ppo.num_epochs,
        "response": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "num_frozen_layers": params.model.num_frozen_layers,
        "kl_coef": ppo.kl_coef,
        "clip_range": ppo.clip_range,
        "value_clip_range": ppo.value_clip_range,
        "gamma": ppo.gamma,
        "gae_lambda": ppo.gae_lambda,
        "learning_rate": ppo.training.learning_rate,
        "betas": [0.9, 0.95],
        "rate_factors": rate_factors(ppo),
    }
    if arm == TRL:
        return job
    decay = [1 - done / ppo.num_iterations for done in range(ppo.num_iterations)]
    return job | TRL_DEFAULTS | {"minibatch": ppo.rollout.num_prompts, "rate_factors": decay}


def rate_factors(ppo: PpoConfig) -> list[float]:
    """The mean learning rate of each iteration over the peak, because TRL sets the rate once per iteration."""
    steps = ppo.num_epochs * ppo.rollout.num_prompts // ppo.minibatch
    total = steps * ppo.num_iterations
    rates = [learning_rate_at(step, ppo.training, peak=1.0, num_steps=total) for step in range(total)]
    return [round(sum(rates[first : first + steps]) / steps, 6) for first in range(0, total, steps)]


def training_job(arm: Arm, plan: Plan, seed: int, artifacts: Artifacts) -> Job:
    """The argument of the program that trains an arm."""
    folders = artifacts.folders
    sft_model, reward_model = folders["sft_model"], folders["reward_model"]
    job = settings_of(arm, plan, seed) | {"every": plan.every}
    job |= {"sft_model": str(sft_model), "reward_model": str(reward_model)}
    if arm == OURS_ARM:
        job |= {"prompts": str(folders["prompts"]), "seed": seed, "num_iterations": plan.num_iterations}
        return job | {"settings_digest": settings_digest(plan.params(seed))}
    mean, std = reward_normalization(reward_model)
    tokenizer, prompts = load_tokenizer(sft_model), load_records(folders["prompts"], "train", Prompt)
    # The prompts of each iteration of our run; TRL shuffles those of an iteration.
    rows = stream_slice(len(prompts), 0, job["iterations"] * job["rollouts"], seed=seed)
    return job | {
        "stop_ids": list(load_stop_ids(sft_model)),
        "reward_mean": mean,
        "reward_std": std,
        "prompt_ids": [encode_prompt(tokenizer, prompts[row].prompt) for row in rows],
    }


def evaluation_job(arm: Arm, plan: Plan, seed: int, artifacts: Artifacts, samples: Path, policies: list[Job]) -> Job:
    """The argument of the program that measures policies, each with system, iteration and folder.

    It computes as the evaluation stage does, but in fp32 for TRL's defaults: bf16 would round away updates with their learning rate.
    """
    params = plan.params(seed)
    return {name: str(folder) for name, folder in artifacts.folders.items()} | {
        "seed": seed,
        "precision": "fp32" if arm == TRL_OWN else params.model.precision,
        "num_frozen_layers": params.model.num_frozen_layers,
        "num_prompts": plan.num_prompts,
        "sampling": params.ppo.rollout.sampling.model_dump(mode="json"),
        "samples": str(samples),
        "policies": policies,
    }


def row_key(system: str, plan: Plan, seed: int) -> Job:
    """What the rows of a system and seed have in common; others are of other settings."""
    arm = next((arm for arm in (OURS_ARM, TRL, TRL_OWN) if arm.name == system), OURS_ARM)
    settings = [settings_digest(plan.params(seed)), settings_of(arm, plan, seed), plan.num_prompts]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {"seed": seed, "system": system, "settings_digest": digest}


def rows_of(rows: list[Job], plan: Plan, seed: int, start: str | None = None) -> list[Job]:
    """The rows of a seed that have these settings and started from the same models: those of start, or else of the newest row.

    A run that is made again on another machine has other models, whose rows cannot be compared with the earlier ones.
    """
    keys = [row_key(system, plan, seed) for system in (SFT, OURS_ARM.name, TRL.name, TRL_OWN.name)]
    found = [row for row in rows if any(key.items() <= row.items() for key in keys)]
    if start is None and found:
        start = found[-1].get("start")
    return [row for row in found if row.get("start") == start]
