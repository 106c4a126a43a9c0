"""Pruned models in files, and the recipes that make room for their weights."""
