"""Artifacts that stages exchange on disk: manifests, atomic writes and verification.

Rooms: text.
Packages: pydantic.

It is independent of training and KFP.
"""
