"""What surrounds every stage program: options, config, tracking, errors, KFP's executor protocol, processes and memory.

Rooms: artifacts, checkpoints, config, data, engine, storage, text, tracking.
Packages: click, pydantic.
Packages of launcher.py: torch.
Packages of training.py: torch.

It knows nothing of models and of what is trained on which loss.
"""
