"""Normalisations over channels, with fewer of them."""
