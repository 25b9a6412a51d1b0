"""`kfp-rlhf chat`: models answer the same messages side by side in a terminal."""

import contextlib
import random
import signal
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from components.rlhf.config.chat import ChatConfig
from components.rlhf.text.errors import InputError

if TYPE_CHECKING:
    from components.rlhf.data.records import Completion, Message, Prompt
    from components.rlhf.rewards.protocol import Scorer

TOKENS_PER_SCORE = 8  # between two scores of an answer that is being written
MICROBATCH_TOKENS = 4096


@click.command()
@click.argument("settings")
def main(settings: str) -> None:
    """Answer the lines of standard input by the models of settings (ChatConfig as JSON)."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # so that the terminal is left as it was
    try:
        chat(ChatConfig.from_json(settings), Console(file=sys.stdout))
    except ModuleNotFoundError as error:
        click.echo(
            f"error: chat needs torch and transformers (no module {error.name}); run pip install 'kfp-rlhf[cpu]', or "
            "'kfp-rlhf[gpu]'.",
            err=True,
        )
        sys.exit(1)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo()


def chat(config: ChatConfig, console: Console) -> None:
    """Answer one line after the other until standard input ends."""
    with no_echo():
        prompts = heldout_prompts(config)
        if config.is_chat is None:
            config = config.model_copy(update={"is_chat": bool(prompts) and prompts[0].conversation is not None})
        speakers = [Speaker.load(model.name, Path(model.folder), config) for model in config.models]
        scorer = load_scorer(config)
    kind = "A message" if config.is_chat else "The beginning of a text"
    hint = "; an empty line takes a held-out prompt" if prompts else ""
    console.print(Text(f"{kind}{hint}. Ctrl-D ends.", style="dim"))
    order = random.Random(config.seed)
    for number, line in enumerate(lines(console)):
        prompt = None
        if not line.strip():
            if not prompts:
                continue
            prompt = order.choice(prompts)
            console.print(Text(prompt.prompt, style="italic"))
        for speaker in speakers:
            speaker.hear(line, prompt)
        with no_echo():
            answer(speakers, scorer, config, config.seed + number, console)


def lines(console: Console) -> Iterator[str]:
    """What a person types, or the lines of a file, which a terminal shows as if they were typed."""
    if sys.stdin.isatty() and console.is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines, and shows what was typed before it was called)
        with contextlib.suppress(EOFError):
            while True:
                yield input("> ")
        console.print()
        return
    for line in sys.stdin:
        if console.is_terminal:
            console.print(Text(f"> {line.rstrip()}"), soft_wrap=True)
        yield line.rstrip("\n")


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keep what a person types meanwhile for the next line, unseen: an echo would move the cursor under the answers being drawn."""
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@dataclass
class Speaker:
    """A model and its side of the conversation."""

    name: str
    lm: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    is_chat: bool
    messages: "list[Message]" = field(default_factory=list)
    prompt: "Prompt | None" = None  # that it answers next
    text: str = ""
    score: float | None = None
    num_tokens: int = 0

    @classmethod
    def load(cls, name: str, folder: Path, config: ChatConfig) -> "Speaker":
        """Raises InputError if the folder has no model, or no chat template that is needed."""
        import transformers

        from components.rlhf.data.tokenizer import load_tokenizer
        from components.rlhf.models.loading import load_causal_lm, load_stop_ids
        from components.rlhf.models.precision import compute_dtype, default_device

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        tokenizer = load_tokenizer(folder)
        if config.is_chat and not tokenizer.chat_template:
            raise InputError(f"{folder} has no chat template; pass --plain to let it continue texts.")
        lm = load_causal_lm(
            folder, num_frozen_layers=0, dtype=compute_dtype(config.precision), trainable=False, device=default_device()
        )
        return cls(name, lm.eval(), tokenizer, load_stop_ids(folder), bool(config.is_chat))

    def hear(self, line: str, prompt: "Prompt | None") -> None:
        """Take a message, or a prompt of a data set, which begins a new conversation."""
        from components.rlhf.data.chat import render_chat
        from components.rlhf.data.records import Conversation, Message, Prompt

        if prompt is not None:
            self.messages = list(prompt.conversation.messages) if prompt.conversation else []
            self.prompt = prompt
        elif self.is_chat:
            self.messages.append(Message(role="user", content=line))
            text = render_chat(self.tokenizer, self.messages)
            self.prompt = Prompt(prompt=text, conversation=Conversation(messages=tuple(self.messages)))
        else:
            self.prompt = Prompt(prompt=line)

    def answer(self, config: ChatConfig, seed: int, on_token: "Callable[[Completion, bool], None]") -> None:
        """Sample an answer; on_token gets it after every token, and whether it has ended."""
        import torch
        from transformers import set_seed

        from components.rlhf.data.records import Completion, Message, is_chat
        from components.rlhf.data.tokenizer import decode_response, encode_prompt

        assert self.prompt is not None
        prompt, sampling = self.prompt, config.sampling
        prompt_ids, ids = encode_prompt(self.tokenizer, prompt.prompt, is_chat=is_chat(prompt)), []

        def completion(*, ended: bool) -> Completion:
            return Completion(
                prompt=prompt,
                prompt_ids=prompt_ids,
                response_ids=list(ids),
                response=decode_response(self.tokenizer, prompt_ids, ids),
                logprobs=None,
                truncated=ended and (not ids or ids[-1] not in self.stop_ids),
            )

        class Streamer:
            """Gets the prompt first, then one token after the other."""

            is_prompt = True

            def put(self, value: Any) -> None:
                if not self.is_prompt:
                    ids.append(int(value))
                    on_token(completion(ended=False), False)
                self.is_prompt = False

            def end(self) -> None:
                return

        set_seed(seed)
        tokens = torch.tensor([prompt_ids], device=self.lm.device)
        self.lm.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            streamer=Streamer(),
            do_sample=not config.greedy,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            **({"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer} if sampling.stop else {}),
            **({} if config.greedy else _distribution(sampling)),
        )
        found = completion(ended=True)
        on_token(found, True)
        if self.messages:
            self.messages.append(Message(role="assistant", content=found.response))


def _distribution(sampling: Any) -> dict[str, Any]:
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return chosen | ({"min_p": sampling.min_p} if sampling.min_p else {})


def answer(
    speakers: Sequence[Speaker], scorer: "Scorer | None", config: ChatConfig, seed: int, console: Console
) -> None:
    """Let every model answer with the same seed: side by side on a terminal, elsewhere as lines."""
    for speaker in speakers:
        speaker.text, speaker.score, speaker.num_tokens = "", None, 0
    live = Live(columns(speakers), console=console, auto_refresh=False) if console.is_terminal else None
    with live or console.capture() as _:
        for speaker in speakers:

            def show(completion: "Completion", ended: bool, speaker: Speaker = speaker) -> None:
                speaker.text, speaker.num_tokens = completion.response, len(completion.response_ids)
                if scorer is not None and speaker.num_tokens and (ended or speaker.num_tokens % TOKENS_PER_SCORE == 0):
                    speaker.score = float(scorer.score([completion])[0])
                if live is not None:
                    live.update(columns(speakers), refresh=True)

            speaker.answer(config, seed, show)
    if live is None:
        for speaker in speakers:
            score = "" if speaker.score is None else f" (reward {speaker.score:+.2f})"
            console.print(Text(f"{speaker.name}{score}: {speaker.text.strip()}"), soft_wrap=True)


def columns(speakers: Sequence[Speaker]) -> Any:
    """A panel for each model, with the score of its answer so far."""
    panels = []
    for speaker in speakers:
        score = "" if speaker.score is None else f"reward {speaker.score:+.2f}, "
        below = f"{score}{speaker.num_tokens} tokens"
        panels.append(Panel(Text(speaker.text.strip()), title=speaker.name, subtitle=below))
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def load_scorer(config: ChatConfig) -> "Scorer | None":
    if config.reward_model is None:
        return None
    from components.rlhf.models.precision import compute_dtype, default_device
    from components.rlhf.rewards.reward_model import load_reward_scorer

    return load_reward_scorer(
        Path(config.reward_model),
        dtype=compute_dtype(config.precision),
        device=default_device(),
        microbatch_tokens=MICROBATCH_TOKENS,
    )


def heldout_prompts(config: ChatConfig) -> "list[Prompt]":
    if config.prompts is None:
        return []
    from components.rlhf.data.datasets import load_records
    from components.rlhf.data.records import Prompt

    return load_records(Path(config.prompts), "heldout", Prompt)


if __name__ == "__main__":
    main()
