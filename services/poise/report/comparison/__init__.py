"""Compares several runs: statistics, tables and figures from their run folders. Runs may be unfinished."""

from poise.report.comparison.report import write_comparison
from poise.report.comparison.summary import ComparedRun, Comparison, State

__all__ = ["ComparedRun", "Comparison", "State", "write_comparison"]
