"""The model that MLflow loads for a registered version: it answers prompts with the policy, greedily by default.

This file is copied into the version, so that loading it takes mlflow, torch and transformers (boto3 for weights in S3), and nothing of
this repository. The weights are not copied: link.json names their address and the digest of their manifest, and every file is verified.
"""

import hashlib
import json
import os
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LINK, MANIFEST = "link.json", "manifest.json"


class PolicyError(Exception):
    """The weights of a registered version cannot be used."""


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> "Policy":
    """Load the policy that path/link.json names. model_config may have `weights`, another folder with them, and `device`."""
    link = json.loads((Path(path) / LINK).read_text(encoding="utf-8"))
    config = model_config or {}
    folder = Path(config["weights"]) if config.get("weights") else fetch(link)
    verify(folder, link["digest"])
    return Policy(folder, device=config.get("device"), example=link.get("example", ""))


def fetch(link: dict[str, Any]) -> Path:
    """The folder of the weights; those elsewhere are downloaded once, into the cache of this user."""
    uri = str(link["uri"])
    if uri.startswith(("/", "file://")):
        folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(uri).path)) if uri[0] != "/" else Path(uri)
        if not folder.is_dir():
            raise PolicyError(
                f"The weights were in {folder}, which is not on this machine; pass the folder that they are in now: "
                "mlflow.pyfunc.load_model(URI, model_config={'weights': FOLDER})."
            )
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kfp-rlhf" / "models"
    target = cache / str(link["digest"])
    if not (target / MANIFEST).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            folder = download(uri, link, Path(draft))
            verify(folder, link["digest"])
            try:
                folder.rename(target)
            except OSError:  # another process was faster
                if not (target / MANIFEST).is_file():
                    raise
    return target


def download(uri: str, link: dict[str, Any], draft: Path) -> Path:
    """Download a folder with MLflow. Raises PolicyError."""
    import mlflow.artifacts

    if link.get("endpoint_url") and uri.startswith("s3://"):
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", str(link["endpoint_url"]))
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(draft)))
    except Exception as error:  # of whichever library reads this kind of address
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PolicyError(
            f"The weights at {uri} cannot be downloaded ({reason}); check the credentials of this process and MLFLOW_S3_ENDPOINT_URL, or "
            "publish models where it can read (storage.publish_uri)."
        ) from error


def verify(folder: Path, digest: str) -> None:
    """Raise PolicyError unless the folder has exactly the files of the manifest with this digest, unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = {key: value for key, value in manifest.items() if key not in ("created_at", "measurements")}
    except (OSError, ValueError, AttributeError) as error:
        raise PolicyError(
            f"{folder} has no valid {MANIFEST} ({error}); pass the folder of the registered model."
        ) from error
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if found != digest:
        raise PolicyError(f"{folder} has the digest {found}, and the registered model {digest}; it is another model.")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    files.pop(MANIFEST)
    if files.keys() != manifest["files"].keys():
        name = min(files.keys() ^ manifest["files"].keys())
        raise PolicyError(
            f"{folder / name} was {'added' if name in files else 'deleted'} since the model was registered."
        )
    for name, entry in manifest["files"].items():
        with files[name].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise PolicyError(f"{files[name]} has changed since the model was registered.")


class Policy:
    """A causal language model behind MLflow's predict()."""

    def __init__(self, folder: Path, *, device: str | None = None, example: str = "") -> None:
        """example is a prompt of the evaluation, which shows whether the model was trained on rendered chats."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        self.model.to(self.device).eval()
        self.is_chat = self.is_rendered(example)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The response to each prompt. params: max_new_tokens, and temperature, where 0 takes the most likely token at each step.

        A model that was trained on chats takes a prompt as the message of a user, unless it is a chat rendered by the template already.
        """
        given = params or {}
        limit, temperature = int(given.get("max_new_tokens") or 128), float(given.get("temperature") or 0.0)
        if limit < 1 or temperature < 0:
            raise ValueError("max_new_tokens must be at least 1, and temperature at least 0")
        return [self.answer(prompt, limit, temperature) for prompt in prompts_of(model_input)]

    def answer(self, prompt: str, limit: int, temperature: float) -> str:
        import torch

        ids = torch.tensor([self.encode(prompt)], device=self.device)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def encode(self, prompt: str) -> list[int]:
        if self.is_rendered(prompt):
            return self._ids(prompt, add_special_tokens=False)
        if self.is_chat:
            chat = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return self._ids(text, add_special_tokens=False)
        ids = self._ids(prompt, add_special_tokens=True)
        end = self.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end and not prompt.endswith(self.tokenizer.eos_token) else ids

    def is_rendered(self, prompt: str) -> bool:
        """Whether the prompt has special tokens of the chat template, such as <|im_start|>."""
        template = str(self.tokenizer.chat_template or "")
        markers = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return any(marker in prompt for marker in markers if marker in template)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def prompts_of(model_input: Any) -> Iterator[str]:
    """The prompts in a text, a list of texts, or the first column of a table."""
    values: Iterable[Any] = [model_input] if isinstance(model_input, str) else model_input
    if hasattr(model_input, "iloc"):
        values = model_input.iloc[:, 0]
    for value in values:
        if not isinstance(value, str) or not value:
            raise ValueError(f"a prompt must be a text that is not empty, got {value!r:.80}")
        yield value
