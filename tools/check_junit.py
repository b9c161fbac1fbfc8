"""Check that a test run was a whole one: enough tests passed, and none was skipped that should have run.

    python tools/check_junit.py report.xml --min-passed 300 --allow-skip "needs a GPU"

`report.xml` is what `pytest --junitxml` writes. Exits with status 1 and says why.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ET


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report")
    parser.add_argument("--min-passed", type=int, required=True, help="fewest tests that must have passed")
    parser.add_argument("--allow-skip", default="$^", help="pattern of the reasons that may skip a test")
    options = parser.parse_args()

    passed, skipped, failed, unexpected = 0, 0, 0, []
    for case in ET.parse(options.report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif (skip := case.find("skipped")) is not None:
            skipped += 1
            if not re.search(options.allow_skip, skip.get("message", "")):
                unexpected.append(f"{case.get('classname')}::{case.get('name')}: {skip.get('message')}")
        else:
            passed += 1

    print(f"check_junit: {passed} passed, {skipped} skipped, {failed} failed")
    problems = [f"skipped without leave: {test}" for test in unexpected]
    if passed < options.min_passed:
        problems.append(f"expected at least {options.min_passed} tests to pass, got {passed}")
    if failed:
        problems.append(f"{failed} tests failed")
    for problem in problems:
        print(f"check_junit: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
