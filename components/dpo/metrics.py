"""Metrics of a step and of the held-out pairs, as shares of their means; README.md explains each name."""

from torch import Tensor

from components.dpo.losses import Answers, pair_losses, rewards_of
from components.rlhf.config.dpo import DpoConfig

History = list[dict[str, float]]


def pair_metrics(answers: Answers, rewards: Tensor, *, num_pairs: int) -> dict[str, Tensor]:
    """What the pairs of a microbatch (answers and rewards [2N], chosen first) add to the means over num_pairs."""
    chosen, rejected = rewards.chunk(2)
    logprobs = answers.logprobs.detach().chunk(2)
    values = {
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "logprobs/chosen": logprobs[0],
        "logprobs/rejected": logprobs[1],
    }
    return {name: value.sum() / num_pairs for name, value in values.items()}


def answer_metrics(
    answers: Answers, rewards: Tensor, is_desirable: Tensor, threshold: Tensor, *, num_answers: int, num_desirable: int
) -> dict[str, Tensor]:
    """What the labeled answers of a microbatch add to the means over their step; without those of a kind that the step does not have.

    An answer is on the right side if its reward is above the threshold, beta x KL, exactly when it is desirable.
    """
    kinds = {"chosen": (is_desirable, num_desirable), "rejected": (~is_desirable, num_answers - num_desirable)}
    shares = {"accuracy": ((rewards > threshold) == is_desirable).float().sum() / num_answers}
    for kind, (where, count) in kinds.items():
        if count:
            shares[f"rewards/{kind}"] = rewards[where].sum() / count
            shares[f"logprobs/{kind}"] = answers.logprobs.detach()[where].sum() / count
    if 0 < num_desirable < num_answers:
        shares["margin"] = shares["rewards/chosen"] - shares["rewards/rejected"]
    return shares


def heldout_metrics(config: DpoConfig, answers: Answers, kl: Tensor, *, num_pairs: int) -> dict[str, Tensor]:
    """What held-out pairs (answers and kl [2N], chosen first) add to the means over num_pairs."""
    chosen, rejected = rewards_of(config, answers).chunk(2)
    shares = {
        "accuracy": (chosen > rejected).float().sum() / num_pairs,
        "margin": (chosen - rejected).sum() / num_pairs,
    }
    if config.is_paired:
        shares["loss"] = pair_losses(config, answers).sum() / num_pairs
    if config.has_reference:
        shares["kl"] = kl.sum() / (2 * num_pairs)
    return shares


def final_metrics(history: History) -> dict[str, float]:
    """The last row of the history under flat names, for KFP and the manifest."""
    return {name.replace("/", "_"): value for name, value in history[-1].items() if name != "step"}
