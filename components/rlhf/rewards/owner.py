"""What a scorer serves, for its messages: a judge, or one of the rewards; and which failures of single responses are tolerated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.rlhf.data.records import Completion, Prompt
from components.rlhf.text.errors import InputError

MAX_FAILED, MIN_FAILED = (
    0.25,
    2,
)  # of the responses of one call that may stay without an answer: this share, or this many


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The judge or reward that a scorer serves."""

    title: str  # as in a sentence: judge, reward maths
    key: str  # of its settings: judge, ppo.rewards.1

    def error(self, problem: str) -> InputError:
        """An error that names the owner; problem is the rest of the sentence, without the full stop."""
        return InputError(f"The {self.title} {problem}.")


JUDGE = Owner(title="judge", key="judge")


def column_values(owner: Owner, prompts: Sequence[Prompt], column: str) -> list[str]:
    """The text of a column for each prompt. Raises InputError if a prompt lacks it or has nothing in it."""
    values = [prompt.columns.get(column, "") for prompt in prompts]
    bad = next((prompt for prompt, value in zip(prompts, values, strict=True) if not value.strip()), None)
    if bad is not None:
        problem = "is empty in" if column in bad.columns else "is missing in"
        raise owner.error(
            f"needs the column {column}, which {problem} the data of prompt {named(bad)}; add it to data.prompts.keep, or correct the data"
        )
    return values


def require_few_failures(
    owner: Owner, failed: Sequence[Completion], total: int, why: str, advice: str, log: Callable[[str], None]
) -> None:
    """Log the responses that could not be scored. Raises InputError if they are too many to be scored by a rule.

    why says what happened to them, as in "could not be checked within 5 seconds".
    """
    if not failed:
        return
    example = f"the first is {failed[0].response[:80]!r} to prompt {named(failed[0].prompt)}"
    if len(failed) > max_failed(total):
        raise owner.error(f"is of no use: {len(failed)} of {total} responses {why} ({example}); {advice}")
    log(f"{owner.title}: {len(failed)} of {total} responses {why}; {example}")


def max_failed(total: int) -> int:
    """The most responses of a call of this size that may fail: a quarter, or 2 of a small one."""
    return max(MIN_FAILED, int(MAX_FAILED * total))


def named(prompt: Prompt) -> str:
    """A prompt in a message: its id, or the beginning of its text."""
    return prompt.id or repr(prompt.prompt[:80])
