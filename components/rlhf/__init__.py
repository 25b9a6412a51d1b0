"""The shared library, by topic. What a package holds and may import is the docstring of its `__init__.py`."""
