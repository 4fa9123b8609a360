"""The benchmarks run and print what they promise: a table, then one JSON object. Their figures are not judged here."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
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


def test_the_kit_for_a_gpu_runs_every_test_that_needs_one(monkeypatch):
    """Files whose tests are all skipped without CUDA, and single tests that are."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu import CUDA_TESTS

    mark, needed = re.compile(r"skipif\(not torch\.cuda\.is_available\(\)"), set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        for found in mark.finditer(text):
            whole = text[text.rindex("\n", 0, found.start()) + 1 :].startswith("pytestmark")
            following = re.search(r"^def (test_\w+)", text[found.end() :], re.MULTILINE)
            needed.add(name if whole else f"{name}::{following[1]}")
    assert needed <= set(CUDA_TESTS) and len(needed) > 5


def test_a_part_that_is_stopped_ends_with_its_processes_and_keeps_what_it_found(tmp_path, monkeypatch):
    """The rank of a launcher is in a session of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    rank = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        "import json, subprocess, sys, time, pathlib; work = pathlib.Path(sys.argv[sys.argv.index('--work') + 1]);"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True, cwd=work);"
        "(work / 'result.json').write_text(json.dumps({'found': 1})); print('a line', flush=True); time.sleep(60)"
    )
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "script.py"))
    options = SimpleNamespace(tiny=True, data=None)
    *_, found = gpu.part("chain", options, tmp_path, 4.0)
    assert found["status"] == "stopped at its limit" and 4 <= found["seconds"] < 30
    assert found["result"] == {"found": 1} and "a line" in found["log"]
    pid = int((tmp_path / "chain/pid").read_text())
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


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
