"""Channels taken out of layers, buffers, parameters and the widths that code holds."""
