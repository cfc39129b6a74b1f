"""What is read: chips found, decoded once, augmented by the batch, drawn by index, simulated."""
