"""Rollout engines, which sample completions of prompts: transformers and vLLM behind one protocol.

Imports: config, data, models, text.
Packages: torch, transformers.
Packages of stopping.py: tokenizers, transformers.
Packages of vllm.py: vllm.
Packages of vllm_lora.py: safetensors, vllm.
Packages of vllm_process.py: vllm.

It does not depend on rewards or advantages.
"""
