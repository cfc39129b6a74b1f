"""The data: find chips, decode them once into an array, draw indices, make batches, augment them."""

import ctypes
import os
import sys

# OpenMP reads this when torch is loaded. A waiting thread spins for about the time between two
# operations, then sleeps. Threads that only spin lose time to other processes on the same cores;
# threads that only sleep wake up late. Images/s of a small network on two cores, with spinning only,
# sleeping only, and this setting: 196, 253 and 323 beside two busy processes, 678, 637 and 679 alone.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# glibc keeps the memory of large tensors instead of returning it to the system after each step and
# clearing it again: inputs of 224 px are made a fifth faster, and a network of that size trains a
# fifth faster.
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest value that glibc accepts
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)
