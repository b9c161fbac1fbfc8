"""The report of a run: one HTML page from its metrics.jsonl, with nothing to load from anywhere."""

from jax_wideep.report.page import write_report

__all__ = ["write_report"]
