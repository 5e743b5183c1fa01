"""What keeps zeros through a training: gradients, optimizers and their moments."""
