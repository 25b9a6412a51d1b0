"""One validated pydantic model per stage, and the params file that they are cut from.

Rooms: text.
Packages: pydantic.

It reads no file, environment variable or device.
"""
