"""Measure padding and log-probs: `python -m benchmarks.kernels`.

Padding: tokens that go through the layers per real token, for conversations of the lengths in benchmarks/peers/chat_lengths.json,
with rows packed, in passes of rows of similar length, and padded to the longest row of a minibatch. Log-probs: CPU seconds of the
log-probs, their gradient and the entropy of 341 tokens of a vocabulary of 49,152, here and with torch's own operations.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import chat_lengths
from benchmarks.record import describe_machine
from components.rlhf.data.microbatches import computed_tokens, plan_passes
from components.rlhf.maths.logprobs import entropy, token_logprobs

TOKENS, VOCABULARY, TEMPERATURE, REPEATS = 341, 49_152, 0.7, 7


def main() -> None:
    torch.set_num_threads(1)
    print(f"{describe_machine()}; torch {torch.__version__}, 1 thread\n")
    padding_table()
    logprobs_table()


def padding_table() -> None:
    lengths = [prompt + response for prompt, response in chat_lengths.load(256)]
    print(
        "| rows of a minibatch | packed | similar lengths (passes) | padded to the longest row |\n|---:|---:|---:|---:|"
    )
    for size in (8, 16, 32, 64, 128):
        order = random.Random(size).sample(lengths, len(lengths))
        minibatches = [order[start : start + size] for start in range(0, len(order), size)]
        plans = [plan_passes(minibatch, 4096) for minibatch in minibatches]
        similar = sum(computed_tokens(m, plan, pack_limit=0) for m, plan in zip(minibatches, plans, strict=True))
        padded = sum(len(minibatch) * max(minibatch) for minibatch in minibatches)
        passes = statistics.mean(map(len, plans))
        print(f"| {size} | 1.000 | {similar / sum(lengths):.3f} ({passes:.1f}) | {padded / sum(lengths):.2f} |")
    print()


def plain_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    scaled = logits.float() / temperature
    return scaled.gather(-1, labels[:, None]).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def plain_entropy(logits: Tensor, temperature: float) -> Tensor:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def logprobs_table() -> None:
    print("| CPU seconds, median (range) | here | plain torch |\n|---|---:|---:|")
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()

        def backward(function: Callable[..., Tensor], logits: Tensor = logits) -> None:
            logits.grad = None
            function(logits, labels, TEMPERATURE).sum().backward()

        name = str(dtype).removeprefix("torch.")
        cases = {
            "log-probs": [
                lambda f=f, x=logits: f(x.detach(), labels, TEMPERATURE) for f in (token_logprobs, plain_logprobs)
            ],
            "log-probs and gradient": [lambda f=f: backward(f) for f in (token_logprobs, plain_logprobs)],
            "entropy": [lambda f=f, x=logits: f(x.detach(), TEMPERATURE) for f in (entropy, plain_entropy)],
        }
        for what, functions in cases.items():
            print(f"| {what}, {name} | {' | '.join(seconds(function) for function in functions)} |")


def seconds(function: Callable[[], object]) -> str:
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


if __name__ == "__main__":
    main()
