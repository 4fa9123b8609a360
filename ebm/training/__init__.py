"""The training of a run: the step, the loop and the state."""
