"""The kit for a GPU runs on a CPU, leaves nothing behind, and knows all tests that need a GPU."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from runs import ROOT, environment


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


@pytest.mark.parametrize("tiny", [True, False])  # in one process, and in four
def test_what_its_tests_have_shown_is_kept_as_they_run(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    file = tmp_path / "test_them.py"
    file.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_left(): pytest.skip()\n"
        "@pytest.fixture\ndef broken(): assert 0\ndef test_error(broken): pass\n"
    )
    monkeypatch.setattr(gpu, "CUDA_TESTS", (str(file),))
    results = []
    monkeypatch.setattr(gpu, "keep", lambda work, result: results.append(json.loads(json.dumps(result))))
    with pytest.raises(SystemExit) as end:
        gpu.tests(SimpleNamespace(tiny=tiny), tmp_path)
    assert end.value.code == 1 and [sum(each["counts"].values()) for each in results] == [1, 2, 3, 4, 4]
    assert results[-1]["counts"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1, "ERROR": 1}
    assert {line.split("::")[1].split()[0] for line in results[-1]["failed"]} == {"test_bad", "test_error"}
    assert "1 failed, 1 passed, 1 skipped, 1 error" in results[-1]["summary"]


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
