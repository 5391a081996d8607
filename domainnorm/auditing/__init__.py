"""What is wrong with the norms of a model, how bad it is, and what repairs it."""

from .audit import audit
from .finding import Finding, Place, Thresholds
from .report import Report

__all__ = ["Finding", "Place", "Report", "Thresholds", "audit"]
