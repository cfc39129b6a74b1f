"""What is read: chips found, decoded once, augmented by the batch, drawn by index, simulated."""

import ctypes
import os
import sys

# Set before torch loads OpenMP: threads that wait spin for the gap between two operations, then
# sleep. Those that only spin lose most of their time wherever another process shares the cores,
# those that only sleep wake late (with two busy processes beside it a small network trains at 196
# images/s spinning, 253 sleeping, 323 so; alone on two cores at 678, 637 and 679).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# glibc keeps the memory of large tensors instead of handing it back after every step and clearing
# it anew: inputs of 224 px come a fifth faster, and a network of that size trains a fifth faster.
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)
