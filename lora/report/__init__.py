"""Pictures, tables and pages of runs, made from what stands in their folders.

    collect     run folders -> records (reading, runs, sweeps, comparisons, command)
    records     what a report holds; as JSON it is report.json
    figures     records -> pictures (canvas, curves), as SVG in the page's colours (svg) and PNG
    tables      records -> tables of text (numbers), for page and terminal
    page        records, pictures and tables -> one self-contained page

No torch here; matplotlib and jinja2 are loaded when something is drawn.
"""

from __future__ import annotations

from lora.report.curves import COLOURS, LINE_STYLES, draw_loss_curves, parameter_table
from lora.report.records.records import Report
from lora.report.write import ReportFiles, report_on, write_report

__all__ = [
    "COLOURS",
    "LINE_STYLES",
    "Report",
    "ReportFiles",
    "draw_loss_curves",
    "parameter_table",
    "report_on",
    "write_report",
]
