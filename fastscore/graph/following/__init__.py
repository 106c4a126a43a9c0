"""Where channels go from one operation of the traced run to the next."""
