"""Fixtures for all tests, and the tiers.

make test runs everything that is not marked slow or vllm: tiny random models on a CPU, no network. make test-all adds the slow
ones (the real model and ratings, and the commands of the README) and those that start vLLM.
"""

import os

# Before torch is imported anywhere: threads that spin on a busy core stall torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer Llama in fp32 and a byte-level tokenizer whose PAD is its EOS."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)
