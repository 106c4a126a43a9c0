"""Attention heads, and their dimensions, as channels."""
