"""The benchmarks run and print what they promise: a table, then one JSON object. Their figures are not judged here."""

import json
import re
import subprocess
import sys

import pytest
from runs import ROOT, environment

SMALL = {
    "step": ["--steps", "4"],
    "data": ["--sizes", "8", "--images", "512", "--rounds", "1"],
    "scaling": ["--ranks", "1", "2", "--batch", "8", "--steps", "40", "--rounds", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs_and_prints_one_object(name, digits):
    arguments = list(SMALL[name])
    if name == "step":
        arguments.append(f"data.shards={digits}")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments], cwd=ROOT,
                          env=environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table, brace, rest = done.stdout.partition("\n{")
    assert table.strip() and json.loads(brace + rest)


def test_the_table_names_every_script_and_result():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert set(re.findall(r"`(\w+\.py)`", table)) == scripts
    assert set(re.findall(r"`(\w+\.json)`", table)) == results


@pytest.mark.slow
def test_the_journey_follows_what_is_printed(tmp_path):
    """From a folder of pictures to a report; its figures are not judged."""
    command = [sys.executable, str(ROOT / "benchmarks/journey.py"), "--out", str(tmp_path / "journey"), "--tiny",
               "--images", "300", "--side", "8", "--no-defaults"]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    names = [each["command"].split()[3] for each in result["commands"]]
    assert names == ["init", "train", "sample", "evaluate", "report"]
    assert result["journey"]["steps"] == 4 and result["journey"]["spread"] > 0
    assert (tmp_path / "journey/runs/pictures/report.html").is_file()
