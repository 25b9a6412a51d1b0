"""Checkpoints of a training stage: write, verify, find the latest complete one, restore, and let one process write at a time.

Imports: artifacts, config, engine, storage, text.
Packages: pydantic, safetensors, torch.

It knows nothing of PPO. A checkpoint is not an artifact: it belongs to one stage of one run, and is deleted when the
stage succeeds.
"""
