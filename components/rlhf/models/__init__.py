"""The actor, the scalar model (reward model and critic), frozen layers, LoRA adapters, loading and saving.

Imports: config, data, maths, text.
Packages: peft, safetensors, torch, transformers.

It has no optimizers and no training loops.
"""
