"""A stage as a TrainJob of Kubeflow Trainer: the task of the pipeline creates it, waits for it, and takes over its outputs.

Imports: artifacts, checkpoints, config, storage, text.
Packages: pydantic.
Packages of api.py: kubernetes, urllib3.

exchange.py is the shared storage through which task and pods exchange inputs and outputs; worker.py is the side of the pods, which call
no Kubernetes API.
"""
