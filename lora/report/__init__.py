"""Pictures, tables and pages of runs, made from what stands in their folders.

    read_runs    a run's folder, sweep's or comparison's -> records (reading, runs, sweeps, contests)
    records      what a report holds: also report.json
    figures      records -> pictures: SVG that follows the page's colours, and PNG
    page         records and pictures -> one self-contained page
    table        records -> a table for the terminal

No torch here; matplotlib and jinja2 are loaded when something is drawn.
"""

from __future__ import annotations

from lora.report.curves import COLOURS, LINE_STYLES, draw_loss_curves, parameter_table
from lora.report.records import Report
from lora.report.write import ReportFiles, write_report

__all__ = [
    "COLOURS",
    "LINE_STYLES",
    "Report",
    "ReportFiles",
    "draw_loss_curves",
    "parameter_table",
    "write_report",
]
