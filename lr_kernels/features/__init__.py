"""Operators on features and attention maps."""
