"""Experiment tracking and model registry in MLflow.

Rooms: config, text.
Packages: mlflow.

Failures of MLflow are warnings and never fail a run.
"""
