"""A task with a known optimum: walk from any node of a directed graph to its goal in as few steps as possible.

The graph has 21 nodes and an edge with chance 0.1 between any two; behaviour is 1,000 walks that follow edges at random, for at
most 10 nodes. A walk's optimality is 1 when it is as short as can be and 0 when it takes all 10 nodes, leaves the edges, or never
arrives. Same setting as trlX's example random_walks, where the behaviour's mean is 0.79 and PPO reaches 1.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOAL, NUM_NODES, MAX_NODES, NUM_WALKS, SEED = 0, 21, 10, 1000, 1002
LETTERS = "abcdefghijklmnopqrstu"
EOS = NUM_NODES  # node i has id i


@dataclass(frozen=True, kw_only=True)
class Walks:
    edges: list[list[int]]  # where one can go from each node
    shortest: dict[int, int]  # nodes on the best walk from each start, both ends counted
    behaviour: list[list[int]]  # random walks, start first

    def optimality(self, walk: Sequence[int]) -> float:
        """Of a walk that begins at its start; whatever follows the goal does not count."""
        for number, (here, there) in enumerate(itertools.pairwise(walk), start=2):
            if there not in self.edges[here] or number > MAX_NODES:
                return 0.0
            if there == GOAL:
                best = self.shortest[walk[0]]
                return 1 - (number - best) / (MAX_NODES - best)
        return 0.0

    def reward(self, prompt_ids: list[int], response_ids: list[int]) -> float:
        """The optimality of prompt and response; an EOS that comes before the goal leaves the edges."""
        return self.optimality([*prompt_ids, *(i if i != EOS else -1 for i in response_ids)])


def make_walks() -> Walks:
    """The graph and the behaviour; every start can reach the goal, and the goal leads nowhere."""
    generator = np.random.RandomState(SEED)
    while True:
        adjacent = generator.rand(NUM_NODES, NUM_NODES) > 0.9
        np.fill_diagonal(adjacent, False)
        if adjacent.any(axis=1).all():
            break
    edges = [[int(there) for there in np.flatnonzero(row)] for row in adjacent]
    edges[GOAL] = []
    behaviour = []
    while len(behaviour) < NUM_WALKS:
        walk = [int(generator.randint(1, NUM_NODES))]
        while len(walk) < MAX_NODES and walk[-1] != GOAL:
            walk.append(int(generator.choice(edges[walk[-1]])))
        behaviour.append(walk)
    return Walks(edges=edges, shortest=_shortest(edges), behaviour=behaviour)


def _shortest(edges: list[list[int]]) -> dict[int, int]:
    """Breadth first from the goal, against the edges."""
    found, waiting = {GOAL: 1}, deque([GOAL])
    while waiting:
        there = waiting.popleft()
        for here in range(NUM_NODES):
            if there in edges[here] and here not in found:
                found[here] = found[there] + 1
                waiting.append(here)
    return found


def as_text(walk: Sequence[int]) -> str:
    return "".join(LETTERS[node] for node in walk)


def make_model(folder: Path, *, hidden_size: int = 64, num_layers: int = 2) -> Path:
    """A fresh small Llama with a tokenizer of one id a node."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)} | {"<eos>": EOS}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
