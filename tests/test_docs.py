"""The pages in docs/ tell the truth: their code runs and does what they say, and every link, path, key, flag and name
in them exists; what is made by a script is as the script makes it now."""

import argparse
import importlib
import importlib.util
import json
import pkgutil
import re
from fnmatch import fnmatch
from types import ModuleType
from typing import get_args

import matplotlib.pyplot as plt
import pytest
import torch
from made_runs import make_run
from runs import ROOT

from ebm.__main__ import COMMANDS
from ebm.config import Config, EnergyConfig, describe
from ebm.report.records import METRICS

GUIDE = ROOT / "docs" / "custom_energies.md"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PAST = {"CHANGELOG.md"}  # names what is there no more
FOLDERS = "benchmarks|configs|docs|ebm|launch|tests"


@pytest.fixture(params=[page for page in PAGES if page.name not in PAST], ids=lambda page: page.name)
def page(request):
    return request.param


def script(name: str) -> ModuleType:
    """docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(text: str) -> list[str]:
    """What a page sets in code: the lines of its blocks other than Python's, and what stands in backticks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if language != "python" for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", rest)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_architecture_is_that_of_the_imports():
    drawn = (ROOT / "docs" / "architecture.svg").read_text()
    assert drawn == script("architecture").draw(ROOT / "ebm"), "run: python docs/architecture.py"


def test_the_api_page_is_that_of_the_docstrings():
    assert (ROOT / "docs" / "api.md").read_text() == script("make_api").page(), "run: python docs/make_api.py"


def test_local_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://", "mailto:")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_files_and_names_in_code_exist(page):
    for text in code(page.read_text()):
        for path in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*\w(?![\w/*<-])", text):
            assert list(ROOT.glob(path)), path
        for name in re.findall(r"(?<![\w./-])ebm(?:\.[A-Za-z_]+)+", text):
            pkgutil.resolve_name(name)


def known_keys() -> set[str]:
    """Every dotted key of a config, and their sections."""
    keys = {row[0].split(" ")[0] for row in describe()}
    return keys | {key.rpartition(".")[0] for key in keys} | set(Config.model_fields)


def test_config_keys_in_code_exist(page):
    """A word such as train.steps, where it is no file, no attribute that is called, and not inside a path."""
    sections = "|".join(Config.model_fields)
    ours = known_keys()
    for text in code(page.read_text()):
        for key in re.findall(rf"(?<![\w./*-])(?:{sections})(?:\.[a-z_0-9]+)+(?![\w(/*.])", text):
            is_file = key.endswith((".py", ".md", ".yaml", ".json", ".jsonl", ".sbatch"))
            assert is_file or key.startswith("energy.settings.") or key in ours, key


def test_metrics_in_code_exist(page):
    keys = {metric.key for metric in METRICS} | {
        "energy/pos",
        "energy/neg",
        "energy/fresh",
        "energy/heldout",
    }  # W&B's histograms
    spaces = {key.partition("/")[0] for key in keys if "/" in key} - {"data"}  # a folder, too
    for text in code(page.read_text()):
        for key in re.findall(rf"(?<![\w./-])(?:{'|'.join(spaces)})/[a-z_]+(?![\w./-])", text):
            assert any(fnmatch(key, known) for known in keys) or list(ROOT.glob(f"{key}*")), key


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of `ebm`."""
    found = {name: argparse.ArgumentParser(add_help=False) for name in COMMANDS}
    for name, parser in found.items():
        importlib.import_module(f"ebm.commands.{name}").add_arguments(parser)
    return found


def test_commands_and_flags_in_code_exist(page):
    options = {name: set(parser._option_string_actions) | {"--help"} for name, parser in parsers().items()}
    for text in code(page.read_text()):
        shown = re.search(r"(?:^|\s)(?:(?:python -m )?ebm (?=[a-z])|(?=train\.py))(\w+)(.*)", text.partition("#")[0])
        if shown and "|" not in text.partition(shown[0])[0]:
            assert shown[1] in options, text
            assert set(re.findall(r"(?<!\S)\[?(--[a-z-]+)(?![a-z.-])", shown[2])) <= options[shown[1]], text


def test_every_flag_stands_in_a_page():
    pages = "\n".join(page.read_text() for page in PAGES if page.name not in PAST)
    flags = {flag for parser in parsers().values() for flag in parser._option_string_actions}
    flags |= set(re.findall(r"\"(--[a-z-]+)\"", (ROOT / "launch/submit.py").read_text()))
    assert not [flag for flag in flags if flag.startswith("--") and flag not in pages]


@pytest.fixture(scope="module")
def guide():
    """The names that all of its Python blocks leave, run one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"__name__": "guide"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), names)
    return names


def test_flags_of_scripts_exist(page):
    for text in code(page.read_text()):
        for path, rest in re.findall(r"python ((?:launch|benchmarks|tests|docs)/\w+\.py)(.*)", text.partition("#")[0]):
            source = (ROOT / path).read_text()
            assert not [flag for flag in re.findall(r"(?<!\S)(--[a-z-]+)", rest) if f'"{flag}"' not in source], text


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells, one after the other, on a run whose weights are the initial ones."""
    make_run(tmp_path / "runs/digits", "loss.negatives=noise")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    names: dict = {"__name__": "tour"}
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        assert not cell["outputs"], "the notebook is kept without outputs"
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["x"].shape == (16, 1, 8, 8) and names["moved"].abs().max() <= 1
    plt.close("all")


def kl_from_the_truth(truth, energy):
    """KL(truth || energy) in nats, by quadrature on [-9, 9]^2."""
    axis = torch.linspace(-9, 9, 181)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p, q = (torch.log_softmax(-e(points).double(), 0) for e in (truth, energy))
    return (p.exp() * (p - q)).sum().item()


def test_training_learns(guide):
    untrained = kl_from_the_truth(guide["truth"], guide["prior"])
    assert untrained > 0.5
    assert kl_from_the_truth(guide["truth"], guide["energy"]) < 0.1
    assert kl_from_the_truth(guide["truth"], guide["scored"]) < 0.1


def test_samples_are_of_the_density(guide):
    """The chains' share of each quadrant, beside the true one."""
    shares = [
        [((x[:, 0] > 0) == right).logical_and((x[:, 1] > 0) == up).float().mean() for right in (0, 1) for up in (0, 1)]
        for x in (guide["samples"], guide["data"])
    ]
    assert (torch.tensor(shares[0]) - torch.tensor(shares[1])).abs().max() < 0.15


def test_a_blend_heats_the_prior_as_the_guide_says(guide):
    a, b = guide["a"], guide["b"]
    assert (guide["prior"](b) - guide["prior"](a)).item() == pytest.approx(0.5)
    assert (guide["blend"](b) - guide["blend"](a)).item() == pytest.approx(0.25)


def test_shapes(guide):
    x = guide["x"]
    for name in ("plain", "confined", "labelled", "hybrid", "product", "tilted", "cooler", "either", "learned"):
        assert guide[name](x).shape == (16,), name
    assert guide["labelled"].class_energies(x).shape == (16, 3)
    for side in (8, 12, 28):
        assert guide["ConvEnergy"]()(torch.zeros(2, 1, side, side)).shape == (2,)


def test_the_guide_names_every_kind():
    kinds = {member.model_fields["kind"].default for member in get_args(get_args(EnergyConfig)[0])}
    assert set(re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE)) == kinds
