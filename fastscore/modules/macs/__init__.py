"""Multiply-accumulates (MACs), counted while a model runs."""
