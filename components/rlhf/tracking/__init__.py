"""Experiment tracking and model registry in MLflow.

Imports: config, text.
Packages: mlflow.

Failures of MLflow are warnings and never fail a run.
"""
