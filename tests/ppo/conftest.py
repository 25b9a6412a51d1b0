from pathlib import Path

import pytest

from tests.support.ppo_runs import make_reward_model


@pytest.fixture(scope="session")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose layers are those of tiny_model."""
    return make_reward_model(tiny_model, tmp_path_factory.mktemp("reward") / "model")
