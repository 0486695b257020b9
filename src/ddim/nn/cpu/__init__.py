"""The fast path on CPUs without bfloat16 matrix units: float32 kernels of our own, and which units there are."""
