"""Processes for code that may hang, crash or leak: one side starts and asks them, the other serves requests and loads the user's code.

Imports: none.
Packages: none.

It knows nothing of what the code computes.
"""
