"""Federated fine-tuning of sparse-mixture-of-experts language models on unequal machines."""

__version__ = "0.1.0"
