"""``inferway.optimize``: try what makes a model smaller or faster, measure all of it in one run, and choose.

Candidates are made by `techniques` (with `quantise` and `prune`), timed by `measure`, judged by `metrics` on rows that
calibrated nothing, and told by `report`.
"""

from .api import optimize
from .report import Candidate, OptimizationReport, OutputDifference

__all__ = ["Candidate", "OptimizationReport", "OutputDifference", "optimize"]
