"""The cases of test_sharding.py: `torchrun -m tests.support.sharding_cases FOLDER MODELS`.

The models are large enough that ZeRO-3 shards their matrices, and the head is applied in pieces of PIECE tokens, so that ranks with
different texts need different numbers of pieces.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from components.ppo.experience import Learner, make_experience
from components.ppo.models import load_models
from components.ppo.trainer import local_rows
from components.ppo.update import update
from components.reward_model.trainer import RewardModelTrainer
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.data.microbatches import local_microbatches
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.factory import create_engine, max_over_shards, shards_weights
from components.rlhf.engine.group import SINGLE_PROCESS, join_process_group
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.losses import aggregate
from components.rlhf.models import actor as actor_module
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_causal_lm
from tests.support.engine_cases import BF16, FP32, Numbers, placed, training_of, whole_weights
from tests.support.ppo_runs import completion, config_of, make_reward_model, rewards_of
from tests.support.reward_model_runs import PAIRS
from tests.support.reward_model_runs import config_of as reward_config_of
from tests.support.tiny_model import make_tiny_tokenizer
from tests.support.training import Recorder, context_of

NUM_RANKS = 2
PIECE = 3  # tokens that the head is applied to at once
MAX_TOKENS = 20
SIZES = dict(
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.1,
)
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.1)
ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "untied": lambda **ids: LlamaConfig(**SIZES, **ids, tie_word_embeddings=False),
    "tied": lambda **ids: Qwen2Config(**SIZES, **ids, tie_word_embeddings=True),
    "mixtral": lambda **ids: MixtralConfig(**SIZES, **EXPERTS, **ids, num_local_experts=6),
    "qwen3_moe": lambda **ids: Qwen3MoeConfig(**SIZES, **EXPERTS, **ids, num_experts=6, moe_intermediate_size=64),
    # Calls a module once per expert that any token is routed to, so a different number of times on each rank.
    "dbrx": lambda **ids: DbrxConfig(
        **ids,
        d_model=128,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        initializer_range=0.1,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 6, "moe_top_k": 2, "moe_loss_weight": 0.1},
    ),
    # Adds a bias of experts outside of the forward pass of the module that owns it.
    "jetmoe": lambda **ids: JetMoeConfig(
        **SIZES, **ids, kv_channels=32, num_local_experts=6, num_experts_per_tok=2, aux_loss_coef=0.1
    ),
}

# (prompt, response) ids. Rank 0 has more response tokens in the first batch, rank 1 has none in the second, and in the third rank 0 has
# fewer texts than rank 1, so that it repeats one with weight 0.
BATCHES: list[list[tuple[list[int], list[int]]]] = [
    [([5, 6, 7], list(range(60, 74))), ([12], [13]), ([15, 16], list(range(80, 91))), ([18, 19, 20], [21, 22])],
    [([31, 32], list(range(90, 100))), ([36, 7, 8], [])],
    [([51, 52], list(range(100, 112))), ([50, 41], [42]), ([7, 8], list(range(120, 130)))],
]
# Of one rollout, in two minibatches of four; the first two rows of each belong to rank 0.
ROLLOUT: list[tuple[list[int], list[int]]] = [
    ([5, 6, 7], list(range(60, 75))), ([9], list(range(30, 42))), ([15, 16], [81]), ([18, 19, 20], [21, 0]),
    ([31, 32], list(range(90, 103))), ([36], list(range(40, 47))), ([41], [42, 43, 44]), ([44, 45], [46]),
]  # fmt: skip
MINIBATCH = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    kind: str  # "language": steps of fine-tuning; "reward": of a reward model; "ppo": scoring and updates of a rollout
    zero_stage: int
    dtype: torch.dtype
    gradient_checkpointing: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.model, self.kind, f"zero{self.zero_stage}", str(self.dtype).removeprefix("torch.")]
        object.__setattr__(self, "name", "-".join(parts + ["checkpointing"] * self.gradient_checkpointing))


CASES = [
    *(
        Case(model="untied", kind=kind, zero_stage=stage, dtype=dtype)
        for kind in ("language", "ppo")
        for stage in (1, 2, 3)
        for dtype in (FP32, BF16)
    ),
    *(
        Case(model="untied", kind=kind, zero_stage=3, dtype=dtype, gradient_checkpointing=True)
        for kind in ("language", "ppo")
        for dtype in (FP32, BF16)
    ),
    *(
        Case(model=model, kind=kind, zero_stage=3, dtype=dtype, gradient_checkpointing=model == "mixtral")
        for model in ("tied", "mixtral", "qwen3_moe")
        for kind in ("language", "ppo")
        for dtype in (FP32, BF16)
    ),
    *(
        Case(model=model, kind=kind, zero_stage=3, dtype=FP32)
        for model in ("dbrx", "jetmoe")
        for kind in ("language", "ppo")
    ),
    *(Case(model=model, kind="language", zero_stage=2, dtype=FP32) for model in ("mixtral", "qwen3_moe")),
    *(Case(model="untied", kind="reward", zero_stage=stage, dtype=FP32) for stage in (1, 2, 3)),
    Case(model="untied", kind="reward", zero_stage=3, dtype=FP32, gradient_checkpointing=True),
]


def make_models(folder: Path) -> None:
    """Write a random model of each architecture, and a reward model on its layers."""
    tokenizer = make_tiny_tokenizer()
    ids = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=0)
    for number, (name, config) in enumerate(ARCHITECTURES.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            AutoModelForCausalLM.from_config(config(**ids), dtype=FP32).save_pretrained(folder / name / "sft")
        tokenizer.save_pretrained(folder / name / "sft")
        make_reward_model(folder / name / "sft", folder / name / "reward")


def run(case: Case, models: Path, group: Group = SINGLE_PROCESS) -> tuple[Numbers, dict[str, Tensor]]:
    """Numbers of each optimizer step and the trained weights: of all ranks, or of plain torch in one process."""
    engine = "torch" if group.world_size == 1 else "deepspeed"
    changes = {"zero_stage": case.zero_stage, "gradient_checkpointing": case.gradient_checkpointing}
    changes |= {"engine": engine, "num_processes": group.world_size}
    steps = {"language": language_steps, "reward": reward_steps, "ppo": ppo_steps}[case.kind]
    numbers, modules = steps(models / case.model, changes, case.dtype, group)
    weights = {}
    for name, trained in modules.items():
        require_shards(trained.module, is_sharded=engine == "deepspeed" and case.zero_stage == 3)
        weights |= {f"{name}.{key}": weight for key, weight in whole_weights(trained).items()}
    return numbers, weights


def language_steps(
    folder: Path, changes: dict[str, Any], dtype: torch.dtype, group: Group
) -> tuple[Numbers, dict[str, TrainEngine]]:
    """As SFT: one process takes the microbatches of both ranks in turn, so that the router's loss is of the same tokens."""
    training = training_of(**changes)
    lm = load_causal_lm(folder / "sft", num_frozen_layers=0, **placed(training, dtype, group))
    if training.gradient_checkpointing:
        enable_gradient_checkpointing(lm)
    actor = Actor(lm, num_frozen_layers=0, dtype=dtype, max_over_ranks=max_over_shards(training, group))
    engine = create_engine(actor, training, num_steps=4, group=group, dtype=dtype)
    return [language_step(actor, engine, batch, group) for batch in BATCHES], {"actor": engine}


def reward_steps(
    folder: Path, changes: dict[str, Any], dtype: torch.dtype, group: Group
) -> tuple[Numbers, dict[str, TrainEngine]]:
    """The stage's own training, with several forward passes to a backward pass, and a last step with less pairs than ranks."""
    training = {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "microbatch_tokens": 40,
        **changes,
    }
    context = replace(context_of("reward_model"), group=group)
    trainer = RewardModelTrainer(reward_config_of(training=training, num_epochs=1), folder / "sft", context)
    if group.world_size > 1:
        trainer.model.pack_limit = 8  # some texts are packed, and others padded
    trainer.train(load_tokenizer(folder / "sft"), PAIRS, max_tokens=64)
    assert trainer.engine is not None and isinstance(context.tracker, Recorder)
    names = ("loss", "accuracy", "grad_norm")
    numbers = [{name: row[f"train/{name}"] for name in names} for row in context.tracker.rows.values()]
    return numbers, {"actor": trainer.engine}


def language_step(
    actor: Actor, engine: TrainEngine, batch: Sequence[tuple[list[int], list[int]]], group: Group
) -> dict[str, float]:
    denominator = sum(len(response) for _, response in batch)
    parts = list(microbatches_of([len(prompt) + len(response) for prompt, response in batch], group))
    totals = torch.zeros(2)
    for number, (rows, weight) in enumerate(parts, start=1):
        tokens = collate([batch[i][0] for i in rows], [batch[i][1] for i in rows])
        logprobs, _ = actor(tokens, SamplingDistribution(temperature=0.7))
        loss = weight * aggregate(-logprobs, tokens.response_mask, "token-mean", denominator)
        router = torch.zeros(()) if actor.router_loss is None else weight * len(rows) / len(batch) * actor.router_loss
        totals += torch.stack([loss.detach(), router.detach().float()])
        engine.backward(loss + router, last=number == len(parts))
    loss, router = group.sum(totals).tolist()
    return {"loss": loss, "router_loss": router, "grad_norm": engine.step().grad_norm}


def microbatches_of(lengths: list[int], group: Group) -> Iterator[tuple[list[int], float]]:
    """The microbatches (indices, weight) of this rank, or of both ranks in one process."""
    if group.world_size > 1:
        yield from local_microbatches(
            lengths, MAX_TOKENS, rank=group.rank, world_size=NUM_RANKS, max_over_ranks=group.max_int
        )
        return
    for rank in range(NUM_RANKS):
        yield from local_microbatches(lengths, MAX_TOKENS, rank=rank, world_size=NUM_RANKS, max_over_ranks=int)


def ppo_config(changes: dict[str, Any]) -> PpoStageConfig:
    return config_of(
        minibatch=MINIBATCH,
        sampling={"temperature": 0.7, "min_new_tokens": 1, "max_new_tokens": 15},
        training={
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "microbatch_tokens": 40,
            **changes,
        },
    )


def ppo_steps(
    folder: Path, changes: dict[str, Any], dtype: torch.dtype, group: Group
) -> tuple[Numbers, dict[str, TrainEngine]]:
    """As PPO: two iterations on the same rollout, each with two optimizer steps.

    One process takes the rows of each rank in a pass of their own, so that the router's loss is of the same tokens.
    """
    config = ppo_config(changes)
    models, _ = load_models(config, folder / "sft", folder / "reward", dtype=dtype, prompts=[], group=group)
    engines = {
        name: create_engine(module, config.ppo.training, num_steps=4, group=group, dtype=dtype)
        for name, module in (("actor", models.actor), ("critic", models.critic))
    }
    for frozen in (models.reference, models.reward_model):
        require_shards(frozen, is_sharded=shards_weights(config.ppo.training))
    learner = Learner(
        models=models,
        rewards=rewards_of(models),
        config=config.ppo,
        distribution=SamplingDistribution(temperature=0.7, min_new_tokens=1, stop_ids=(0,)),
        group=group,
        engines=engines,
    )
    rows = local_rows(len(ROLLOUT), MINIBATCH, group)
    numbers = []
    for iteration in (1, 2):
        with mock.patch("components.ppo.experience.plan_minibatches", passes_of_ranks):
            experience = make_experience(learner, [completion(*ROLLOUT[row]) for row in rows], kl_coef=0.1)
        scored = {
            "largest_kl": group.max(experience.kl.abs().max()).item(),
            "logprobs": group.sum(experience.old_logprobs.sum()).item(),
            "entropy": group.sum(experience.entropy.sum()).item(),
            "values": group.sum(experience.old_values.sum()).item(),
            "scores": group.sum(experience.scores.sum()).item(),
        }
        numbers.append(scored | update(learner, experience, seed=0, iteration=iteration))
    return numbers, engines


def passes_of_ranks(order: Sequence[int], batch: TokenBatch, learner: Learner) -> list[list[Tensor]]:
    """One pass for the rows of each rank in a minibatch, in whichever process they are."""
    size = MINIBATCH // NUM_RANKS
    passes = [torch.tensor(order[start : start + size]) for start in range(0, len(order), size)]
    each = NUM_RANKS // learner.group.world_size
    return [passes[start : start + each] for start in range(0, len(passes), each)]


class Experts(nn.Module):
    """Runs one of a list of experts, as models of transformers did before their experts were one module."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        output: Tensor = self.experts[chosen](x)
        return output


def expert_steps(group: Group = SINGLE_PROCESS) -> dict[str, Tensor]:
    """The weights after three steps in which each rank chooses other experts, and one process those of both ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(128, 128), Experts())
        inputs = torch.randn(3, NUM_RANKS, 5, 128)
    name = "torch" if group.world_size == 1 else "deepspeed"
    training = training_of(name, zero_stage=3, num_processes=group.world_size)
    engine = create_engine(module, training, num_steps=4, group=group, dtype=FP32)
    for number, of_ranks in enumerate(inputs):
        ranks = range(NUM_RANKS) if group.world_size == 1 else [group.rank]
        for rank in ranks:
            loss = module[1](module[0](of_ranks[rank]), (number + rank) % 3).square().mean() / NUM_RANKS
            if group.world_size == 1:  # sharded weights that nothing used have the gradient 0, others have none
                loss = loss + 0 * torch.stack([parameter.sum() for parameter in module.parameters()]).sum()
            engine.backward(loss, last=rank == ranks[-1])
        engine.step()
    return whole_weights(engine)


def require_shards(module: nn.Module, *, is_sharded: bool) -> None:
    """Every matrix of the model, with that of the head, is really sharded, or none is."""
    for name, parameter in module.named_parameters():
        if parameter.numel() == 0 or (not is_sharded and parameter.ndim > 1):
            shard = getattr(parameter, "ds_tensor", None)
            assert (shard is not None) == is_sharded, name
            assert shard is None or shard.numel() == -(-parameter.ds_numel // NUM_RANKS), name
    heads = [
        p
        for name, p in module.named_parameters()
        if name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight"))
    ]
    assert heads and all((head.numel() == 0) == is_sharded for head in heads)


def main(folder: Path, models: Path) -> None:
    actor_module.MAX_LOGITS = PIECE * len(make_tiny_tokenizer())
    with join_process_group(timeout_minutes=1) as group:
        weights = expert_steps(group)
        if group.rank == 0:
            save_file(weights, folder / "experts.safetensors")
        for case in CASES:
            group.watchdog(case.name)
            numbers, weights = run(case, models, group)
            if group.rank == 0:
                save_file(weights, folder / f"{case.name}.safetensors")
                (folder / f"{case.name}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
