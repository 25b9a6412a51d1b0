"""What the settings of ppo cannot be together."""

from typing import TYPE_CHECKING

from components.rlhf.config.model import ModelConfig

if TYPE_CHECKING:
    from components.rlhf.config.ppo import PpoConfig


def check_algorithm(ppo: "PpoConfig") -> None:
    """Raise ValueError for settings of the algorithm that contradict each other."""
    from components.rlhf.config.ppo import GROUP_ESTIMATORS, CriticConfig, PpoConfig  # imports this module

    size, processes = ppo.rollout.samples_per_prompt, ppo.training.num_processes
    if ppo.advantage in GROUP_ESTIMATORS:
        if size == 1:
            raise ValueError(
                f"advantage {ppo.advantage} compares the responses to a prompt, but rollout.samples_per_prompt is 1; set it to 2 or more"
            )
        if ppo.minibatch % (size * processes):
            raise ValueError(
                f"minibatch is {ppo.minibatch}, but with advantage {ppo.advantage} each of the {processes} processes "
                f"(training.num_processes) takes all {size} responses (rollout.samples_per_prompt) to a prompt; choose a multiple of "
                f"{size * processes}"
            )
    elif ppo.drop_equal_groups:
        raise ValueError(
            f"drop_equal_groups needs an advantage that compares the responses to a prompt ({', '.join(GROUP_ESTIMATORS)}), and it is "
            f"{ppo.advantage}; set one of them to another value"
        )
    if ppo.advantage != "gae":
        defaults = PpoConfig.model_fields
        unused = [name for name in ("gae_lambda", "value_clip_range") if getattr(ppo, name) != defaults[name].default]
        unused += ["critic"] * (ppo.critic != CriticConfig())
        if unused:
            raise ValueError(
                f"{unused[0]} is set, but advantage {ppo.advantage} has no critic; remove it, or set advantage to gae"
            )
    if ppo.critic.warmup_iterations >= ppo.num_iterations:
        raise ValueError(
            f"critic.warmup_iterations is {ppo.critic.warmup_iterations}, but must be below num_iterations, {ppo.num_iterations}: "
            "the actor would never be trained"
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        raise ValueError(
            "kl_estimator is k1, whose gradient in the loss (kl_in) is zero on average; set kl_estimator to k2 or k3"
        )
    if ppo.policy_ratio == "cispo" and ppo.dual_clip is not None:
        raise ValueError("dual_clip does nothing with policy_ratio cispo, which clips every ratio; set it to null")
    if ppo.reference.decay and not ppo.reference.update_every:
        raise ValueError(
            "reference.decay is set, but reference.update_every is 0, so the reference never moves; set it above 0"
        )
    if ppo.reference.update_every:
        compared = {"keep": ppo.keeps_best, "patience": ppo.patience > 0, "guard": ppo.guard.action != "off"}
        for name in (name for name, is_on in compared.items() if is_on):
            advice = {"keep": "set keep to last", "patience": "set patience to 0", "guard": "set guard.action to off"}[
                name
            ]
            raise ValueError(
                f"{name} compares policies by their KL to the SFT model, which a reference that moves (reference.update_every) no longer "
                f"measures; {advice}, or update_every to 0"
            )
    if ppo.rejection is not None and ppo.old_logprobs == "engine":
        raise ValueError(
            "rejection compares the log-probs of trainer and engine; with old_logprobs engine they are the same, so set it to null"
        )
    if ppo.importance_mode != "truncate" and ppo.importance_clip is None:
        raise ValueError("importance_mode needs bounds; set importance_clip, such as [0.5, 5]")


def check_values(ppo: "PpoConfig") -> None:
    """Raise ValueError for settings that are out of range together."""
    if ppo.patience and not ppo.eval_every:
        raise ValueError("patience counts evaluations on the validation prompts; set eval_every above 0")
    if ppo.keep == "best" and not ppo.eval_every:
        raise ValueError("keep is best, which evaluations on the validation prompts find; set eval_every above 0")
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        raise ValueError("kl_target adapts kl_coef by factors, and kl_coef is 0; set it above 0, or kl_target to null")
    if ppo.dual_clip is not None and ppo.dual_clip <= 1:
        raise ValueError(f"dual_clip is {ppo.dual_clip}, but must be above 1")
    if ppo.clip_range_high is not None and ppo.clip_range_high < ppo.clip_range:
        raise ValueError("clip_range_high is below clip_range; raise it, or set it to null")
    if ppo.importance_clip is not None and ppo.old_logprobs == "engine":
        raise ValueError(
            "importance_clip corrects for the difference between the log-probs of trainer and engine; "
            "with old_logprobs engine there is none, so set it to null"
        )
    if ppo.importance_clip is not None and ppo.importance_clip[0] > ppo.importance_clip[1]:
        low, high = ppo.importance_clip
        raise ValueError(f"importance_clip is [{low}, {high}], with the lower bound above the upper bound; swap them")


def check_reference(model: ModelConfig, ppo: "PpoConfig") -> None:
    """Raise ValueError for a reference that should move but has no weights of its own in every process."""
    if not ppo.reference.update_every:
        return
    if model.lora is not None:
        raise ValueError(
            "ppo.reference.update_every moves the reference, which with model.lora is the actor without its adapters; set it to 0"
        )
    if ppo.training.engine == "deepspeed" and ppo.training.zero_stage == 3:
        raise ValueError(
            "ppo.reference.update_every needs the whole reference in every process, which zero_stage 3 shards; set it to 0, or "
            "zero_stage to 2"
        )
