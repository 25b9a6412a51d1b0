"""The stages of the DAG, and `rlhf`, the library that they share."""
