"""Makes vectors/preferences.json with TRL's own trainers, in an environment of its own:

    uv venv /tmp/trl && uv pip install --python /tmp/trl/bin/python -r benchmarks/peers/trl-1.12.txt
    /tmp/trl/bin/python tests/golden/make_preferences.py

(the file pins trl==1.12.0 and torch==2.13.0). The log-probs of each case are seeded random numbers on a grid of 1/1024, which every dtype
has exactly. A stand-in for the model returns them, so that TRL's loss functions run unchanged: every token of a row has two
possible ids, and the logits of the label and of the other one give the label its log-prob. TRL's loss is the mean over the batch; losses
per pair come from batches of one.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

OUTPUT = Path(__file__).parent / "vectors" / "preferences.json"
SIZES = {
    "short": [1, 2, 3, 1],
    "unequal": [7, 1, 3, 10],
    "one": [4],
}  # tokens of the answers; rejected ones in reverse order
EXTREME = 40.0  # log-ratios of this size saturate every sigmoid


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


class Model:
    """Gives the next token of each row the log-prob of a table [B, T], by logits of a vocabulary of two: the label is always 1."""

    training = True

    def __init__(self, logprobs: Tensor) -> None:
        self.logprobs = logprobs

    def __call__(self, **_: object) -> SimpleNamespace:
        # log sigmoid(x) = logprob  <=>  x = logprob - log(1 - exp(logprob)); the logit of id 0 is 0.
        x = self.logprobs - torch.log(-torch.expm1(self.logprobs))
        logits = torch.stack([torch.zeros_like(x), x], dim=-1)
        return SimpleNamespace(logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))


def table(lengths: list[int], generator: torch.Generator, *, scale: float) -> tuple[Tensor, Tensor]:
    """Log-probs [B, T] below 0 in float64 on the grid, -1 at padding, and their mask."""
    width = max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    values = -scale * torch.rand(len(lengths), width, generator=generator, dtype=torch.float64) - 2**-6
    return torch.where(mask, (values * 1024).round() / 1024, -1.0), mask


def inputs_of(masks: Tensor) -> dict[str, Tensor]:
    """A prompt of one token before each answer."""
    completion = torch.cat([torch.zeros_like(masks[:, :1]), masks], dim=1).long()
    ids = torch.ones_like(completion)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def stub(trainer: type, **fields: object) -> object:
    """A trainer without its constructor, with the attributes that its loss reads."""
    made = trainer.__new__(trainer)
    for name, value in {"accelerator": Accelerator(), "aux_loss_enabled": False, **fields}.items():
        setattr(made, name, value)
    made._metrics = defaultdict(lambda: defaultdict(list))
    made._total_train_tokens = 0
    made.model = SimpleNamespace(training=True)
    return made


def paired(
    loss: str, policy: Tensor, reference: Tensor, mask: Tensor, params: dict
) -> tuple[Tensor, dict[str, list[float]]]:
    """TRL's loss of chosen and rejected rows [2N, T], and its metrics."""
    if loss in ("simpo", "cdpo"):
        return cpo(loss, policy, reference, mask, params)
    names = {"dpo": "sigmoid", "ipo": "ipo", "robust": "robust"}
    trainer = stub(
        DPOTrainer,
        beta=params["beta"],
        label_smoothing=params.get("label_smoothing", 0.0),
        loss_types=[names[loss]],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=True,
    )
    sums = torch.where(mask, reference, 0).sum(1)
    extra = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), sums.chunk(2), strict=True))
    found = trainer._compute_loss(Model(policy), inputs_of(mask) | extra, return_outputs=False)
    metrics = trainer._metrics["train"]
    return found, {name: metrics[name] for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies")}


def cpo(
    loss: str, policy: Tensor, reference: Tensor, mask: Tensor, params: dict
) -> tuple[Tensor, dict[str, list[float]]]:
    """SimPO on mean log-probs; cDPO, which DPOTrainer no longer has, as CPO's smoothed sigmoid on log-ratios."""
    trainer = stub(
        CPOTrainer,
        beta=params["beta"],
        label_smoothing=params.get("label_smoothing", 0.0),
        simpo_gamma=params.get("gamma", 0.0),
        loss_type="simpo" if loss == "simpo" else "sigmoid",
        alpha=0.0,
    )
    sums = torch.where(mask, policy, 0).sum(1)
    if loss == "simpo":
        values = sums / mask.sum(1)
    else:
        values = sums - torch.where(mask, reference, 0).sum(1)
    losses, chosen, rejected = trainer.cpo_loss(*values.chunk(2))
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")
    means = (chosen.mean(), rejected.mean(), (chosen > rejected).double().mean())
    return losses.mean(), {name: [mean.item()] for name, mean in zip(names, means, strict=True)}


def kto(
    policy: Tensor, reference: Tensor, mask: Tensor, labels: list[bool], mismatched: dict, params: dict
) -> tuple[Tensor, dict]:
    trainer = stub(
        KTOTrainer,
        beta=params["beta"],
        desirable_weight=params["desirable_weight"],
        undesirable_weight=params["undesirable_weight"],
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
    )
    policy_kl, reference_kl = (torch.tensor(mismatched[name], dtype=torch.float64) for name in ("policy", "reference"))
    trainer._compute_kl_logps = lambda model, batch: policy_kl
    batch = inputs_of(mask) | {
        "label": torch.tensor(labels),
        "ref_logps": torch.where(mask, reference, 0).sum(1),
        "ref_KL_logps": reference_kl,
    }
    found = trainer._compute_loss(Model(policy), batch, return_outputs=False)
    return found, dict(trainer._metrics["train"])


def case(name: str, source: str, inputs: dict, params: dict, expected: dict) -> dict:
    return {
        "name": name,
        "source": f"TRL {trl.__version__} {source}",
        "dtype": "float64",
        "inputs": inputs,
        "params": params,
        "expected": expected,
        "atol": 1e-9,
        "rtol": 1e-9,
        "masked_outputs": ["grad"],
        "note": "",
    }


SOURCES = {
    "dpo": "trl/trainer/dpo_trainer.py:DPOTrainer._compute_loss",
    "ipo": "trl/trainer/dpo_trainer.py:DPOTrainer._compute_loss",
    "robust": "trl/trainer/dpo_trainer.py:DPOTrainer._compute_loss",
    "cdpo": "trl/experimental/cpo/cpo_trainer.py:CPOTrainer.cpo_loss",
    "simpo": "trl/experimental/cpo/cpo_trainer.py:CPOTrainer.cpo_loss",
    "kto": "trl/trainer/kto_trainer.py:KTOTrainer._compute_loss",
}
PARAMS = [
    *({"loss": "dpo", "beta": beta} for beta in (0.01, 0.1, 1.0)),
    *({"loss": "ipo", "beta": beta} for beta in (0.05, 0.5)),
    *({"loss": loss, "beta": beta, "label_smoothing": e}
      for loss in ("cdpo", "robust") for beta, e in ((0.1, 0.1), (0.5, 0.3), (1.0, 0.49))),
    *({"loss": "simpo", "beta": beta, "gamma": gamma} for beta, gamma in ((2.0, 1.0), (10.0, 0.0), (2.5, 3.0))),
]  # fmt: skip
KTO_PARAMS = [
    {"loss": "kto", "beta": beta, "desirable_weight": d, "undesirable_weight": u}
    for beta, d, u in ((0.1, 1.0, 1.0), (0.5, 1.33, 1.0), (0.02, 1.0, 4.0))
]


def paired_cases() -> list[dict]:
    cases = []
    for kind, lengths in SIZES.items():
        for scale in (1.0, EXTREME):
            generator = torch.Generator().manual_seed(len(cases) + 1)
            rows = [*lengths, *lengths[::-1]]
            policy, mask = table(rows, generator, scale=2.0 if scale == 1.0 else scale)
            reference, _ = table(rows, generator, scale=2.0)
            inputs = {"logp": policy.tolist(), "ref_logp": reference.tolist(), "mask": mask.long().tolist()}
            for params in PARAMS:
                leaf = policy.clone().requires_grad_()
                loss, metrics = paired(params["loss"], leaf, reference, mask, params)
                loss.backward()
                size = len(lengths)
                each = [torch.tensor([row, row + size]) for row in range(size)]
                losses = [paired(params["loss"], policy[r], reference[r], mask[r], params)[0].item() for r in each]
                values = "-".join(str(value) for name, value in params.items() if name != "loss")
                expected = {"loss": loss.item(), "losses": losses, "grad": leaf.grad.tolist()}
                expected |= {name.replace("/", "_"): value[-1] for name, value in metrics.items()}
                name = f"{params['loss']}-{values}/{kind}/{'extreme' if scale > 1 else 'normal'}"
                cases.append(case(name, SOURCES[params["loss"]], inputs, params, expected))
    return cases


def kto_cases() -> list[dict]:
    cases = []
    labels = {"mixed": [True, False, False, True], "good": [True] * 4, "bad": [False] * 4}
    for kind, is_desirable in labels.items():
        for shift in (-3.0, 3.0):  # the KL is clamped at 0, or not
            generator = torch.Generator().manual_seed(100 + len(cases))
            policy, mask = table(SIZES["unequal"], generator, scale=2.0)
            reference, _ = table(SIZES["unequal"], generator, scale=2.0)
            grid = (torch.rand(2, 4, generator=generator, dtype=torch.float64) * 1024).round() / 1024
            mismatched = {"policy": (grid[0] - 20 + shift).tolist(), "reference": (grid[1] - 20).tolist()}
            inputs = {"logp": policy.tolist(), "ref_logp": reference.tolist(), "mask": mask.long().tolist()}
            inputs |= {
                "label": is_desirable,
                "mismatched_logp": mismatched["policy"],
                "mismatched_ref_logp": mismatched["reference"],
            }
            for params in KTO_PARAMS:
                leaf = policy.clone().requires_grad_()
                loss, metrics = kto(leaf, reference, mask, is_desirable, mismatched, params)
                loss.backward()
                expected = {"loss": loss.item(), "kl": metrics["kl"][-1], "grad": leaf.grad.tolist()}
                expected |= {
                    name.replace("/", "_"): metrics[name][-1]
                    for name in ("rewards/chosen", "rewards/rejected")
                    if name in metrics
                }
                values = "-".join(str(value) for name, value in params.items() if name != "loss")
                sign = "moved" if shift > 0 else "clamped"
                cases.append(case(f"kto-{values}/{kind}/{sign}", SOURCES["kto"], inputs, params, expected))
    return cases


def main() -> None:
    cases = [*paired_cases(), *kto_cases()]
    family = {
        "family": "preferences",
        "schema": 1,
        "description": "Losses on preferences, rewards, and gradients with respect to the log-probs of tokens.",
        "mask_polarity": "1 = real action token",
        "source": sorted({each["source"] for each in cases}),
        "torch": torch.__version__.partition("+")[0],
        "cases": cases,
    }
    OUTPUT.write_text(json.dumps(family, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(cases)} cases, {OUTPUT.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
