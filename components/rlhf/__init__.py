"""The shared library, sorted into rooms. What a room holds and may import is the docstring of its `__init__.py`."""
