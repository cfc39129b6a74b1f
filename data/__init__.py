"""What is read: chips found, decoded once, augmented by the batch, drawn by index, simulated."""

import os

# Set before torch loads OpenMP: threads that wait asleep. Those that wait spinning lose most of
# their time wherever another process shares the cores (training at 147 instead of 455 images/s
# on two cores with two busy processes beside it, against 545 instead of 503 alone).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
