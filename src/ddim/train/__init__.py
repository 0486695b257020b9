"""Training: the trainer, resumable runs and their folders, batch loading, time budgets, metrics and presets.

Also the mean squared error of eps at each timestep. Imports from `model` and the layers below it.
"""
