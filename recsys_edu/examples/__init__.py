"""Programs to run with torchrun, on one host or many; each is short enough to be copied and changed."""
