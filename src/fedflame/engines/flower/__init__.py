"""Flower as the engine: a ServerApp and a ClientApp of installed modules, which carry bytes, no torch."""
