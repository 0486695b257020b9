"""The fast path on CPUs without bfloat16 matrix units: C++ float32 kernels, and detection of bfloat16 units."""
