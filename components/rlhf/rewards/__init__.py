"""Scorers of (prompt, response) pairs: the reward model and the linear judge.

Imports: data, models, text.
Packages: torch, transformers.
Packages of linear.py: numpy, pydantic, safetensors, sklearn.

It does not depend on advantages or engines.
"""
