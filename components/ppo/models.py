"""Loading the four models, sharing in memory what is equal."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    training, max_over_ranks = config.ppo.training, max_over_shards(config.ppo.training, group)
    lms = _load_language_models(config, sft_model, reward_model, dtype=dtype, group=group)
    shared = _share_layers(lms, config)
    if training.gradient_checkpointing:
        enable_gradient_checkpointing(lms.actor)
        if lms.critic is not None and config.ppo.critic.trains == "layers":
            enable_gradient_checkpointing(lms.critic)
    frozen, normalization = config.model.num_frozen_layers, _normalization(config, reward_model)
    actors: dict[str, Any] = dict(num_frozen_layers=frozen, dtype=dtype, max_over_ranks=max_over_ranks)
    critic = reward_scalar = scorer = None
    if lms.critic is not None:
        critic = ScalarModel(
            lms.critic,
            num_frozen_layers=frozen,
            trains=config.ppo.critic.trains,
            dtype=dtype,
            **({} if lms.twin is None else normalization),
        )
    if lms.reward_model is not None and reward_model is not None:
        own_layers = 0 if lms.twin is None else frozen
        reward_scalar = ScalarModel(
            lms.reward_model, num_frozen_layers=own_layers, with_adapters=False, dtype=dtype, **normalization
        )
        scorer = _scorer_of(reward_scalar, reward_model, config, max_over_ranks)
    models = Models(
        actor=Actor(lms.actor, **actors),
        reference=Actor(lms.reference, with_adapters=False, **actors),
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
        config.ppo.longest_sampling,
        prompts,
        dtype=dtype,
        lm=lms.rollout,
        lora_rank=config.model.lora.rank if config.model.lora else 0,
        adapted_modules=adapted_modules(lms.actor),
    )
    return models, engine


@dataclass(frozen=True, kw_only=True)
class _LanguageModels:
    """The models of PPO as transformers has them."""

    actor: Any
    reference: Any  # the actor itself, with adapters
    reward_model: Any | None
    twin: Any | None  # the reward model, if the critic can start from it: it reads the actor's ids
    critic: Any | None
    rollout: Any | None  # what the engine hf samples from: the actor itself, or a copy


def _load_language_models(
    config: PpoStageConfig, sft_model: Path, reward_model: Path | None, *, dtype: torch.dtype, group: Group
) -> _LanguageModels:
    """Each model goes to its device, precision and shards before the next one is read."""
    device, training = default_device(), config.ppo.training
    frozen, lora, quantization = config.model.num_frozen_layers, config.model.lora, config.model.quantization
    place: dict[str, Any] = dict(dtype=dtype, device=device, shard=weight_shards(training, group=group, dtype=dtype))
    trained = place | {"trained_dtype": trained_dtype(training, dtype)}
    actor = load_causal_lm(
        sft_model, num_frozen_layers=frozen, trainable=lora is None, quantization=quantization, **trained
    )
    if lora:
        reference = actor
    elif training.engine == "torch":
        reference = load_reference_lm(sft_model, num_frozen_layers=frozen, dtype=dtype, device=device)
    else:
        reference = load_causal_lm(sft_model, num_frozen_layers=frozen, trainable=False, **place)
    reward = twin = critic = rollout = None
    if reward_model is not None:
        as_text = is_scored_as_text(reward_model)
        layers = 0 if as_text else frozen
        reward = load_scalar_lm(
            reward_model, num_frozen_layers=layers, trainable=False, quantization=quantization, **place
        )
        twin = None if as_text else reward
    if config.ppo.advantage == "gae":
        # A critic that cannot start from the reward model gets the SFT model and a new head.
        source, seed = (sft_model, config.seed) if twin is None or reward_model is None else (reward_model, None)
        critic = _load_critic(config, source, twin, seed=seed, place=place, trained=trained)
    if lora:
        add_adapters(actor, lora, num_frozen_layers=frozen, seed=config.seed)
        if critic is not None and config.ppo.critic.trains == "layers":
            add_adapters(critic, lora, num_frozen_layers=frozen, seed=config.seed)
    if config.ppo.rollout.engine == "hf":
        rollout = actor
        if not samples_from_actor(config, dtype):
            rollout = load_causal_lm(sft_model, num_frozen_layers=0, dtype=dtype, trainable=False, device=device)
    return _LanguageModels(
        actor=actor, reference=reference, reward_model=reward, twin=twin, critic=critic, rollout=rollout
    )


def _share_layers(lms: _LanguageModels, config: PpoStageConfig) -> bool:
    """Let all models that compute with the actor's ids hold its frozen layers, if they are equal; whether they do."""
    frozen = config.model.num_frozen_layers
    copies = [] if config.model.lora else [lms.reference]
    if lms.rollout not in (None, lms.actor) and not config.model.quantization:
        copies.append(lms.rollout)  # it samples from whole weights, which sync() copies
    others = copies + ([] if lms.twin is None else [lms.twin])
    if lms.critic is not None and (
        lms.reward_model is None or lms.critic.base_model is not lms.reward_model.base_model
    ):
        others.append(lms.critic)
    shared = share_trunk(lms.actor, others, frozen)
    if not shared and frozen:
        share_trunk(lms.actor, copies, frozen)  # they start from one artifact
    return shared


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
