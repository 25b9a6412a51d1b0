"""The DAG.

import_model -> prepare_data -> sft -> reward_model -> ppo -> evaluation -> gate -> register
                            \\-> judge ----------------------/
and notify at the end, whether the run succeeds or fails. With policy.method dpo, sft -> dpo -> evaluation replace reward_model and ppo;
with both, the two branches are side by side, the evaluation of DPO follows that of PPO, and the gate takes the better one.

Without a reward model among its rewards, a run has no reward_model task; with code of the user it has import_code, for judge, ppo and
evaluation. placement.py sets the image, node and resources of each task.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from kfp import dsl
from kfp.dsl import Input

from components.artifact_types import Evaluation, PolicyManifest
from components.dpo.component import dpo
from components.evaluation.component import EVALUATION
from components.import_code.component import import_code
from components.import_model.component import import_model, import_reward_model, import_sft_model
from components.judge.component import JUDGE
from components.notify.component import notify
from components.ppo.component import PPO
from components.prepare_data.component import prepare_data
from components.register.component import register
from components.reward_model.component import reward_model
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.policy import TITLES
from components.sft.component import sft
from pipelines import placement
from pipelines.access import cluster_storage
from pipelines.claim import create_checkpoint_claim
from pipelines.settings import (
    dump_yaml,
    evaluation_settings,
    import_settings,
    judge_reward_model_settings,
    register_settings,
    settings_of_stage,
)
from pipelines.trainjob import configure_launcher

NAME = "rlhf"


def build_pipeline(params: Params) -> Any:
    """The pipeline of a params file. Its inputs are the tracking and storage settings and the placement on GPU nodes.

    A local run passes its own storage settings, and creates no volume for checkpoints.
    """

    @dsl.pipeline(name="gate", description="Registers the policy; only a promoted one becomes champion.")
    def gate(decision: str, policy: Input[PolicyManifest], verdict: Input[Evaluation], tracking: str) -> None:
        # A nested pipeline, because kfp.local evaluates a condition on a component's named output as false.
        for branch in ("promote", "reject"):
            with dsl.If(decision == branch, name=branch):
                settings = register_settings(params, branch)
                task = register(policy=policy, evaluation=verdict, settings=settings, tracking=tracking)
                placement.configure_task(task, "register", params)

    @dsl.pipeline(name="better", description="Takes the better one of two policies to the gate.")
    def better_gate(
        better: str,
        ppo_decision: str,
        ppo_policy: Input[PolicyManifest],
        ppo_verdict: Input[Evaluation],
        dpo_decision: str,
        dpo_policy: Input[PolicyManifest],
        dpo_verdict: Input[Evaluation],
        tracking: str,
    ) -> None:
        with dsl.If(better == "ppo", name="ppo"):
            gate(decision=ppo_decision, policy=ppo_policy, verdict=ppo_verdict, tracking=tracking)
        with dsl.If(better == "dpo", name="dpo"):
            gate(decision=dpo_decision, policy=dpo_policy, verdict=dpo_verdict, tracking=tracking)

    defaults = {
        "tracking": params.tracking.canonical_json(),
        "storage": cluster_storage(params).canonical_json(),
        **placement.node_inputs(params),
    }

    def rlhf(*values: Any) -> None:
        inputs = dict(zip(defaults, values, strict=True))
        tracking = inputs["tracking"]
        shared = {"tracking": tracking, "storage": inputs["storage"]}
        claim = None

        def configure(task: Any, stage: str, name: str = "", source: str = "") -> Any:
            if params.cluster.launches(stage):
                configure_launcher(task, stage, params)
            else:
                placement.configure_task(task, stage, params, source=source, inputs=inputs, claim=claim)
            return task.set_display_name(name or stage.replace("_", " "))

        def import_task(kind: Any, source: str, name: str, revision: str | None = None) -> Any:
            component = {"sft_model": import_sft_model, "reward_model": import_reward_model}.get(kind, import_model)
            task = component(settings=import_settings(params, kind, source, revision), **shared)
            return configure(task, "import_model", name, source)

        settings = NotifyStageConfig(
            preset=params.preset, ui_url=params.cluster.ui_url, params=dump_yaml(params)
        ).canonical_json()
        exit_task = configure(notify(settings=settings, **shared), "notify")
        with dsl.ExitHandler(exit_task, name="run"):
            if placement.uses_checkpoint_volume(params):
                claim = create_checkpoint_claim(params, inputs)
            import_model_task = import_task("base_model", params.model.source, "import model", params.model.revision)
            base_model, tokenizer = import_model_task.outputs["model"], import_model_task.outputs["tokenizer"]

            prepare_data_task = prepare_data(
                tokenizer=tokenizer,
                settings=settings_of_stage(params, "prepare_data"),
                **shared,
            )
            datasets = configure(prepare_data_task, "prepare_data").outputs

            if params.sft.use:
                sft_task = import_task("sft_model", params.sft.use, "import SFT model")
            else:
                sft_task = sft(
                    base_model=base_model,
                    demonstrations=datasets["demonstrations"],
                    settings=settings_of_stage(params, "sft"),
                    **shared,
                )
                configure(sft_task, "sft", "SFT")
            sft_model = sft_task.outputs["model"]

            # Optional inputs of tasks, by name.
            code: dict[str, Any] = {}
            first_model: dict[str, Any] = {}
            second_model: dict[str, Any] = {}
            if params.code.is_given:
                code_task = import_code(settings=settings_of_stage(params, "import_code"), **shared)
                configure(code_task, "import_code", source=params.code.path or "")
                code = {"code": code_task.outputs["code"]}

            if params.uses_reward_model:
                start_model = base_model
                if params.reward_model.use:
                    start_model = import_task("reward_model", params.reward_model.use, "import reward model").outputs[
                        "model"
                    ]
                reward_model_task = reward_model(
                    base_model=start_model,
                    sft_model=sft_model,
                    preferences=datasets["preferences"],
                    prompts=datasets["prompts"],
                    settings=settings_of_stage(params, "reward_model"),
                    **shared,
                )
                configure(reward_model_task, "reward_model")
                first_model = {"reward_model": reward_model_task.outputs["model"]}

            if params.reward_model_judge:
                start_model, use = base_model, params.reward_model_judge.use
                if use:
                    start_model = import_task("reward_model", use, "import judge model").outputs["model"]
                second_task = reward_model(
                    base_model=start_model,
                    sft_model=sft_model,
                    preferences=datasets["judge_preferences"],
                    prompts=datasets["prompts"],
                    settings=judge_reward_model_settings(params),
                    **shared,
                )
                configure(second_task, "reward_model", "judge reward model")
                second_model = {"reward_model": second_task.outputs["model"]}
                if claim and first_model:  # only one node at a time can mount the volume of the checkpoints
                    second_task.after(reward_model_task)

            judge_task = JUDGE[frozenset(second_model | code)](
                preferences=datasets["judge_preferences"],
                tokenizer=tokenizer,
                settings=settings_of_stage(params, "judge"),
                **second_model,
                **code,
                **shared,
            )
            configure(judge_task, "judge")

            # By method: its training task, and the task that evaluates its policy.
            policies: dict[str, Any] = {}
            if params.runs("ppo"):
                mixed = {"demonstrations": datasets["demonstrations"]} if params.ppo.ptx_coef else {}
                policies["ppo"] = PPO[frozenset(first_model | code | mixed)](
                    sft_model=sft_model,
                    prompts=datasets["prompts"],
                    settings=settings_of_stage(params, "ppo"),
                    **first_model,
                    **code,
                    **mixed,
                    **shared,
                )
            if params.runs("dpo"):
                policies["dpo"] = dpo(
                    sft_model=sft_model,
                    preferences=datasets["preferences"],
                    settings=settings_of_stage(params, "dpo"),
                    **shared,
                )
            evaluations: dict[str, Any] = {}
            rival: dict[str, Any] = {}
            for method, task in policies.items():
                configure(task, method, TITLES[method])
                task.after(judge_task)  # a judge that fails or cannot tell is known before the hours of training
                evaluation_task = EVALUATION[frozenset(first_model | code | rival)](
                    sft_model=sft_model,
                    policy=task.outputs["model"],
                    judge=judge_task.outputs["judge"],
                    prompts=datasets["heldout_prompts"],
                    settings=evaluation_settings(params, method),
                    **first_model,
                    **code,
                    **rival,
                    **shared,
                )
                configure(evaluation_task, "evaluation", f"{TITLES[method]} evaluation" if len(policies) > 1 else "")
                evaluations[method] = evaluation_task
                rival = {"rival": evaluation_task.outputs["evaluation"]}
            if claim and len(policies) > 1:  # only one node at a time can mount the volume of the checkpoints
                policies["dpo"].after(policies["ppo"])

            verdicts = {
                method: {
                    "decision": evaluations[method].outputs["decision"],
                    "policy": task.outputs["manifest"],
                    "verdict": evaluations[method].outputs["evaluation"],
                }
                for method, task in policies.items()
            }
            if len(policies) > 1:
                given = {f"{method}_{name}": value for method, own in verdicts.items() for name, value in own.items()}
                better_gate(better=evaluations["dpo"].outputs["better"], tracking=tracking, **given)
            else:
                gate(tracking=tracking, **next(iter(verdicts.values())))
            if claim:
                claim.delete(after=list(policies.values()))

    return dsl.pipeline(name=NAME, description="RLHF: SFT, reward model, PPO, held-out comparison, gate.")(
        with_inputs(rlhf, defaults)
    )


def with_inputs(function: Any, defaults: Mapping[str, Any]) -> Any:
    """The function with one parameter for each default, of its type, which KFP makes an input of the pipeline."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, default=value, annotation=type(value)) for name, value in defaults.items()]
    )
    return function
