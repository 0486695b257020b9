"""The forward process and its family: sections 2 and 3.1 and appendix A of the paper.

Noise schedules, timesteps, Gaussian and categorical marginals and posteriors, joint distributions, prediction
parameterizations, the ODE, and random streams. Imports `_io`, `errors` and `names` only.
"""
