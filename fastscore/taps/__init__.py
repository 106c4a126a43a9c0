"""Where activation meets gradient."""
