"""Stands before timm on the path of processes that tests start, where nothing needs it: Torch-Pruning imports it where
it is, with all that it takes along, for seconds."""

raise ImportError("left out by tests/helpers/without_timm")
