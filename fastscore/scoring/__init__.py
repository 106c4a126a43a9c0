"""From batches to a score for every channel."""
