"""A process that dies or stops: the cases of failures.py on CPU devices."""

import failures
import pytest


@pytest.mark.parametrize("name", failures.CASES)
def test_case(tmp_path, name):
    failures.check(tmp_path, name)
