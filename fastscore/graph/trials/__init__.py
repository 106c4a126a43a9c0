"""Groups of channels tried on copies of the model, before they are offered."""
