"""Loading the four models, sharing in memory what is equal."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.ppo.experience import Models
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.factory import max_over_shards, prepare_frozen_model, trained_dtype, weight_shards
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.models.actor import Actor
from components.rlhf.models.layers import enable_gradient_checkpointing, share_trunk
from components.rlhf.models.loading import (
    is_scored_as_text,
    load_causal_lm,
    load_reference_lm,
    load_scalar_lm,
    reward_normalization,
)
from components.rlhf.models.lora import adapted_modules, add_adapters
from components.rlhf.models.precision import default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rewards.reward_model import RewardModelScorer
from components.rlhf.rewards.text import TextScorer
from components.rlhf.rollout.factory import create_rollout_engine
from components.rlhf.rollout.protocol import RolloutEngine


def load_models(
    config: PpoStageConfig,
    sft_model: Path,
    reward_model: Path,
    *,
    dtype: torch.dtype,
    prompts: Sequence[Prompt],
    group: Group = SINGLE_PROCESS,
) -> tuple[Models, RolloutEngine]:
    """Actor and reference from the SFT model, critic and reward model from the reward model, and the rollout engine.

    With a reward model that has a tokenizer of its own, the critic starts from the SFT model with a new head.

    All models share the frozen layers if these are equal in both artifacts. With adapters the reference is the actor with its
    adapters disabled, and the reward model is the critic with its adapters disabled and its own head, without copies of the
    weights, in 4 bits with model.lora.quantization. Under ZeRO-3 each weight of every model is sharded as soon as it is read.
    """
    device, training = default_device(), config.ppo.training
    frozen, lora, quantization = config.model.num_frozen_layers, config.model.lora, config.model.quantization
    critic_trains = config.ppo.critic.trains
    # Each model goes to its device, precision and shards before the next one is read.
    place: dict[str, Any] = dict(dtype=dtype, device=device, shard=weight_shards(training, group=group, dtype=dtype))
    trained = place | {"trained_dtype": trained_dtype(training, dtype)}
    actor_lm = load_causal_lm(
        sft_model, num_frozen_layers=frozen, trainable=lora is None, quantization=quantization, **trained
    )
    if lora:
        reference_lm = actor_lm
    elif training.engine == "torch":
        reference_lm = load_reference_lm(sft_model, num_frozen_layers=frozen, dtype=dtype, device=device)
    else:
        reference_lm = load_causal_lm(sft_model, num_frozen_layers=frozen, trainable=False, **place)
    as_text = is_scored_as_text(reward_model)
    reward_frozen = 0 if as_text else frozen
    reward_lm = load_scalar_lm(
        reward_model, num_frozen_layers=reward_frozen, trainable=False, quantization=quantization, **place
    )
    # A critic reads the actor's ids: it cannot start from a reward model with other ids, so it gets the SFT model and a new head.
    critic_source, seed = (sft_model, config.seed) if as_text else (reward_model, None)
    if lora or critic_trains == "head":
        critic_lm = copy_with_own_head(
            load_scalar_lm(
                critic_source,
                num_frozen_layers=frozen,
                trainable=False,
                seed=seed,
                quantization=quantization,
                **place,
            )
            if as_text
            else reward_lm
        )
    else:
        critic_lm = load_scalar_lm(critic_source, num_frozen_layers=frozen, seed=seed, **trained)
    if lora:
        add_adapters(actor_lm, lora, num_frozen_layers=frozen, seed=config.seed)
        if critic_trains == "layers":
            add_adapters(critic_lm, lora, num_frozen_layers=frozen, seed=config.seed)
    copies = [] if lora else [reference_lm]
    rollout_lm = None
    if config.ppo.rollout.engine == "hf":
        rollout_lm = actor_lm if samples_from_actor(config, dtype) else None
        if rollout_lm is None:
            rollout_lm = load_causal_lm(sft_model, num_frozen_layers=0, dtype=dtype, trainable=False, device=device)
            copies += [] if quantization else [rollout_lm]  # it samples from whole weights, which sync() copies
    all_lms = [*copies] + ([] if as_text else [reward_lm])
    all_lms += [] if critic_lm.base_model is reward_lm.base_model else [critic_lm]
    shared = share_trunk(actor_lm, all_lms, frozen)
    if not shared and frozen:
        share_trunk(actor_lm, copies, frozen)
    if training.gradient_checkpointing:
        for lm in [actor_lm] + ([critic_lm] if critic_trains == "layers" else []):
            enable_gradient_checkpointing(lm)
    mean, std = reward_normalization(reward_model) if config.ppo.normalize_reward else (0.0, 1.0)
    normalization = {"mean": mean, "std": std}
    max_over_ranks = max_over_shards(training, group)
    reward_scalar = ScalarModel(
        reward_lm, num_frozen_layers=reward_frozen, dtype=dtype, with_adapters=False, **normalization
    )
    scorer: Scorer = RewardModelScorer(
        reward_scalar, microbatch_tokens=training.microbatch_tokens, max_over_ranks=max_over_ranks
    )
    if as_text:
        scorer = TextScorer(scorer, load_tokenizer(reward_model))
    models = Models(
        actor=Actor(actor_lm, num_frozen_layers=frozen, dtype=dtype, max_over_ranks=max_over_ranks),
        reference=Actor(
            reference_lm, num_frozen_layers=frozen, dtype=dtype, with_adapters=False, max_over_ranks=max_over_ranks
        ),
        critic=ScalarModel(
            critic_lm,
            num_frozen_layers=frozen,
            dtype=dtype,
            trains=critic_trains,
            **({} if as_text else normalization),
        ),
        reward_model=reward_scalar,
        scorer=scorer,
        shared_trunk=shared,
    )
    for model in (models.reference, models.reward_model):
        prepare_frozen_model(model, training, group=group, dtype=dtype)
    rollout = config.ppo.rollout
    engine = create_rollout_engine(
        sft_model,
        rollout,
        rollout.sampling,
        prompts,
        dtype=dtype,
        lm=rollout_lm,
        lora_rank=config.model.lora.rank if config.model.lora else 0,
        adapted_modules=adapted_modules(actor_lm),
    )
    return models, engine


def samples_from_actor(config: PpoStageConfig, dtype: torch.dtype) -> bool:
    """Whether the engine hf samples from the actor's own weights: they are whole in this process, and in the precision to sample in."""
    training = config.ppo.training
    # transformers keeps no cache in layers that are checkpointed; adapters would have to be merged.
    is_plain = training.engine == "torch" and not training.gradient_checkpointing and config.model.lora is None
    return is_plain and dtype == torch.float32


def copy_with_own_head(lm: nn.Module) -> nn.Module:
    """A model that shares every module of lm except the head, which is a trainable copy in fp32."""
    twin = copy.copy(lm)
    twin._modules = dict(lm._modules)
    twin.score = copy.deepcopy(lm.score).float().requires_grad_(True)
    return twin
