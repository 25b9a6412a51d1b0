"""Opening the environment that a config names."""

from collections.abc import Callable
from pathlib import Path

from components.rlhf.config.environment import CalculatorEnvironment, Environment
from components.rlhf.environments.calculator import CalculatorHost
from components.rlhf.environments.play import Player
from components.rlhf.environments.protocol import Host
from components.rlhf.environments.user import UserHost
from components.rlhf.rollout.protocol import RolloutEngine


def open_player(
    engine: RolloutEngine, environment: Environment | None, *, log: Callable[[str], None], code: Path | None = None
) -> Player | None:
    """What samples responses with the environment; None without one. code is the folder of the user's modules."""
    if environment is None:
        return None
    host: Host = CalculatorHost()
    if not isinstance(environment, CalculatorEnvironment):
        host = UserHost(environment, code=code, log=log)
    return Player(engine, environment, host, log)
