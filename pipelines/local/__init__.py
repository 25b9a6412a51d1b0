"""Running the compiled pipeline on this machine, through kfp.local.

Imports: artifacts, config, runtime, text, tracking.
Packages: jinja2, kfp, rich, yaml.

Nothing here imports torch.
"""
