"""Experiment tracking and model registry in MLflow.

Imports: artifacts, config, text.
Packages: mlflow.

Failures of MLflow are warnings and never fail a run.
Texts become filters, keys and URIs only in texts.py.
"""
