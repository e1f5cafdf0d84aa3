"""Games to record frames from."""
