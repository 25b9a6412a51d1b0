"""Running the compiled pipeline on this machine, through kfp.local.

Imports: artifacts, config, data, maths, page, runtime, storage, text, tracking.
Packages: huggingface_hub, jinja2, kfp, rich, yaml.

Nothing here imports torch.
"""
