"""The models of the stage ppo in one process: which have weights of their own, and which share those of another."""

from dataclasses import dataclass, replace

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.planner.copies import NO_COPY, TrainedCopy, frozen_copy, shards_weights, trained_copy
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.training_stages import base_bytes, model_copy


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The models of PPO in one process. Frozen layers are counted once, in the actor, if all models share them."""

    actor: TrainedCopy
    critic: TrainedCopy  # NO_COPY for estimators without one
    critic_base: int  # frozen weights of a critic that it does not share with a reward model
    reference: int
    reward_model: int  # 0 in a run without one
    rollout: int  # the copy that transformers samples from; 0 if it is the actor


def ppo_copies(config: PpoStageConfig, job: Job) -> Copies:
    """ppo/models.py: which models have weights of their own, and which share those of another."""
    training, model, numeric = config.ppo.training, config.model, job.numeric
    shape, reward = job.shape, job.reward_shape
    shared = shape.frozen(model.num_frozen_layers)
    # Adapters of the SFT model are below those of the actor, and those of the reward model above them, below the critic's.
    actor = model_copy(shape, model, training, job, scalar=False, earlier=1)
    critic, critic_base = _critic(config, job) if config.ppo.advantage == "gae" else (NO_COPY, 0)
    reward_held = 0 if reward is None else _frozen_scalar(reward, config, job, earlier=2)
    reference = 0
    if model.lora is None:
        own = shape.total - shared
        reference = _reference(own, shape.embeddings + shape.rest - shape.frozen(0), config, job)
        if config.ppo.reference.decay and numeric.bf16:
            reference += 4 * own  # the moving average is in fp32
    samples_from_actor = (
        training.engine == "torch" and not training.gradient_checkpointing and model.lora is None and not numeric.bf16
    )
    needs_copy = config.ppo.rollout.engine == "hf" and not samples_from_actor
    own_rollout = shape.total - (0 if shards_weights(training) or model.quantization else shared)
    rollout = frozen_copy(own_rollout, None, numeric) if needs_copy else 0
    return Copies(
        actor=actor,
        critic=critic,
        critic_base=critic_base,
        reference=reference,
        reward_model=reward_held,
        rollout=rollout,
    )


def _critic(config: PpoStageConfig, job: Job) -> tuple[TrainedCopy, int]:
    """The critic, and the frozen weights below it that neither actor nor reward model hold.

    One that starts from the reward model shares the weights below its adapters or its head with it.
    """
    training, model, shape = config.ppo.training, config.model, job.critic_shape
    has_twin = shape is job.reward_shape
    earlier = 2 if has_twin else 1
    base = 0 if has_twin else _frozen_scalar(shape, config, job, earlier=earlier)
    if config.ppo.critic.trains == "head":
        return trained_copy(shape.hidden, 0, shape.hidden, training, job.numeric), base
    critic = model_copy(shape, model, training, job, scalar=True, earlier=earlier)
    if shards_weights(training):
        return critic, 0
    if model.lora:
        held = base_bytes(shape, model, job, scalar=True, earlier=earlier)
        return replace(critic, weights=critic.weights - held), base
    shared = _frozen_like_actor(shape, config, job)
    return replace(critic, weights=critic.weights - job.numeric.width * shared), 0


def _frozen_scalar(shape: ModelShape, config: PpoStageConfig, job: Job, *, earlier: int) -> int:
    """Bytes of a model with a scalar head that is not trained, without the frozen layers that it shares with the actor."""
    if config.model.lora:
        return base_bytes(shape, config.model, job, scalar=True, earlier=earlier)
    own = shape.parameters(scalar=True) - _frozen_like_actor(shape, config, job)
    return frozen_copy(own, config.ppo.training, job.numeric)


def _frozen_like_actor(shape: ModelShape, config: PpoStageConfig, job: Job) -> int:
    """Parameters of the frozen layers, if they are those of the actor."""
    return shape.frozen(config.model.num_frozen_layers) if shape is job.shape else 0


def _reference(own: int, in_fp32: int, config: PpoStageConfig, job: Job) -> int:
    """The frozen copy of the actor; with torch and bf16 its embeddings stay in fp32, as the actor's are, unless they are frozen."""
    training = config.ppo.training
    if training.engine == "torch" and job.numeric.bf16 and not config.model.num_frozen_layers:
        return 2 * own + 2 * in_fp32
    return frozen_copy(own, training, job.numeric)
