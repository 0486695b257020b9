"""The forward process and its family: sections 2 and 3.1 and appendix A of the paper.

Noise schedules, timesteps, the Gaussian and the categorical marginals and posteriors, the joint distributions, what
networks predict, the ODE, and the random streams. It imports `errors` and `names` only.
"""
