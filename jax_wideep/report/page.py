"""Writes the page: the template beside this file, with a run's data in it."""

from __future__ import annotations

import html
import json
from pathlib import Path

from jax_wideep.report.data import page_data, read_records

_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(run: Path, output: Path | None = None) -> Path:
    """Writes the report of the run in folder `run`; to RUN/report.html if no output is given.

    Returns:
      The file written.

    Raises:
      ValueError: the folder has no metrics.jsonl, or no step in it.
    """
    data = page_data(read_records(run))
    output = run / "report.html" if output is None else output
    # "</script>" inside a string would end the element that holds the data.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8").replace("__TITLE__", html.escape(run.resolve().name))
    output.write_text(page.replace("__DATA__", embedded), encoding="utf-8")
    return output
