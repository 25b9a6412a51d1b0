"""Loading the four models, sharing in memory what is equal."""

import copy
from collections.abc import Callable, Sequence
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
    reward_model: Path | None,
    *,
    dtype: torch.dtype,
    prompts: Sequence[Prompt],
    group: Group = SINGLE_PROCESS,
) -> tuple[Models, RolloutEngine]:
    """Actor and reference from the SFT model, critic and reward model from the reward model, and the rollout engine.

    Without a reward model, or with one that has a tokenizer of its own, the critic starts from the SFT model with a new head.
    Estimators without a critic load none.

    All models share the frozen layers if these are equal in both artifacts. With adapters the reference is the actor with its
    adapters disabled, and the reward model is the critic with its adapters disabled and its own head, without copies of the
    weights, in 4 bits with model.lora.quantization. Under ZeRO-3 each weight of every model is sharded as soon as it is read.
    """
    device, training = default_device(), config.ppo.training
    frozen, lora, quantization = config.model.num_frozen_layers, config.model.lora, config.model.quantization
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
    as_text = reward_model is not None and is_scored_as_text(reward_model)
    reward_lm = None
    if reward_model is not None:
        reward_lm = load_scalar_lm(
            reward_model,
            num_frozen_layers=0 if as_text else frozen,
            trainable=False,
            quantization=quantization,
            **place,
        )
    twin = None if as_text else reward_lm
    critic_lm = None
    if config.ppo.advantage == "gae":
        # A critic reads the actor's ids: it cannot start from a reward model with other ids, so it gets the SFT model and a new head.
        source, seed = (sft_model, config.seed) if twin is None or reward_model is None else (reward_model, None)
        critic_lm = _load_critic(config, source, twin, seed=seed, place=place, trained=trained)
    if lora:
        add_adapters(actor_lm, lora, num_frozen_layers=frozen, seed=config.seed)
        if critic_lm is not None and config.ppo.critic.trains == "layers":
            add_adapters(critic_lm, lora, num_frozen_layers=frozen, seed=config.seed)
    copies = [] if lora else [reference_lm]
    rollout_lm = None
    if config.ppo.rollout.engine == "hf":
        rollout_lm = actor_lm if samples_from_actor(config, dtype) else None
        if rollout_lm is None:
            rollout_lm = load_causal_lm(sft_model, num_frozen_layers=0, dtype=dtype, trainable=False, device=device)
            copies += [] if quantization else [rollout_lm]  # it samples from whole weights, which sync() copies
    all_lms = [*copies] + ([] if twin is None else [twin])
    if critic_lm is not None and (reward_lm is None or critic_lm.base_model is not reward_lm.base_model):
        all_lms.append(critic_lm)
    shared = share_trunk(actor_lm, all_lms, frozen)
    if not shared and frozen:
        share_trunk(actor_lm, copies, frozen)
    if training.gradient_checkpointing:
        enable_gradient_checkpointing(actor_lm)
        if critic_lm is not None and config.ppo.critic.trains == "layers":
            enable_gradient_checkpointing(critic_lm)
    normalization = _normalization(config, reward_model)
    max_over_ranks = max_over_shards(training, group)
    reward_scalar, scorer = None, None
    if reward_lm is not None and reward_model is not None:
        reward_scalar = ScalarModel(
            reward_lm, num_frozen_layers=0 if as_text else frozen, with_adapters=False, dtype=dtype, **normalization
        )
        scorer = _scorer_of(reward_scalar, reward_model, config, max_over_ranks)
    critic = None
    if critic_lm is not None:
        critic = ScalarModel(
            critic_lm,
            num_frozen_layers=frozen,
            trains=config.ppo.critic.trains,
            dtype=dtype,
            **({} if twin is None else normalization),
        )
    actors: dict[str, Any] = dict(num_frozen_layers=frozen, dtype=dtype, max_over_ranks=max_over_ranks)
    models = Models(
        actor=Actor(actor_lm, **actors),
        reference=Actor(reference_lm, with_adapters=False, **actors),
        critic=critic,
        reward_model=reward_scalar,
        scorer=scorer,
        shared_trunk=shared,
    )
    for model in (models.reference, models.reward_model):
        if model is not None:
            prepare_frozen_model(model, training, group=group, dtype=dtype)
    engine = create_rollout_engine(
        sft_model,
        config.ppo.rollout,
        config.ppo.rollout.sampling,
        prompts,
        dtype=dtype,
        lm=rollout_lm,
        lora_rank=lora.rank if lora else 0,
        adapted_modules=adapted_modules(actor_lm),
    )
    return models, engine


def _load_critic(
    config: PpoStageConfig,
    source: Path,
    twin: nn.Module | None,
    *,
    seed: int | None,
    place: dict[str, Any],
    trained: dict[str, Any],
) -> nn.Module:
    """A critic from source, with a new head if there is a seed. twin is the reward model of the same folder, if there is one.

    With adapters, or if only the head is trained, it shares all other weights with its twin.
    """
    frozen = config.model.num_frozen_layers
    if config.model.lora is None and config.ppo.critic.trains == "layers":
        return load_scalar_lm(source, num_frozen_layers=frozen, seed=seed, **trained)
    if twin is None:
        twin = load_scalar_lm(
            source,
            num_frozen_layers=frozen,
            trainable=False,
            seed=seed,
            quantization=config.model.quantization,
            **place,
        )
    return copy_with_own_head(twin)


def _normalization(config: PpoStageConfig, reward_model: Path | None) -> dict[str, float]:
    mean, std = (0.0, 1.0)
    if reward_model is not None and config.ppo.normalize_reward:
        mean, std = reward_normalization(reward_model)
    return {"mean": mean, "std": std}


def _scorer_of(
    model: ScalarModel, folder: Path, config: PpoStageConfig, max_over_ranks: Callable[[int], int]
) -> Scorer:
    """The scorer of the reward model, which computes with the ids of a response or with its text, as the folder says."""
    tokens = config.ppo.training.microbatch_tokens
    scorer = RewardModelScorer(model, microbatch_tokens=tokens, max_over_ranks=max_over_ranks)
    return TextScorer(scorer, load_tokenizer(folder)) if is_scored_as_text(folder) else scorer


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
