"""Submitting to Kubeflow Pipelines: checks, uploads, versions, runs and sweeps.

Imports: artifacts, config, storage, text, tracking.
Packages: certifi, kfp, kfp_server_api, kubernetes, urllib3, yaml.

Nothing here imports torch.
"""
