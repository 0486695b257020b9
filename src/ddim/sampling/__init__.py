"""Running a plan: sections 4, 5.3 and 5.4 of the paper.

The sampling loop, micro-batches, guidance, hooks on x_0, inversion, latents, tuning, and parallel sampling. This
package imports `samplers`, `objective` and lower layers.
"""
