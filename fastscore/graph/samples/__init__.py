"""Which rows of what a layer reads belong to which sample."""
