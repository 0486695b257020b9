"""While a plan runs: sections 4, 5.3 and 5.4 of the paper.

The one loop, micro-batches, guidance, hooks on x_0, inversion, latents, tuning, and parallel sampling. It imports
`samplers`, `objective` and what is below.
"""
