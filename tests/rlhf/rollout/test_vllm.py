"""The vLLM engine against the transformers engine, with the real vLLM on a CPU."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout import vllm as engine_module
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.probe import SyncCheck, WeightSample, probe_ids
from components.rlhf.rollout.vllm import VllmRolloutEngine
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_model
from tests.support.vllm_memory import references_to, require_freed, require_no_model

ROOT = Path(__file__).resolve().parents[3]
# The last is longer than a block of vLLM's cache (128 tokens on a CPU), so that there is a prefix to reuse.
TEXTS = ["a film", "b", "the longest prompt of all", "no", "what a day it was", "It was a dark and stormy night; " * 5]
PROMPTS = [Prompt(prompt=text) for text in TEXTS]
MANY_STOPS = tuple(range(0, 257, 2))
COLD = 0.01  # the lowest temperature of vLLM, at which these models are nearly deterministic
MAX_MODEL_LEN = 200


def model(folder: Path, seed: int, *, sure: bool = False, tied: bool = True) -> Path:
    """vLLM's attention on a CPU wants heads of at least 32. A model that is sure has no two tokens of about the same logit.

    Its log-probs go down to -500, so that fp32 leaves differences of 1e-3.
    """
    path = folder / f"model-{seed}"
    if not path.exists():
        make_tiny_model(path, seed=seed, hidden_size=128, tied=tied)
        if sure:
            lm = AutoModelForCausalLM.from_pretrained(path)
            lm.model.norm.weight.data *= 40
            lm.save_pretrained(path)
    return path


def trained(folder: Path) -> Any:
    return load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32)


def hf(folder: Path, stop_ids: tuple[int, ...] = (0,)) -> HfRolloutEngine:
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    return HfRolloutEngine(lm, AutoTokenizer.from_pretrained(folder), stop_ids=stop_ids)


def start(folder: Path, *, kv_cache_gib: float = 0.05, **options: Any) -> VllmRolloutEngine:
    settings = VllmConfig(kv_cache_gib=kv_cache_gib)
    defaults = {"stop_ids": (0,), "dtype": torch.float32, "max_model_len": MAX_MODEL_LEN, "num_sequences": 16}
    return VllmRolloutEngine(folder, settings, **(defaults | options))


def sampling(**settings: Any) -> SamplingConfig:
    return SamplingConfig(**({"max_new_tokens": 8} | settings))


def ids_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.response_ids for completion in completions]


def prompt_logprobs(completion: Completion) -> Tensor:
    assert completion.logprobs is not None
    return completion.logprobs


def trainers_logprobs(lm: Any, found: Sequence[Completion], distribution: SamplingDistribution) -> list[Tensor]:
    rows = collate([c.prompt_ids for c in found], [c.response_ids for c in found])
    with torch.no_grad():
        logprobs, _ = Actor(lm, num_frozen_layers=0, dtype=torch.float32)(rows, distribution)
    return [row[: len(c.response_ids)] for row, c in zip(logprobs, found, strict=True)]


def probe(lm: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logprobs, _ = Actor(lm, num_frozen_layers=0, dtype=torch.float32)(
            collate([ids[:1]], [ids[1:]]), SamplingDistribution()
        )
    return logprobs[0]


def check(engine: VllmRolloutEngine, lm: Any, sync_check: SyncCheck | None = None) -> None:
    """Compare the engine with a trainer that has the weights of lm."""
    ids = probe_ids(engine.tokenizer)
    logprobs = engine.prompt_logprobs(ids), probe(lm, ids)
    (sync_check or SyncCheck(engine.dtype)).check(engine.weight_samples(), *logprobs, version=engine.version)


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """The engine sets environment variables, which must not leak into other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="class")
def models(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied" if tied else "untied")
    for seed in range(4):
        model(folder, seed, sure=True, tied=tied)
    return folder


@pytest.fixture(scope="class")
def engine(models: Path) -> Iterator[VllmRolloutEngine]:
    """An engine with the model of seed 0."""
    engine = start(model(models, 0))
    yield engine
    engine.close()


def same(engine: VllmRolloutEngine, folder: Path, *, version: int) -> None:
    """Greedy tokens and their log-probs are those of transformers with this folder's weights."""
    how, seeds = sampling(temperature=COLD, max_new_tokens=24), list(range(len(PROMPTS)))
    found, expected = (e.generate(PROMPTS, how, seeds) for e in (engine, hf(folder)))
    assert ids_of(found) == ids_of(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(prompt_logprobs(a), prompt_logprobs(b), atol=1e-2)
        assert (a.prompt, a.prompt_ids, a.response, a.truncated) == (
            b.prompt,
            b.prompt_ids,
            b.response,
            b.truncated,
        )
        assert a.weight_version == version


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
def test_tokens_and_log_probs_equal_transformers_before_and_after_each_update(
    engine: VllmRolloutEngine, models: Path
) -> None:
    assert engine.version == 0
    same(engine, model(models, 0), version=0)
    for version, seed in enumerate([1, 2, 1, 3], start=1):
        lm = trained(model(models, seed))
        assert engine.sync(lm.named_parameters()) == engine.version == version
        same(engine, model(models, seed), version=version)
        check(engine, lm)


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
def test_sync_copies_weights_before_the_trainer_frees_them(engine: VllmRolloutEngine, models: Path) -> None:
    """Yield weights like a trainer that shards them: each is whole only until the next one."""

    def passing(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            once = weight.detach().clone()
            yield name, once
            once.fill_(float("nan"))

    version = engine.sync(passing(trained(model(models, 2)).named_parameters()))
    same(engine, model(models, 2), version=version)


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
def test_sync_never_holds_a_second_copy_of_all_weights(
    engine: VllmRolloutEngine, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    copies: list[weakref.ref[Tensor]] = []
    real = engine._copies

    def watched(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in real(weights):
            alive.append(sum(copy() is not None for copy in copies))
            copies.append(weakref.ref(weight))
            yield name, weight
            del weight

    monkeypatch.setattr(engine, "_copies", watched)
    engine.sync(trained(model(models, 1)).named_parameters())
    assert len(copies) >= 29
    assert max(alive) <= 3  # q, k and v are fused into one matrix; the MLP fuses two


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
def test_weights_that_are_not_synced_do_not_change(engine: VllmRolloutEngine, models: Path) -> None:
    engine.sync(trained(model(models, 1)).named_parameters())
    version = engine.sync([])
    same(engine, model(models, 1), version=version)
    mixed, new = trained(model(models, 1)), trained(model(models, 3))
    some = {name: w for name, w in new.named_parameters() if ".layers.2." in name or name == "model.norm.weight"}
    mixed.load_state_dict(some, strict=False)
    version = engine.sync(some.items())
    check(engine, mixed)


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
@pytest.mark.parametrize("lost", ["everything", "matrices"])
def test_sync_that_loses_weights_is_detected_after_a_step_of_1e_6(
    engine: VllmRolloutEngine, models: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, sync_check = trained(model(models, 0)), SyncCheck(torch.float32)
    engine.sync(sync_check.observe(lm.named_parameters()))
    check(engine, lm, sync_check)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if lost == "everything" or (
                weight.dim() == 2 and "embed" not in name
            ):  # norms would be seen by their values
                weight.add_(1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).sign())
    real = engine._llm.collective_rpc
    monkeypatch.setattr(engine._llm, "collective_rpc", lambda name, **_: list(_["kwargs"]["weights_iterator"]))
    engine.sync(sync_check.observe(lm.named_parameters()))
    monkeypatch.setattr(engine._llm, "collective_rpc", real)
    with pytest.raises(InputError, match=r"still have other values|have changed, but not the log-probs"):
        check(engine, lm, sync_check)


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
def test_samples_of_weights_are_those_of_transformers(engine: VllmRolloutEngine, models: Path) -> None:
    lm = trained(model(models, 2))
    engine.sync(lm.named_parameters())
    samples, weights = engine.weight_samples(), dict(lm.named_parameters())
    expected = {name: WeightSample.of(weight) for name, weight in weights.items()}
    compared = {name for name in samples.keys() & expected.keys() if samples[name].shape == expected[name].shape}
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} <= compared
    for name in compared:
        assert torch.equal(samples[name].values, expected[name].values)


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"], scope="class")
def test_probe_detects_a_stale_head(
    engine: VllmRolloutEngine, models: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.sync(trained(model(models, 0)).named_parameters())
    lm = trained(model(models, 1))
    with monkeypatch.context() as broken:
        broken.setattr(engine_module, "_pack_heads", lambda _: None)
        version = engine.sync((name, w) for name, w in lm.named_parameters() if name != "lm_head.weight")
    with pytest.raises(InputError, match=rf"weights \(version {version}\) do not match the trainer's"):
        check(engine, lm)
    version = engine.sync(lm.named_parameters())
    check(engine, lm)


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("sampling"), 0)


@pytest.fixture(scope="class")
def sampler(folder: Path) -> Iterator[VllmRolloutEngine]:
    engine = start(folder, stop_ids=MANY_STOPS)
    yield engine
    engine.close()


@pytest.mark.vllm
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"temperature": 1.7, "min_new_tokens": 4}], ids=["plain", "cold", "late"]
)
def test_sampled_log_probs_equal_the_trainers(
    sampler: VllmRolloutEngine, folder: Path, settings: dict[str, Any]
) -> None:
    how = sampling(**settings)
    found = sampler.generate(PROMPTS * 4, how, list(range(24)))
    distribution = SamplingDistribution(
        temperature=how.temperature, min_new_tokens=how.min_new_tokens, stop_ids=MANY_STOPS
    )
    for c, expected in zip(found, trainers_logprobs(trained(folder), found, distribution), strict=True):
        assert torch.allclose(prompt_logprobs(c), expected, atol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("min_new_tokens", [0, 6])
def test_greedy_decoding_equals_transformers(sampler: VllmRolloutEngine, folder: Path, min_new_tokens: int) -> None:
    how = sampling(temperature=1.5, max_new_tokens=16, min_new_tokens=min_new_tokens)
    found, expected = (e.generate(PROMPTS, how, range(6), greedy=True) for e in (sampler, hf(folder, MANY_STOPS)))
    assert ids_of(found) == ids_of(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(prompt_logprobs(a), prompt_logprobs(b), atol=1e-4)
        assert (a.truncated, a.response) == (b.truncated, b.response)


@pytest.mark.vllm
def test_stop_token_is_kept_and_ends_the_response(sampler: VllmRolloutEngine) -> None:
    found = sampler.generate(PROMPTS * 10, sampling(max_new_tokens=3), list(range(60)))
    assert {c.truncated for c in found} == {True, False}
    for c in found:
        assert c.truncated == (c.response_ids[-1] not in MANY_STOPS)
        assert len(c.response_ids) == 3 if c.truncated else len(c.response_ids) <= 3
        assert not set(c.response_ids[:-1]) & set(MANY_STOPS)
        assert "<eos>" not in c.response


@pytest.mark.vllm
def test_no_stop_before_min_new_tokens(sampler: VllmRolloutEngine) -> None:
    found = sampler.generate(PROMPTS * 10, sampling(min_new_tokens=3), list(range(60)))
    assert all(token not in MANY_STOPS for c in found for token in c.response_ids[:3])
    assert min(len(c.response_ids) for c in found) == 4


@pytest.mark.vllm
def test_eos_that_is_not_a_stop_id_does_not_end_the_response(
    sampler: VllmRolloutEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM always reads generation_config.json; its EOS must neither stop nor mask anything."""
    monkeypatch.setattr(sampler, "stop_ids", (5,))
    how = sampling(temperature=2.0, max_new_tokens=40, min_new_tokens=40)
    found = sampler.generate(PROMPTS[:5] * 6, how, list(range(30)))
    assert any(0 in c.response_ids[:-1] for c in found)
    distribution = SamplingDistribution(temperature=2.0, min_new_tokens=40, stop_ids=(5,))
    for c, expected in zip(found, trainers_logprobs(trained(folder), found, distribution), strict=True):
        assert torch.allclose(prompt_logprobs(c), expected, atol=1e-4)


@pytest.mark.vllm
def test_completion_depends_only_on_its_prompt_and_seed(sampler: VllmRolloutEngine) -> None:
    seeds = [11, 5, 11, 3, 1_000_003 * 1_000_003 + 2, 0]
    together = sampler.generate(PROMPTS, sampling(), seeds)
    alone = [sampler.generate([p], sampling(), [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    backwards = sampler.generate(PROMPTS[::-1] * 4, sampling(), seeds[::-1] * 4)
    assert ids_of(together) == ids_of(alone) == ids_of(backwards[:6])[::-1] == ids_of(backwards[18:])[::-1]
    others = sampler.generate(PROMPTS, sampling(), [seed + 1 for seed in seeds])
    assert ids_of(others) != ids_of(together)


@pytest.mark.vllm
def test_token_frequencies_match_their_probabilities(sampler: VllmRolloutEngine, folder: Path) -> None:
    """Consecutive seeds, like PPO's."""
    num, ids = 3000, sampler.tokenizer("a film")["input_ids"]
    found = sampler.generate(PROMPTS[:1] * num, sampling(max_new_tokens=1), [7 * 1_000_003 + n for n in range(num)])
    with torch.no_grad():
        expected = num * torch.softmax(trained(folder)(torch.tensor([ids])).logits[0, -1].double(), dim=-1)
    counts = torch.bincount(torch.tensor(ids_of(found))[:, 0], minlength=len(expected)).double()
    rare = expected < 8
    fold = [torch.cat([x[~rare], x[rare].sum()[None]]).numpy() for x in (counts, expected)]
    assert len(fold[0]) > 5
    assert chisquare(*fold).pvalue > 1e-3


@pytest.mark.vllm
def test_generate_preserves_generator_state_and_thread_count(sampler: VllmRolloutEngine) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampler.generate(PROMPTS, sampling(), [0] * 6)
    assert torch.equal(torch.rand(3), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)  # vLLM would make this a no-op
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


@pytest.mark.vllm
def test_unsupported_requests_are_refused(sampler: VllmRolloutEngine) -> None:
    with pytest.raises(InputError, match="prompt of 160 tokens and a response of up to 100 .* max_model_len of 200"):
        sampler.generate(PROMPTS, sampling(max_new_tokens=100), [0] * 6)
    for temperature in (0.001, 3.0):
        with pytest.raises(InputError, match=f"temperature is {temperature}, .* supports 0.01 to 2.0"):
            sampler.generate(PROMPTS, sampling(temperature=temperature), [0] * 6)
    assert sampler.generate([], sampling(), []) == []


def edited(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


# Each of these fails within seconds and leaves a process in which another engine can start.


@pytest.mark.vllm
def test_too_small_kv_cache_is_refused_and_the_model_is_freed(tmp_path: Path) -> None:
    folder = edited(model(tmp_path, 0), max_position_embeddings=65536)
    with pytest.raises(
        InputError, match=r"65536 tokens need 0.09 GiB of KV cache, but it has 0.01; raise .*kv_cache_gib"
    ):
        start(folder, max_model_len=65536, kv_cache_gib=0.01)
    require_no_model()


@pytest.mark.vllm
def test_kv_cache_larger_than_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"needs 99999.0 GiB, but only [\d.]+ GiB of memory are free; lower .*kv_cache_gib"
    ):
        start(model(tmp_path, 0), kv_cache_gib=99999)


@pytest.mark.vllm
def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not support the architecture OwnForCausalLM; choose another model"):
        start(edited(model(tmp_path, 0), architectures=["OwnForCausalLM"], model_type="ctrl"))


@pytest.mark.vllm
def test_more_tokens_than_the_model_supports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="may have 1000 tokens, but the model supports 256 "):
        start(model(tmp_path, 0), max_model_len=1000)


@pytest.mark.vllm
def test_unsupported_head_size_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="head_dim=8"):
        start(tiny_model)


@pytest.mark.vllm
def test_engine_whose_load_failed_is_closed_and_leaves_a_later_one_alone(tmp_path: Path) -> None:
    """After the failed starts above. Closed again, an engine must not destroy the groups of the one that runs now."""
    broken = model(tmp_path, 1)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    engine = start(model(tmp_path, 0))
    held = references_to(engine._llm)
    with pytest.raises(InputError, match="vLLM cannot load .*model-1: "):
        engine.load(broken)
    engine.close()
    assert not torch.distributed.is_initialized()
    require_freed(held)
    later = start(model(tmp_path, 0))
    engine.close()
    assert torch.distributed.is_initialized()
    assert len(later.generate(PROMPTS, sampling(), [0] * 6)) == 6
    later.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.vllm
def test_prompts_may_exceed_the_tokens_of_one_pass(tmp_path: Path) -> None:
    """32 prompts of 190 tokens: cut in pieces, a row with a seed of its own would fail on a CPU."""
    folder = model(tmp_path, 0)
    engine = start(folder, max_model_len=200, num_sequences=32, kv_cache_gib=0.1)
    try:
        prompts = [Prompt(prompt=f"{number:03d} " + "x" * 186) for number in range(32)]
        found = engine.generate(prompts, sampling(), list(range(32)))
        assert ids_of(found)[5:6] == ids_of(engine.generate(prompts[5:6], sampling(), [5]))
    finally:
        engine.close()


def test_missing_vllm_names_the_package_to_install(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"not installed .* pip install 'kfp-rlhf\[gpu\]' .* 'kfp-rlhf\[cpu\]'"):
        start(tiny_model)


def test_indivisible_process_count_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="tensor_parallel_size is 3, but must divide the 1 training"):
        VllmRolloutEngine(
            tiny_model,
            VllmConfig(tensor_parallel_size=3),
            stop_ids=(0,),
            dtype=torch.float32,
            max_model_len=64,
            num_sequences=4,
        )


TWO_PROCESSES = """
import sys, time, torch
from pathlib import Path
torch.distributed.init_process_group("gloo")
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.rollout.probe import SyncCheck, WeightSample, probe_ids
from components.rlhf.rollout.vllm import VllmRolloutEngine
from tests.rlhf.rollout.test_vllm import COLD, PROMPTS, hf, ids_of, model, probe, sampling, trained
rank, started = torch.distributed.get_rank(), time.time()
mine = PROMPTS[:4] if rank == 0 else PROMPTS[4:]  # of different size, so that a mix-up is detected
how, seeds = sampling(temperature=COLD, max_new_tokens=16), list(range(len(mine)))
for name in ("tied", "untied"):
    folder = Path(sys.argv[1]) / name
    for parallel in (1, 2):
        settings = VllmConfig(tensor_parallel_size=parallel, kv_cache_gib=0.05)
        engine = VllmRolloutEngine(
            model(folder, 0), settings, stop_ids=(0,), dtype=torch.float32, max_model_len=200, num_sequences=16
        )
        for seed in (0, 1, 2):
            lm = trained(model(folder, seed))
            if seed:
                engine.sync(lm.named_parameters())
            found, expected = (e.generate(mine, how, seeds) for e in (engine, hf(model(folder, seed))))
            assert ids_of(found) == ids_of(expected), (rank, parallel, seed, ids_of(found), ids_of(expected))
            ids = probe_ids(engine.tokenizer)
            SyncCheck(torch.float32).check(
                engine.weight_samples(), engine.prompt_logprobs(ids), probe(lm, ids), version=engine.version
            )
        engine.close()
        left = [path.name for path in Path("/dev/shm").glob("*-tp:0-0-1_*") if path.stat().st_mtime > started]
        assert not left, left  # memory that the ranks shared
        total = torch.ones(1)
        torch.distributed.all_reduce(total)  # the trainer's process group still works
        assert total.item() == 2
    print(f"rank {rank} is done with {name}", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Two processes that run TWO_PROCESSES: first with models whose head is tied to the embedding, then with untied ones."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("tied", "untied"):
        for seed in range(3):
            model(folder / name, seed, sure=True, tied=name == "tied")
    script = folder / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_two_processes_with_one_engine_each_and_with_a_shared_one(
    two_processes: subprocess.CompletedProcess[str], name: str
) -> None:
    assert all(f"rank {rank} is done with {name}" in two_processes.stdout for rank in (0, 1)), two_processes.stderr[
        -8000:
    ]
    assert two_processes.returncode == 0 or name == "tied", two_processes.stderr[-8000:]
