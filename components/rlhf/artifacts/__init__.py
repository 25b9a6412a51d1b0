"""Artifacts that stages exchange on disk: manifests, atomic writes and verification.

Imports: text.
Packages: pydantic.

It is independent of training and KFP.
"""
