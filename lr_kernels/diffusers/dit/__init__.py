"""Diffusion transformers (DiTs): cached references that their attention reads in place, regions, and the method."""
