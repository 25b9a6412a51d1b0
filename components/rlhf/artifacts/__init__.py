"""What is on disk between stages: the manifest of an artifact, atomic writes, and verification.

Rooms: text.
Packages: pydantic.

It knows nothing of training or of KFP.
"""
