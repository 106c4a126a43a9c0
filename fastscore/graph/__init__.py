"""Which channels go together, and surgery on them."""
