"""Facts of a model that is in S3, read from its headers alone, against a real server."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.rlhf.config.storage import StorageConfig
from components.rlhf.planner.sources import shape_of, shape_of_folder
from components.rlhf.storage.s3 import S3Store
from components.rlhf.text.errors import InputError
from tests.rlhf.storage.conftest import Open
from tests.support.seaweed import SeaweedFS

pytestmark = pytest.mark.slow
HIDDEN, VOCAB = 64, 32_000
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": True,
}  # fmt: skip


def write_model(folder: Path) -> int:
    """A model in two files, most of whose bytes are its embeddings; returns the bytes of the files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    layers = {
        f"model.layers.{layer}.{name}.weight": torch.zeros(size)
        for layer in range(2)
        for name, size in (("self_attn.q_proj", (HIDDEN, HIDDEN)), ("mlp.up_proj", (128, HIDDEN)))
    }
    save_file({"model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN)}, folder / "model-00001-of-00002.safetensors")
    save_file(layers | {"model.norm.weight": torch.zeros(HIDDEN)}, folder / "model-00002-of-00002.safetensors")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_model_in_s3_is_counted_in_the_ranges_of_its_headers(
    server: SeaweedFS, s3: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3()
    assert isinstance(store, S3Store)
    size = write_model(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        store.upload(file, file.name)
    read: list[int] = []
    read_range = S3Store.read_range

    def count(self: S3Store, key: str, start: int, length: int) -> bytes:
        data = read_range(self, key, start, length)
        assert len(data) == length
        read.append(len(data))
        return data

    monkeypatch.setattr(S3Store, "read_range", count)
    config = StorageConfig(endpoint_url=server.url, region="us-east-1")
    found = shape_of(store.uri, config)
    assert found.exact
    assert found.total == VOCAB * HIDDEN + 2 * (HIDDEN * HIDDEN + 128 * HIDDEN) + HIDDEN
    assert found == replace(shape_of_folder(tmp_path / "model"), name=store.uri)
    assert sum(read) < size / 1000


def test_ranges_end_with_the_object(s3: Open, tmp_path: Path) -> None:
    store = s3()
    assert isinstance(store, S3Store)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    store.upload(tmp_path / "file", "file")
    assert store.read_range("file", 10, 5) == bytes(range(10, 15))
    assert store.read_range("file", 98, 5) == bytes([98, 99])


def test_folder_without_a_model_in_s3_is_refused(server: SeaweedFS, s3: Open) -> None:
    store = s3()
    assert isinstance(store, S3Store)
    store.write("readme", b"no model")
    config = StorageConfig(endpoint_url=server.url, region="us-east-1")
    with pytest.raises(InputError, match=r"has no config\.json; it is not a model folder"):
        shape_of(store.uri, config)
