"""Training: one optimizer step after another, each a function of the state before it and its number.

The trainer, the run and its folder, batches, time budgets, metrics, presets, and the error at each timestep. It imports
`model` and what is below.
"""
