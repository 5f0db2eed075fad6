"""NVIDIA FLARE as the engine: config-only jobs of two installed classes, which carry bytes, no torch."""
