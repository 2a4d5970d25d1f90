"""What people see of a run: its summary, its report and its TensorBoard curves, all from the files in its folder.

Knows no service and no loop: it reads a run folder, at any moment, finished or not.
"""

from poise.report.html import render_report, write_report
from poise.report.summary import summarise, write_summary
from poise.report.tensorboard import TensorBoardLog

__all__ = ["TensorBoardLog", "render_report", "summarise", "write_report", "write_summary"]
