"""What is changed in a copy of a model so that a scoring pass is fast."""
