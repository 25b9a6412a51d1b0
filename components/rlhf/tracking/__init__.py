"""MLflow: runs, metrics and the model registry.

Rooms: config, text.
Packages: mlflow.

It never fails a run, and knows nothing of tensors.
"""
