"""The README tells the truth, its snippets and its commands, and so does the tree of docs/design.md. Links, keys and
flags are checked by test_docs.py."""

import re
import subprocess
import sys

import pytest
from runs import ROOT, command, environment, finish

from ebm.__main__ import COMMANDS
from ebm.data.shards import ensure_shards

TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(OWN,) = (snippet for snippet in PYTHON if snippet.startswith("# my_energy.py"))


def test_the_tree_names_every_file():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)[1]
    for path in (ROOT / "ebm").iterdir():
        if path.name in ("__init__.py", "__main__.py", "__pycache__"):
            continue
        assert f"\n  {path.name}{'/' if path.is_dir() else ''} " in tree, path.name
    for name in re.findall(r"^(\S+)", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_first_screen_has_a_picture_two_commands_and_what_was_measured():
    screen = TEXT.split("\n## ")[0]
    assert "![" in screen and "pip install -r requirements.txt\naccelerate launch train.py\n" in screen
    assert "| time | result" in screen and len(screen.splitlines()) < 50


def test_the_table_of_commands_is_whole():
    assert set(re.findall(r"^\| `ebm (\w+)", TEXT, re.MULTILINE)) | {"train"} == set(COMMANDS)


def test_ci_runs_the_readme_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements-dev.txt && pytest" in TEXT
    assert "-r requirements-dev.txt" in script and "\npytest" in script


@pytest.fixture
def user(tmp_path):
    (tmp_path / "my_energy.py").write_text(OWN)
    return tmp_path


def test_the_python_snippets_run(user):
    ensure_shards(str(user / "shards"), "digits", "train")
    finish(command(1, user / "runs" / "digits", user / "shards", train__steps=2), user / "log")
    assert any("ebm.load" in snippet for snippet in PYTHON)
    for snippet in set(PYTHON) - {OWN}:
        subprocess.run([sys.executable, "-c", snippet + "\nassert x.shape == (16, 1, 8, 8)"], cwd=user, check=True,
                       env=environment())  # fmt: skip


def test_a_network_of_ones_own_trains_on_two_ranks(user):
    ensure_shards(str(user / "shards"), "digits", "train")
    settings = {"energy.kind": "import", "energy.path": "my_energy:MyEnergy", "energy.settings.hidden": 128}
    assert all(f"{key}={value}" in TEXT for key, value in settings.items())
    arguments = command(2, user / "run", user / "shards", train__steps=5)
    arguments = [a for a in arguments if not a.startswith("energy.")] + [f"{k}={v}" for k, v in settings.items()]
    finish(arguments, user / "log")
    assert (user / "run" / "DONE").exists()
