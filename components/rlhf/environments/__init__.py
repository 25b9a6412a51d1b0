"""Environments that answer the turns of a response, such as tools: their protocol, a calculator, the user's own, and the play with a model.

Imports: config, data, maths, rewards, rollout, subprocesses, text.
Packages: torch.

It does not depend on advantages or engines of training.
"""
