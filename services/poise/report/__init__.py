"""Creates the summary, report and TensorBoard curves of a run from its run folder. The run may be unfinished."""

from poise.report.html import render_report, write_report
from poise.report.summary import summarise, write_summary
from poise.report.tensorboard import TensorBoardLog

__all__ = ["TensorBoardLog", "render_report", "summarise", "write_report", "write_summary"]
