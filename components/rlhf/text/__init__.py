"""Input and output of text: strict JSON and YAML, credentials, redaction, progress and error messages.

Imports: none.
Packages: yaml.
Packages of words.py: regex.

It imports no other package of the library and nothing that is slow to import.
"""
