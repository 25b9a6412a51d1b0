"""Scorers and pairwise judges of responses: the reward model, the linear judge, endpoints and Python functions.

Imports: config, data, models, storage, text.
Packages: pydantic, torch, transformers.
Packages of agreement.py: numpy, scipy.
Packages of endpoint.py: requests, urllib3.
Packages of linear.py: numpy, safetensors, scipy, sklearn.

It does not depend on advantages or engines.
"""
