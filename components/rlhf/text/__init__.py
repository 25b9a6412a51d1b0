"""Input and output of text: strict JSON and YAML, credentials, redaction, progress and error messages.

Imports: none.
Packages: yaml.

It imports no other package of the library and nothing that is slow to import.
"""
