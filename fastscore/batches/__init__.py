"""How a batch reaches a model, and what comes back: tensors, (input, ...) tuples, dicts of keyword arguments, or
dataclasses."""
