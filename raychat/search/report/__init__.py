"""The report of a search or of a single run: one HTML file, Markdown and CSV, from plain data."""

from raychat.search.report.contents import ReportContents
from raychat.search.report.write import write_report

__all__ = ["ReportContents", "write_report"]
