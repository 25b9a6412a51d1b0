"""Token rewards from the score of each response and the KL penalty."""

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    reward_clip: tuple[float, float] | None = None,
) -> Tensor:
    """-kl_coef * kl at every response token, plus the clipped score at the last one; 0 where the mask is False.

    scores [B], kl [B, T], response_mask [B, T] (right-padded, or with gaps) -> [B, T]. Only the score is clipped, not its
    sum with the KL penalty. A negative kl_coef counts as 0. Equal to OpenRLHF v0.5.5 models/utils.py `compute_reward`.
    """
    if reward_clip is not None:
        scores = scores.clamp(*reward_clip)
    rewards = torch.where(response_mask, -max(kl_coef, 0.0) * kl, 0)
    num_actions = response_mask.shape[1]
    columns = torch.arange(num_actions, device=response_mask.device)
    last = torch.where(response_mask, columns, -1).amax(dim=1)  # [B], -1 for a row without a response
    return rewards + torch.where(columns[None, :] == last[:, None], scores[:, None], 0).to(rewards.dtype)
