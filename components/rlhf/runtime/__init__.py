"""The frame of every stage program: options, tracking, errors, KFP's executor protocol, processes and memory.

Imports: artifacts, checkpoints, config, data, engine, planner, storage, text, tracking, trainjob.
Packages: click, pydantic.
Packages of accelerators.py: torch.
Packages of job.py: torch.
Packages of launcher.py: torch.
Packages of measured.py: torch.
Packages of memory.py: torch.
Packages of planned.py: torch.
Packages of training.py: torch.

It is independent of models and losses.
"""
