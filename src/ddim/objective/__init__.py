"""Training objectives and bounds: section 3.2, Theorem 1 and appendices B and C of the paper.

The weighted squared error, the cross-entropy, the sampling of timesteps, and the variational bounds. Imports `plan`,
`process` and the packages below them.
"""

from ddim.objective.cross_entropy import CrossEntropy
from ddim.objective.mse import Objective, weights

__all__ = ["CrossEntropy", "Objective", "weights"]
