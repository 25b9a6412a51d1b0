"""Engines that turn losses into optimizer steps: plain torch and DeepSpeed behind one protocol, and the process group.

Imports: config, text.
Packages: safetensors, torch.
Packages of deepspeed.py: deepspeed.

It knows nothing of PPO.
"""
