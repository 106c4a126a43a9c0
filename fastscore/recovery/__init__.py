"""What the smaller network is given back, without labels."""
