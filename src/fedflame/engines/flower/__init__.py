"""Flower as the engine. A ServerApp and a ClientApp from installed modules carry bytes, without torch."""
