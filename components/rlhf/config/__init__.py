"""One validated pydantic model per stage, and the model of the whole params file.

Imports: text.
Packages: pydantic.
Packages of scoring.py: jsonschema.

It reads no file, environment variable or device.
"""
