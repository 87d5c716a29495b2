"""Attention over several sources: the public functions, and what they make of their arguments."""
