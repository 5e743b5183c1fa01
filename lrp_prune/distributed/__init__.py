"""Models and tensors that are divided among processes, and what processes agree on."""
