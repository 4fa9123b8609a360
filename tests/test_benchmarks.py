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
def test_the_kit_for_a_gpu_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["status"] for part in result["parts"].values()} == {"done"}
    assert set(result["parts"]) == {"tests", "chain", "step", "compile", "ranks", "quality"}
    assert result["parts"]["ranks"]["result"]["same_trace"]
