"""Attention modules with fewer heads, or narrower ones: what stands in for them, and what they hold."""
