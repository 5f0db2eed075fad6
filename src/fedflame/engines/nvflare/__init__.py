"""NVIDIA FLARE as the engine. Jobs are configuration for two installed classes that carry bytes, no torch."""
