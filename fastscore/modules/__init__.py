"""What is true of a user's modules, and what stands in for them."""
