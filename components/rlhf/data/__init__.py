"""Record types, readers, cleaning, splits, chat templates, tokenization and batches.

Imports: config, maths, text.
Packages: datasets, datasketch, numpy, pyarrow, pydantic, torch, transformers.
Packages of token_files.py: safetensors.

It has no models and no losses; it uses only the tokenizers of transformers.
"""
