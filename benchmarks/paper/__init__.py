"""The experiment of arXiv 2310.20203: score once, remove channels by masking, see what accuracy is left."""
