"""What each benchmark should reach, and whether its rows do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers import settings as s
from benchmarks.peers.ceiling import share_of_ceiling
from benchmarks.peers.rows import Row, find_row

AllRows = Mapping[str, Sequence[Row]]
EPYC = "AMD EPYC"


@dataclass(frozen=True, kw_only=True)
class Goal:
    text: str
    value: Callable[[AllRows], float | None]  # None if a row is missing
    show: str  # format of the value
    at_least: float | None = None
    at_most: float | None = None
    reason: str = ""  # why it is missed, as far as that is known

    def state(self, rows: AllRows) -> str:
        """One line: met, missed with the reason, or not measured."""
        value = self.value(rows)
        if value is None:
            return f"{self.text}: not measured."
        met = value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)
        shown = self.show.format(value)
        if met:
            return f"{self.text}: met, {shown}."
        return f"{self.text}: **missed**, {shown}." + (f" {self.reason}" if self.reason else "")


def number(
    name: str, setting: str, metric: Callable[[Row], float], system: str = s.OURS_NAME
) -> Callable[[AllRows], float | None]:
    def value(rows: AllRows) -> float | None:
        row = find_row(rows.get(name, ()), system, setting)
        return None if row is None else metric(row)

    return value


def ratio(
    name: str,
    setting: str,
    metric: Callable[[Row], float],
    *,
    peer: str,
    system: str = s.OURS_NAME,
    peer_setting: str = "",
) -> Callable[[AllRows], float | None]:
    """The metric of a system divided by that of a peer, at the same setting unless another is given."""

    def value(rows: AllRows) -> float | None:
        ours = number(name, setting, metric, system)(rows)
        theirs = number(name, peer_setting or setting, metric, peer)(rows)
        return None if ours is None or theirs is None else ours / theirs

    return value


def on_epyc(value: Callable[[AllRows], float | None]) -> Callable[[AllRows], float | None]:
    """The value, if all rows of ppo were measured on an AMD EPYC; goals in seconds hold for one machine only."""
    return lambda rows: value(rows) if all(EPYC in row["machine"] for row in rows.get("ppo", ())) else None


def cpu(row: Row) -> float:
    return float(row["cpu_seconds"])


def peak(row: Row) -> float:
    return float(row["peak_bytes"])


def sample_rate(row: Row) -> float:
    return float(row["samples"]) / cpu(row)


def token_rate(row: Row) -> float:
    return float(row["tokens"]) / cpu(row)


def share(setting: str, precision: str) -> Callable[[AllRows], float | None]:
    def value(rows: AllRows) -> float | None:
        row = find_row(rows.get("ppo", ()), s.OURS_NAME, setting)
        return None if row is None else share_of_ceiling(row, rows.get("ceiling", ()), precision)

    return value


SMALL_STEP = (
    "In steps of so few tokens much of the time goes to reading weights and to the optimizer, which do not depend on padding; the logits "
    "are computed twice here, to save memory."
)
TIMES, SECONDS, PERCENT = "{:.2f} times", "{:.1f} CPU seconds", "{:.0%}"

GOALS: dict[str, list[Goal]] = {
    "ppo": [
        Goal(
            text="Fixed lengths in fp32: at most 36 CPU seconds per iteration on an AMD EPYC (was 43.2)",
            value=on_epyc(number("ppo", s.FIXED, cpu)), show=SECONDS, at_most=36.0,
        ),
        Goal(
            text="Fixed lengths in bf16: at most 18 CPU seconds per iteration on an AMD EPYC",
            value=on_epyc(number("ppo", s.BF16, cpu)), show=SECONDS, at_most=18.0,
        ),
        Goal(
            text="Ragged prompts: at least twice TRL's samples per CPU second",
            value=ratio("ppo", s.RAGGED, sample_rate, peer=s.TRL_NAME), show=TIMES, at_least=2.0,
            reason="Padding is 21% of the positions of a batch, so leaving it out alone gives 1.3 times.",
        ),
        Goal(
            text="Best settings: at least 10 times TRL's samples per CPU second at fixed lengths in fp32",
            value=ratio("ppo", s.BEST, sample_rate, peer=s.TRL_NAME, peer_setting=s.FIXED), show=TIMES, at_least=10.0,
            reason="Half of the time is generation, one token at a time through all layers.",
        ),
        Goal(
            text="Peak memory at equal settings: at most half of TRL's",
            value=ratio("ppo", s.FIXED, peak, peer=s.TRL_NAME), show=TIMES, at_most=0.5,
            reason="Both hold in fp32 the weights, gradients and two moments of two trained models (4.3 GB) and the weights of two "
            "frozen ones (1.1 GB), of which here only one trained model has gradients at a time (0.5 GB less). Half would need moments in "
            "fewer bytes, or steps of the optimizer during the backward pass.",
        ),
    ],
    "chat": [
        Goal(
            text="Chat lengths: at least 3 times TRL's real tokens per CPU second",
            value=ratio("chat", s.CHAT, token_rate, peer=s.TRL_NAME), show=TIMES, at_least=3.0,
        ),
    ],
    "train": [
        Goal(
            text="SFT: at least twice TRL's real tokens per CPU second with padding",
            value=ratio("train", s.SFT, token_rate, peer=s.TRL_PADDED), show=TIMES, at_least=2.0, reason=SMALL_STEP,
        ),
        Goal(
            text="SFT: no fewer real tokens per CPU second than TRL without padding",
            value=ratio("train", s.SFT, token_rate, peer=s.TRL_PACKED), show=TIMES, at_least=1.0, reason=SMALL_STEP,
        ),
        Goal(
            text="Reward model: at least twice TRL's real tokens per CPU second with padding",
            value=ratio("train", s.REWARD, token_rate, peer=s.TRL_PADDED), show=TIMES, at_least=2.0, reason=SMALL_STEP,
        ),
    ],
    "rollout": [
        Goal(
            text=f"{name}, {where}: at least 0.9 times the tokens per CPU second of {peer}",
            value=ratio("rollout", setting, token_rate, peer=peer, system=system), show=TIMES, at_least=0.9,
        )
        for name, system, peer in (("Our engine hf", s.OURS_NAME, s.TRANSFORMERS), ("Our engine vllm", s.VLLM_OURS, s.VLLM))
        for where, setting in (("equal lengths", s.SAME_LENGTH), ("until the end of a sentence", s.SENTENCES))
    ],
    "ceiling": [
        Goal(
            text="Fixed lengths in fp32: at least 90% of the machine's rate of matrix products",
            value=share(s.FIXED, "fp32"), show=PERCENT, at_least=0.9,
            reason="Generation and the elementwise operations of the layers run at the rate of main memory, and no compiler fuses them.",
        ),
    ],
    "growth": [],
}  # fmt: skip
