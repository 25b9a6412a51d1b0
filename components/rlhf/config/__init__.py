"""One validated pydantic model per stage, and the model of the whole params file.

Rooms: text.
Packages: pydantic.

It reads no file, environment variable or device.
"""
