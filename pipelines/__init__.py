"""The DAG, where its tasks run, and the params file that describes a run.

Imports: artifacts, config, data, planner, runtime, storage, text.
Packages: click, jinja2, kfp, lm_eval, pydantic, pydantic_core, rich, yaml.

Nothing here imports torch: compiling and submitting work on a machine without it.
"""
