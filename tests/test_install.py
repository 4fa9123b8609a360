"""The wheel works where the checkout is not: installed in an environment of its own and used from an empty folder."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from runs import ROOT

# Runs at the start of every interpreter of the environment, and notes each file of the checkout that one opens.
WATCH = """
import sys
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith({parts!r}):
        with open({log!r}, "a") as file:
            file.write(arguments[0] + "\\n")
sys.addaudithook(note)
"""
FINDS = "import ebm; print(ebm.__file__)"
LOADS = "import ebm; print(tuple(ebm.load('r').sample(2, steps=5).shape))"


def pip(*arguments: str) -> None:
    common = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-cache-dir"]
    subprocess.run([sys.executable, "-m", "pip", *arguments, *common], check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("ebm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; its other packages, torch above all, are those of the running one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = str(home / "bin" / "python")
    pip("--python", python, "install", "--no-index", str(wheel))
    own = next(home.glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # The .pth files of a borrowed folder are not read, so an editable install of the checkout stays out of reach.
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    parts = tuple(str(ROOT / name) for name in ("ebm/", "configs/", "train.py"))
    (own / "sitecustomize.py").write_text(WATCH.format(parts=parts, log=str(home / "opened.log")))
    return home


def test_the_wheel_holds_the_package_and_every_shipped_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ebm/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "ebm").rglob("*.py")} <= names
    assert not [name for name in names if not name.startswith(("ebm/", "ebm-"))]


@pytest.mark.slow
def test_the_installed_package_works_without_the_checkout(installed, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def call(program: str, *arguments: str) -> str:
        done = subprocess.run([str(installed / "bin" / program), *arguments], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert call("python", "-c", FINDS).startswith(str(installed))
    assert call("ebm", "--version").startswith("ebm ")
    call("ebm", "train", "run.dir=r", "train.steps=50")
    call("ebm", "sample", "r", "--num", "4", "--steps", "10", "--out", "s.png")
    assert (tmp_path / "r" / "DONE").exists() and (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert call("python", "-c", LOADS) == "(2, 1, 8, 8)\n"
    assert not (installed / "opened.log").exists(), (installed / "opened.log").read_text()
