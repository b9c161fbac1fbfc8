"""`python -m jax_wideep.report RUN`: writes RUN/report.html from RUN/metrics.jsonl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_wideep.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report that the arguments ask for; those of the process if None."""
    parser = argparse.ArgumentParser(prog="python -m jax_wideep.report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, with metrics.jsonl in it")
    parser.add_argument("--output", type=Path, help="file to write; by default report.html in that folder")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run, options.output))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
