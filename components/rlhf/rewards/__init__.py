"""Everything that turns (prompt, response) into one number: the reward model and the linear judge.

Rooms: data, models, text.
Packages: torch, transformers.
Packages of linear.py: numpy, pydantic, safetensors, sklearn.

It knows nothing of advantages and engines.
"""
