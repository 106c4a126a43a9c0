"""Which channels go, and the smaller network."""
