"""A wrong sign or scale of any term of any loss fails a test."""

import subprocess
import sys

import mutations
import pytest
from runs import ROOT


@pytest.mark.parametrize("name", mutations.LOSSES)
def test_mutants_are_of_the_code_as_it_is(name):
    mutations.check(mutations.LOSSES[name])


@pytest.mark.slow
def test_no_mutant_survives():
    command = [sys.executable, str(ROOT / "tests" / "mutations.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 survived" in result.stdout
