"""Engines that turn prompts into completions: transformers and vLLM behind one protocol.

Rooms: config, data, models, text.
Packages: torch, transformers.
Packages of vllm.py: vllm.

It knows nothing of rewards and advantages.
"""
