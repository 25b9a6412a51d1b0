"""Text that people and programs read: strict JSON and YAML, credentials, redaction, progress and error messages.

Rooms: none.
Packages: yaml.

It needs no other room and nothing that takes long to import.
"""
