"""Record types, readers, cleaning, splits, chat templates, tokenization and batches.

Imports: config, maths, text.
Packages: datasets, datasketch, numpy, pyarrow, pydantic, torch, transformers.

It has no models and no losses; it uses only the tokenizers of transformers.
"""
