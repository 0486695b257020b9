"""Plans: a sampler as a table of float64 coefficients, computed once.

Rows and checks for real-valued and for discrete data, the JSON format, and the comparison of two plans. Imports
`process` and the packages below it.
"""

from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.plan.row import Row

__all__ = ["CategoricalPlan", "Plan", "Row"]
