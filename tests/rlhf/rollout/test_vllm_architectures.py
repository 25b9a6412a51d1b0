"""vLLM on a CPU against transformers for architectures that differ in logits, masks or positions."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.records import Prompt
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.probe import SyncCheck
from components.rlhf.rollout.vllm import VllmRolloutEngine
from tests.support.tiny_model import make_tiny_tokenizer
from tests.support.tiny_models import spread_logits, spread_weights

WINDOW = 16  # tokens
COMMON = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, eos_token_id=0, bos_token_id=None,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, dict[str, Any]] = {
    "granite": COMMON | dict(logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "cohere": COMMON | dict(logit_scale=0.25),
    "gemma2": COMMON | dict(head_dim=32, sliding_window=WINDOW, final_logit_softcapping=3.0, layer_types=MIXED),
    "gemma3_text": COMMON | dict(head_dim=32, sliding_window=WINDOW, layer_types=MIXED),
    "qwen2": COMMON | dict(use_sliding_window=False),
    "qwen3": COMMON | dict(head_dim=32),
    "mistral": COMMON | dict(sliding_window=WINDOW),
    "phi3": COMMON,
    "gpt2": dict(n_embd=128, n_layer=4, n_head=4, n_positions=256, eos_token_id=0, bos_token_id=None),
}


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """The engine sets environment variables, which must not leak into other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def make_folder(kind: str, folder: Path) -> Path:
    tokenizer = make_tiny_tokenizer()
    options = CONFIGS.get(kind, COMMON)
    config = AutoConfig.for_model(kind, **options, vocab_size=len(tokenizer))
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spread_weights(model)
    spread_logits(model)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logprobs_of(lm: Any, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids])
    return torch.log_softmax(lm(input_ids=tokens, use_cache=False).logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[
        :, 0
    ]


@pytest.mark.vllm
@pytest.mark.parametrize("kind", CONFIGS)
def test_vllm_equals_transformers_before_and_after_a_sync(kind: str, tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / "model")
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32)
    engine = VllmRolloutEngine(
        folder, VllmConfig(kv_cache_gib=0.05), stop_ids=(0,), dtype=torch.float32, max_model_len=128, num_sequences=4
    )
    try:
        ids = torch.randint(1, 250, (3 * WINDOW,), generator=torch.Generator().manual_seed(3)).tolist()
        for step in (0.0, 0.02):
            with torch.no_grad():
                for number, weight in enumerate(lm.parameters()):
                    generator = torch.Generator().manual_seed(number)
                    weight.add_(step * torch.randn(weight.shape, generator=generator))
            check = SyncCheck(torch.float32)
            if step:
                engine.sync(check.observe(lm.named_parameters()))
            found, expected = engine.prompt_logprobs(ids), logprobs_of(lm, ids)
            assert torch.allclose(found, expected, atol=1e-3), float((found - expected).abs().max())
            check.check(engine.weight_samples(), found, expected, version=engine.version)
            (completion,) = engine.generate([Prompt(prompt="What a film")], SamplingConfig(max_new_tokens=24), [5])
            whole = [*completion.prompt_ids, *completion.response_ids]
            own = logprobs_of(lm, whole)[len(completion.prompt_ids) - 1 :]
            assert completion.logprobs is not None
            assert torch.allclose(completion.logprobs, own, atol=1e-3)
    finally:
        engine.close()


IN_A_NEW_PROCESS = """
import sys, torch
from pathlib import Path
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.rollout.vllm import VllmRolloutEngine
from components.rlhf.text.errors import InputError
from tests.rlhf.rollout.test_vllm_architectures import make_folder
folder, options = make_folder("mixtral", Path(sys.argv[1])), dict(dtype=torch.float32, max_model_len=128, num_sequences=4)
try:
    VllmRolloutEngine(folder, VllmConfig(kv_cache_gib=0.05), stop_ids=(0,), **options)
except InputError as error:
    print(error)
"""


@pytest.mark.vllm
def test_mixture_of_experts_is_refused_on_a_cpu(tmp_path: Path) -> None:
    """In a new process, because vLLM cannot start one after another model."""
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "loses the packed experts of" in result.stdout, result.stdout + result.stderr
    assert "set ppo.rollout.engine to hf." in result.stdout
