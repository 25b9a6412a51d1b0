"""Running the compiled pipeline on this machine, through kfp.local.

Imports: artifacts, config, runtime, text, tracking.
Packages: kfp, rich.

Nothing here imports torch.
"""
