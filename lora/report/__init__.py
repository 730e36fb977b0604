"""Reports on runs: pictures, tables and an HTML page, made from run directories.

    records/    run directories -> summaries, which report.json holds
    figures     summaries -> pictures (canvas, curves), as SVG in the page's colours (svg) and PNG
    tables      summaries -> tables of text (numbers), for page and terminal
    page        summaries, pictures and tables -> one self-contained page
    write       all of the above, and the files

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
