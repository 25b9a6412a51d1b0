"""What `kfp-rlhf chat` loads: the models of a run, or model folders."""

import json
from collections.abc import Sequence
from pathlib import Path

from components.rlhf.config.chat import ChatConfig, ChatModel
from components.rlhf.config.model import SamplingConfig
from components.rlhf.text.errors import InputError
from pipelines.local.run_dir import artifacts, find_run, read_params


def chat_with_run(run: Path | None) -> ChatConfig:
    """The SFT model, the policies and the reward model of a run. Raises InputError if it has no model yet."""
    folder = find_run(run)
    params = read_params(folder)
    models, reward_model, prompts = [], None, None
    for artifact, kind in artifacts(folder):
        task = artifact.parent.name
        if kind == "sft_model":
            models.insert(0, ChatModel(name="SFT", folder=str(artifact)))
        elif kind == "policy_model":
            models.append(ChatModel(name=task.upper(), folder=str(artifact)))
        elif kind == "reward_model" and task == "reward-model":
            reward_model = str(artifact)
        elif kind == "prompts" and artifact.name == "heldout_prompts":
            prompts = str(artifact)
    if not models:
        raise InputError(f"{folder} has no trained model yet; kfp-rlhf status {folder} shows how far it is.")
    sampling = params["evaluation"]["sampling"] or params["ppo"]["rollout"]["sampling"]
    return ChatConfig(
        models=tuple(models),
        reward_model=reward_model,
        prompts=prompts,
        sampling=SamplingConfig.model_validate(sampling),
        precision=params["model"]["precision"],
    )


def chat_with_folders(folders: Sequence[Path]) -> ChatConfig:
    """Model folders; those with a chat template get messages."""
    models = tuple(ChatModel(name=folder.resolve().name, folder=str(folder)) for folder in folders)
    return ChatConfig(models=models, is_chat=all(map(_has_chat_template, folders)))


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))
