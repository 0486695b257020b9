"""Training objectives and bounds: section 3.2, Theorem 1 and appendices B and C of the paper.

The weighted squared error, the cross-entropy, how timesteps are drawn, and the variational bounds. It imports `plan`,
`process` and what is below.
"""

from ddim.objective.cross_entropy import CrossEntropy
from ddim.objective.mse import Objective, weights

__all__ = ["CrossEntropy", "Objective", "weights"]
