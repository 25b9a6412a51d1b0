"""The four models, in memory once where they are the same."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from components.ppo.experience import Models
from components.rlhf.config.ppo import PpoStage
from components.rlhf.data.lengths import longest_prompt
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.choose import place_frozen, shards_weights
from components.rlhf.engine.group import ALONE
from components.rlhf.engine.protocol import Group
from components.rlhf.models.actor import Actor
from components.rlhf.models.layers import checkpoint_layers, share_trunk
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm, normalisation_of, stop_ids_of
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.precision import default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.probe import PROBE_TOKENS
from components.rlhf.rollout.protocol import RolloutEngine


def load_models(
    stage: PpoStage,
    sft_model: Path,
    reward_model: Path,
    *,
    dtype: torch.dtype,
    prompts: Sequence[Prompt],
    group: Group = ALONE,
) -> tuple[Models, RolloutEngine]:
    """Actor and reference from the fine-tuned model, critic and reward model from the reward model, and the rollout engine.

    The frozen layers are held once by all of them when they are equal in the two artifacts. With adapters the reference is the
    actor without its own, and the reward model the critic without its own (under its own head): no copies of the weights.
    Under ZeRO-3 the models that are not trained are sharded like the others; actor and critic are, by their engines.
    """
    device = default_device()
    frozen, lora = stage.model.num_frozen_layers, stage.model.lora
    critic_trains = stage.ppo.critic.trains
    actor_lm = load_causal_lm(sft_model, num_frozen_layers=frozen, dtype=dtype, trainable=lora is None)
    # In the actor's own precisions, so that before the first update their log-probs are equal to the last bit.
    reference_lm = (
        actor_lm if lora else load_causal_lm(sft_model, num_frozen_layers=frozen, dtype=dtype).requires_grad_(False)
    )
    reward_lm = load_scalar_lm(reward_model, num_frozen_layers=frozen, dtype=dtype, trainable=False)
    critic_lm = (
        with_own_head(reward_lm)
        if lora or critic_trains == "head"
        else load_scalar_lm(reward_model, num_frozen_layers=frozen, dtype=dtype)
    )
    if lora:
        add_adapters(actor_lm, lora, num_frozen_layers=frozen, seed=stage.seed)
        if critic_trains == "layers":
            add_adapters(critic_lm, lora, num_frozen_layers=frozen, seed=stage.seed)
    copies = [] if lora else [reference_lm]
    rollout_lm = None
    if stage.ppo.rollout.engine == "hf":
        rollout_lm = load_causal_lm(sft_model, num_frozen_layers=frozen, dtype=dtype, trainable=False)
        copies.append(rollout_lm)
    everyone = [*copies, reward_lm] + ([] if critic_lm.base_model is reward_lm.base_model else [critic_lm])
    shared = share_trunk(actor_lm, everyone, frozen)
    if not shared and frozen:
        share_trunk(actor_lm, copies, frozen)
    training = stage.ppo.training
    if training.gradient_checkpointing:
        for lm in [actor_lm] + ([critic_lm] if critic_trains == "layers" else []):
            checkpoint_layers(lm)
    if not shards_weights(training):
        for lm in (actor_lm, critic_lm):
            lm.to(device)
    mean, std = normalisation_of(reward_model) if stage.ppo.normalize_reward else (0.0, 1.0)
    scale = {"mean": mean, "std": std}
    models = Models(
        actor=Actor(actor_lm, num_frozen_layers=frozen, dtype=dtype),
        reference=Actor(reference_lm, num_frozen_layers=frozen, dtype=dtype, with_adapters=False),
        critic=ScalarModel(critic_lm, num_frozen_layers=frozen, dtype=dtype, trains=critic_trains, **scale),
        reward_model=ScalarModel(reward_lm, num_frozen_layers=frozen, dtype=dtype, with_adapters=False, **scale),
        shared_trunk=shared,
    )
    for model in (models.reference, models.reward_model):
        place_frozen(model, training, group=group, dtype=dtype, device=device)
    return models, _rollout_engine(stage, sft_model, rollout_lm, prompts, dtype=dtype)


def _rollout_engine(
    stage: PpoStage, sft_model: Path, lm: nn.Module | None, prompts: Sequence[Prompt], *, dtype: torch.dtype
) -> RolloutEngine:
    """transformers on lm where there is one; else vLLM, which loads the model itself, for the longest of the prompts."""
    tokenizer, stop_ids = load_tokenizer(sft_model), stop_ids_of(sft_model)
    if lm is not None:
        return HfRolloutEngine(lm.to(default_device()), tokenizer, stop_ids=stop_ids)
    from components.rlhf.rollout.vllm import VllmRolloutEngine

    sampling = stage.ppo.rollout.sampling
    return VllmRolloutEngine(
        sft_model,
        stage.ppo.rollout.vllm,
        stop_ids=stop_ids,
        dtype=dtype,
        max_model_len=max(longest_prompt(prompts, tokenizer), PROBE_TOKENS) + sampling.max_new_tokens,
        num_sequences=sampling.batch_size,
    )


def with_own_head(lm: nn.Module) -> nn.Module:
    """A model that shares every module of lm but the head, which is its own, in fp32 and trainable."""
    twin = copy.copy(lm)
    twin._modules = dict(lm._modules)
    twin.score = copy.deepcopy(lm.score).float().requires_grad_(True)
    return twin
