"""The actor, the scalar model (reward model and critic), frozen layers, LoRA adapters, weights in 4 bits, loading and saving.

Imports: config, data, maths, text.
Packages: peft, safetensors, torch, transformers.
Packages of nf4.py: bitsandbytes.

It has no optimizers and no training loops.
"""
