"""A scoring pass, a training step, a run."""
