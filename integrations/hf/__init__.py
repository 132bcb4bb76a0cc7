"""Doors from transformers to the engine."""
