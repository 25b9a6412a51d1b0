"""Rollout engines, which sample completions of prompts: transformers and vLLM behind one protocol.

Imports: config, data, models, text.
Packages: torch, transformers.
Packages of vllm.py: vllm.

It does not depend on rewards or advantages.
"""
