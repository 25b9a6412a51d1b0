"""`kfp-rlhf export`: the policy of a run as a model folder with a model card, in a folder, on S3 or on the Hugging Face Hub."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.directory import atomic_directory, open_artifact
from components.rlhf.artifacts.manifest import MANIFEST, Manifest, read_manifest
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.copy import upload_folder
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import parse_json
from pipelines.local.model_card import model_card
from pipelines.local.run_dir import artifacts_of, find_run, read_json, read_params

HUB, CONVERTER = "hf://", "convert_hf_to_gguf.py"
NOT_EXPORTED = {MANIFEST, "history.jsonl", "validation.jsonl"}  # what stages read, and transformers does not
Log = Callable[[str], None]


def export_policy(run: Path | None, target: str, *, gguf: str | None, force: bool, log: Log) -> None:
    """Verify the policy of a run and write it with a model card to target: a folder, s3://BUCKET/PREFIX or hf://OWNER/NAME.

    The artifact has whole weights: adapters are merged when it is written. gguf is the type of an additional GGUF file. Raises
    InputError before anything is written if there is no policy, no converter, or something at the target already.
    """
    folder = find_run(run)
    params, summary = read_params(folder), read_json(folder / "summary.json")
    policy = policy_of(folder)
    converter = find_converter() if gguf else None
    storage = StorageConfig.model_validate(params.get("storage") or {})
    if not force:
        require_empty(target, storage)
    manifest = open_artifact(policy, "policy_model")
    with tempfile.TemporaryDirectory(prefix="rlhf-export-", dir=_room_for(target)) as temporary:
        draft = Path(temporary) / "model"
        draft.mkdir()
        for name in manifest.files:
            if name not in NOT_EXPORTED:
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(policy / name, draft / name)
        (draft / "README.md").write_text(card_of(folder, params, summary, manifest), encoding="utf-8")
        if converter and gguf:
            convert(converter, draft, gguf)
        _deliver(draft, target, storage, log)


def card_of(run: Path, params: Mapping[str, Any], summary: Mapping[str, Any], policy: Manifest) -> str:
    """The card of a policy of a run, with what the evaluation of the same policy has found."""
    bases = [read_manifest(path).facts for path in artifacts_of(run, "base_model")]
    license_name = next((str(facts["license"]) for facts in bases if "license" in facts), "")
    evaluations = [
        path
        for path in artifacts_of(run, "evaluation")
        if read_manifest(path).parents.get("policy_model") == policy.digest
    ]
    file = next((path / "findings.json" for path in evaluations if (path / "findings.json").is_file()), None)
    findings = parse_json(file.read_bytes()) if file else []
    return model_card(params, summary, policy, license_name=license_name, findings=findings)


def policy_of(run: Path) -> Path:
    """The policy of a run: the one that went to the gate if there are several. Raises InputError if there is none."""
    found = artifacts_of(run, "policy_model")
    if not found:
        raise InputError(f"{run} has no policy yet; kfp-rlhf status {run} shows how far it is.")
    linked = (run / "model").resolve()
    return linked if linked in [path.resolve() for path in found] else found[0]


def require_empty(target: str, storage: StorageConfig) -> None:
    """Raise InputError if there is something at the target. A repository of the Hub keeps its history and is updated."""
    if target.startswith(HUB):
        return
    parent, name = _split(target)
    exists = bool(open_store(parent, storage).list(name)) if target.startswith("s3://") else Path(target).exists()
    if exists:
        raise InputError(f"{target} already exists; choose another --to, or replace it with --force.")


def _split(target: str) -> tuple[str, str]:
    parent, _, name = target.rstrip("/").rpartition("/")
    if target.startswith("s3://") and parent in ("s3:", "s3:/"):
        raise InputError(f"{target} is a bucket without a key; write s3://BUCKET/PREFIX.")
    return parent or ".", name


def _room_for(target: str) -> Path | None:
    """Where the copy is made: next to a folder, so that the disk that must hold it does; else the default."""
    if "://" in target:
        return None
    parent = Path(target).resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{parent} cannot be created ({error.strerror}); choose another --to.") from None
    return parent


def _deliver(draft: Path, target: str, storage: StorageConfig, log: Log) -> None:
    if target.startswith(HUB):
        _push(draft, target.removeprefix(HUB), log)
    elif target.startswith("s3://"):
        parent, name = _split(target)
        upload_folder(open_store(parent, storage, log), draft, name, last="config.json")
        log(f"wrote {target}")
    else:
        with atomic_directory(Path(target)) as folder:
            for path in draft.iterdir():
                shutil.move(path, folder / path.name)
        log(f"wrote {target}")


def _push(draft: Path, repository: str, log: Log) -> None:
    """Commit the folder to a repository of the Hub, which is created as a private one. The token is HF_TOKEN or that of `hf auth login`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=draft, commit_message="Policy trained by kfp-rlhf")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{HUB}{repository} cannot be written ({reason}); set HF_TOKEN to a token with write access, or correct --to."
        ) from None
    log(f"wrote {commit.commit_url}")


def find_converter() -> Path:
    """llama.cpp's converter: on the PATH, or in the folder LLAMA_CPP. Raises InputError if it is not installed."""
    found = shutil.which(CONVERTER)
    folder = os.environ.get("LLAMA_CPP")
    if not found and folder and (Path(folder) / CONVERTER).is_file():
        found = str(Path(folder) / CONVERTER)
    if not found:
        raise InputError(
            f"--gguf needs {CONVERTER} of llama.cpp on the PATH; install it, or set LLAMA_CPP to the folder of its sources."
        )
    return Path(found)


def convert(converter: Path, model: Path, kind: str) -> None:
    """Write model-KIND.gguf into a model folder. Raises InputError with the converter's last line if it fails."""
    target = model / f"model-{kind}.gguf"
    command = [sys.executable, str(converter), str(model), "--outfile", str(target), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise InputError(f"{converter} failed ({lines[-1][:300]}); export without --gguf, or update llama.cpp.")


def served_name(params: Mapping[str, Any]) -> str:
    """The name under which a policy is served."""
    return str(params.get("preset") or "policy")
