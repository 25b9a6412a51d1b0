"""Rewards and judges of responses: the reward model, Python functions, servers, checks against the data, and pairwise judges.

Imports: config, data, models, storage, subprocesses, text.
Packages: pydantic, torch, transformers.
Packages of agreement.py: numpy, scipy.
Packages of checks.py: jsonschema, math_verify, referencing.
Packages of posting.py: requests, urllib3.
Packages of linear.py: numpy, safetensors, scipy, sklearn.

It does not depend on advantages or engines.
"""
