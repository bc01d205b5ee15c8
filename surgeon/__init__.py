"""surgeon: a compiler for operating on trained models."""
