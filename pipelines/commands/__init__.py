"""The commands of kfp-rlhf, one file for those of one kind; pipelines/__main__.py is their group.

Imports: checkpoints, config, storage, text, tracking.
Packages: click, rich.

Nothing here imports torch, and a command imports what it needs when it runs, so that --help takes no time.
"""
