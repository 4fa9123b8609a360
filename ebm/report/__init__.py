"""A run on one page: its records, figures of them, and what is healthy."""

from ebm.report.page import page
from ebm.report.records import METRICS, Records, metric_of, read

__all__ = ["METRICS", "Records", "metric_of", "page", "read"]
