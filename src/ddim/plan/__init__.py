"""A sampler is a plan: a table of coefficients, computed once in float64.

Its rows and checks for real-valued and for discrete data, its JSON file, and the comparison of two plans. It imports
`process` and what is below.
"""

from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.plan.row import Row

__all__ = ["CategoricalPlan", "Plan", "Row"]
