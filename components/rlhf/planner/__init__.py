"""What a run needs, before it starts: bytes, seconds and money, from its settings and the shape of its models.

Imports: config, storage, text.
Packages: pydantic.
Packages of hub.py: huggingface_hub.

It loads no weights and imports neither torch nor transformers, because runs are submitted from machines without them.
"""
