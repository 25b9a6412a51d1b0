"""The systems and settings of each comparison. Settings with the same text are the same work."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.peers import chat_lengths
from benchmarks.peers.environments import TRL_NEWEST, TRL_PPO
from benchmarks.peers.flops import Shape, Work, ppo_flops
from benchmarks.peers.inputs import MODEL, read_texts
from benchmarks.peers.processes import Arm

OURS_NAME, TRL_NAME = "ours", "TRL"
FIXED = "32 prompts of 8 tokens, responses of 24, 1 epoch, fp32"
RAGGED = "32 prompts of 4 to 24 tokens, responses of 24, 1 epoch, fp32"
EPOCHS = "32 prompts of 8 tokens, responses of 24, 4 epochs, fp32"
BF16 = "32 prompts of 8 tokens, responses of 24, 1 epoch, bf16"
BEST = "32 prompts of 8 tokens, responses of 24, 1 epoch, bf16, 22 layers frozen, only the critic's head trained"
RESPONSE = 24
# Tokens of a microbatch here, and rows of one in TRL.
MICROBATCH_TOKENS, TRL_MICROBATCH = 512, 8
DEFAULT_MICROBATCH_TOKENS = 4096  # of the params file, for the best settings
CHAT_ROWS, CHAT_MICROBATCH_TOKENS, CHAT_TRL_MICROBATCH = 8, 2048, 1
CHAT = f"scores and updates of {CHAT_ROWS} given chats, 1 epoch, fp32"
SFT, REWARD = "SFT, 16 texts a step, fp32", "reward model, 16 pairs a step, fp32"
TRL_PADDED, TRL_PACKED = "TRL, padded", "TRL, padding-free"
SAME_LENGTH = "32 prompts of 8 tokens, responses of 24, fp32"
SENTENCES = "32 prompts of 4 to 24 tokens, responses to the end of a sentence, at most 64, fp32"
TRANSFORMERS, VLLM_OURS, VLLM = "transformers generate", "ours, vLLM", "vLLM generate"


def ppo_arms(iterations: int) -> list[Arm]:
    """One iteration of PPO: ours and TRL at equal settings, then settings that TRL does not have."""
    best = {"precision": "bf16", "frozen": 22, "critic": "head", "microbatch_tokens": DEFAULT_MICROBATCH_TOKENS}
    settings: list[tuple[str, dict[str, Any], bool]] = [
        (FIXED, {}, True),
        (RAGGED, {"prompts": "ragged"}, True),
        (EPOCHS, {"epochs": 4}, True),
        (BF16, {"precision": "bf16"}, False),
        (BEST, best, False),
    ]
    shape, prompts = Shape.of(MODEL), read_texts()["prompts"]
    arms = []
    for setting, changes, has_peer in settings:
        job = {"program": "ppo", "prompts": "fixed", "response": RESPONSE, "iterations": iterations}
        job |= {"microbatch_tokens": MICROBATCH_TOKENS} | changes
        lengths = [[len(ids), RESPONSE] for ids in prompts[job["prompts"]]["ids"]]
        trains_layers = changes.get("critic") != "head"
        work = Work(
            epochs=changes.get("epochs", 1), frozen=changes.get("frozen", 0), trains_critic_layers=trains_layers
        )
        gflop = {"gflop": round(ppo_flops(shape, lengths, work) / 1e9, 1)}
        text = {"microbatch": f"{job['microbatch_tokens']} tokens"}
        arms.append(Arm(system=OURS_NAME, setting=setting, module="ours_ppo", job=job, more=gflop | text))
        if has_peer:
            trl = job | {"microbatch": TRL_MICROBATCH, "forward_batch": 32}
            text = {"microbatch": f"{TRL_MICROBATCH} rows x {len(lengths) // TRL_MICROBATCH}"}
            arms.append(_trl_ppo(setting, trl, gflop | text))
    return arms


def chat_arms(iterations: int) -> list[Arm]:
    """One batch of given responses with the lengths of chats."""
    lengths = chat_lengths.load(CHAT_ROWS)
    gflop = {"gflop": round(ppo_flops(Shape.of(MODEL), lengths, Work(generates=False)) / 1e9, 1)}
    job = {"program": "chat", "rows": CHAT_ROWS, "iterations": iterations}
    ours = job | {"microbatch_tokens": CHAT_MICROBATCH_TOKENS}
    trl = job | {"microbatch": CHAT_TRL_MICROBATCH, "forward_batch": CHAT_TRL_MICROBATCH}
    text = {"microbatch": f"{CHAT_MICROBATCH_TOKENS} tokens"}
    trl_text = {"microbatch": f"{CHAT_TRL_MICROBATCH} row x {CHAT_ROWS // CHAT_TRL_MICROBATCH}"}
    return [
        Arm(system=OURS_NAME, setting=CHAT, module="ours_ppo", job=ours, more=gflop | text),
        _trl_ppo(CHAT, trl, gflop | trl_text),
    ]


def _trl_ppo(setting: str, job: dict[str, Any], more: dict[str, Any]) -> Arm:
    return Arm(system=TRL_NAME, setting=setting, module="trl_ppo", job=job, environment=TRL_PPO, more=more)


def train_arms(iterations: int) -> list[Arm]:
    """Steps of supervised fine-tuning and of the reward model on the same batch."""
    job = {"iterations": iterations}
    arms = [
        (OURS_NAME, SFT, {"stage": "sft"}),
        (TRL_PADDED, SFT, {"stage": "sft", "padding_free": False}),
        (TRL_PACKED, SFT, {"stage": "sft", "padding_free": True}),
        (OURS_NAME, REWARD, {"stage": "reward_model"}),
        (TRL_PADDED, REWARD, {"stage": "reward_model"}),
    ]
    return [
        Arm(system=system, setting=setting, module="ours_train", job=job | stage)
        if system == OURS_NAME
        else Arm(system=system, setting=setting, module="trl_train", job=job | stage, environment=TRL_NEWEST)
        for system, setting, stage in arms
    ]


def rollout_arms(iterations: int) -> list[Arm]:
    """Generation alone; with vLLM where it is installed."""
    settings = {
        SAME_LENGTH: {"prompts": "fixed", "max_tokens": RESPONSE, "min_tokens": RESPONSE},
        SENTENCES: {"prompts": "ragged", "max_tokens": 64, "min_tokens": 0},
    }
    engines = {OURS_NAME: "hf", TRANSFORMERS: "transformers"}
    if find_spec("vllm"):
        engines |= {VLLM_OURS: "vllm", VLLM: "vllm_offline"}
    return [
        Arm(
            system=system,
            setting=setting,
            module="rollouts",
            job={"engine": engine, "iterations": iterations} | job,
        )
        for setting, job in settings.items()
        for system, engine in engines.items()
    ]


ARMS: dict[str, Callable[[int], list[Arm]]] = {
    "ppo": ppo_arms,
    "chat": chat_arms,
    "train": train_arms,
    "rollout": rollout_arms,
}
