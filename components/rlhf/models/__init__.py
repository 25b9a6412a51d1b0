"""The actor, the scalar head that reward model and critic share, frozen layers, adapters, loading and saving.

Rooms: config, data, maths, text.
Packages: peft, torch, transformers.
Packages of lora.py: safetensors.
Packages of loading.py: accelerate.

It has no optimizers and no loops over data.
"""
