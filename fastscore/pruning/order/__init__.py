"""In which order channels go."""
