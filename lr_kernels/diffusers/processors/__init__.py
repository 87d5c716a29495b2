"""Attention processors, their installation on a model, and which keys and values they read."""
