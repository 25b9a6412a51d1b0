"""Negative log-likelihood of held-out demonstrations under both models."""

from pathlib import Path

import numpy as np
import torch

from components.checks.bounds import Measured
from components.checks.models import Models
from components.rlhf.config.checks import PerplexityCheck
from components.rlhf.data.batching import collate
from components.rlhf.data.datasets import load_records, read_header
from components.rlhf.data.records import Demonstration
from components.rlhf.data.token_files import PackedTexts, encode_all
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.maths.intervals import Floats
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.packing import plan_for
from components.rlhf.text.errors import InputError

MICROBATCH_TOKENS = 4096


def measure_perplexity(check: PerplexityCheck, models: Models, demonstrations: Path) -> list[Measured]:
    """Nats of the learned tokens of each text under both models, and how many tokens these are. Raises InputError without texts."""
    records = load_records(demonstrations, "heldout", Demonstration)[: check.num_texts]
    if not records:
        raise InputError("no demonstrations are held out; raise data.held_out")
    tokenizer, max_tokens = load_tokenizer(models.sft), read_header(demonstrations).max_tokens
    texts = encode_all(
        records, tokenizer, max_tokens=max_tokens, folder=demonstrations, split="heldout", log=models.progress.log
    )
    nats = []
    for name, folder in models.folders.items():
        actor = Actor(models.load(folder), num_frozen_layers=0, dtype=models.dtype)
        nats.append(negative_log_likelihoods(actor, texts, models.device))
        if not np.isfinite(nats[-1]).all():
            raise InputError(f"the log-likelihood of a text under the {name} model is not finite")
        del actor
        models.release()
    sizes = np.array(texts.num_learned, dtype=np.float64)
    return [Measured(check=check.title, unit="nats per token", sft=nats[0], policy=nats[1], sizes=sizes)]


@torch.no_grad()
def negative_log_likelihoods(actor: Actor, texts: PackedTexts, device: torch.device) -> Floats:
    """The sum over the learned tokens of each text, in nats: [N]."""
    found = np.zeros(len(texts))
    for rows in plan_for(actor)(texts.num_tokens, MICROBATCH_TOKENS):
        own = [texts[row] for row in rows]
        batch = collate([t.prompt_ids for t in own], [t.response_ids for t in own], [t.response_mask for t in own]).to(
            device
        )
        logprobs, _ = actor(batch, SamplingDistribution())
        found[rows] = -logprobs.double().sum(dim=1).cpu().numpy()
    return found
