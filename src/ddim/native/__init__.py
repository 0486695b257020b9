"""The network's fast path on CPUs without bf16 matrix units: float32 kernels of our own."""
