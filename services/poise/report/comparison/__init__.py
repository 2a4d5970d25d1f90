"""What several runs come to side by side: arithmetic, tables and plots, all from the files in their folders.

Knows no service and starts nothing: it reads run folders, at any moment, finished or not.
"""

from poise.report.comparison.report import write_comparison
from poise.report.comparison.summary import ComparedRun, Comparison, State

__all__ = ["ComparedRun", "Comparison", "State", "write_comparison"]
