"""The tree's rules, read off the syntax of every file: imports point down only, and nothing draws without a seed."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each may import those before it, and no others.
FLOORS = (
    "errors",
    "kernels",
    "streams",
    "config",
    "runtime",
    "energies",
    "samplers",
    "losses",
    "data",
    "inference",
    "tracking",
    "evaluation",
    "training",
    "report",
    "commands",
    "__main__",
    "train",
)
ONLY_IN = {"accelerate": "runtime", "wandb": "tracking", "webdataset": "data"}
SEEDS_GLOBALLY = {("energies", "build_energy"), ("evaluation", "_untrained")}  # and restores what it found

FLOOR = {name: number for number, name in enumerate(FLOORS)}
FILES = [*sorted((ROOT / "ebm").rglob("*.py")), ROOT / "train.py"]
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS |= {"rand_like", "randn_like", "randint_like"}  # of these, only ones that take a generator can be used
DRAWS_IN_PLACE = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "cauchy_",
    "log_normal_",
    "geometric_",
}
SEEDING = {"manual_seed", "manual_seed_all", "seed", "set_rng_state", "set_seed"}


def part(path: Path) -> str:
    """The first name below ebm/, or train."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[1] if relative[0] == "ebm" else relative[0]


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of all imports, also those inside functions; `from a import b` counts as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def upward(own: str, names: list[str]) -> list[str]:
    """The imports of a file of part `own` that point up."""
    wrong = []
    for name in names:
        first, *rest = name.split(".")
        other = rest[0] if first == "ebm" else "train" if first == "train" else None
        if other is None or other == own or name == "ebm.__version__":
            continue
        assert other in FLOOR, f"{name}: ebm/{other} stands on no floor; give it one in FLOORS"
        if FLOOR[other] > FLOOR[own]:
            wrong.append(name)
    return wrong


def dotted(node: ast.AST) -> str:
    """a.b.c of an attribute chain; of anything else, what follows it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def unseeded(own: str, tree: ast.AST) -> list[str]:
    """Calls that draw from a global generator or seed one."""
    allowed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (own, node.name) in SEEDS_GLOBALLY
        for block in ast.walk(node)
        if isinstance(block, ast.With) and any("fork_rng" in ast.unparse(item) for item in block.items)
        for inner in ast.walk(block)
    }
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node).startswith(("np.random", "numpy.random")):
            wrong.append(f"line {node.lineno}: {dotted(node)}")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, dotted(node.func.value)
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        draws = (owner == "torch" and name in DRAWS) or name in DRAWS_IN_PLACE
        global_seed = name in SEEDING and owner.startswith(("torch", "np", "numpy", "random", "accelerate"))
        seeds = global_seed and owner != "torch.Generator" and id(node) not in allowed
        if (draws and not has_generator) or seeds:
            wrong.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return wrong


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def source(request):
    return part(request.param), ast.parse(request.param.read_text())


def test_imports_point_down(source):
    own, tree = source
    assert own == "__init__" or own in FLOOR, f"ebm/{own} stands on no floor; give it one in FLOORS"
    names = imported(tree)
    if own == "__init__":  # the front door opens a run, and knows nothing else
        assert all(name.startswith("ebm.inference.") for name in names if name.startswith("ebm"))
    else:
        assert not upward(own, names)


def circles(graph: dict[str, set[str]]) -> None:
    """Raises CycleError where modules import each other."""
    TopologicalSorter(graph).prepare()


def test_no_modules_import_each_other():
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = imported(ast.parse(path.read_text()))
        graph[module] = {m for name in names for m in (name, name.rpartition(".")[0]) if m != module}
    modules = graph.keys()
    circles({module: names & modules for module, names in graph.items()})


def test_libraries_with_one_place(source):
    own, tree = source
    wrong = [name for name in imported(tree) if own != ONLY_IN.get(name.split(".")[0], own)]
    assert not wrong, f"{wrong}: {ONLY_IN}"


def test_nothing_draws_from_a_global_generator(source):
    own, tree = source
    assert not [name for name in imported(tree) if name.split(".")[0] == "random"]
    assert not unseeded(own, tree)


def test_the_rules_bite():
    """What the checks above must find, were it there."""
    assert upward("energies", ["ebm.samplers.langevin", "ebm.config", "torch"]) == ["ebm.samplers.langevin"]
    assert upward("streams", ["ebm.training.loop.train"]) and upward("training", ["ebm.commands.sample"])
    assert upward("data", ["ebm.tracking"]) and not upward("tracking", ["ebm.data"])
    assert imported(ast.parse("def f():\n  from ebm import training")) == ["ebm.training"]
    with pytest.raises(CycleError):
        circles({"a": {"b"}, "b": {"a"}})
    bad = "torch.rand(3)", "x.normal_()", "torch.manual_seed(0)", "np.random.rand()", "torch.randn_like(x)"
    for line in (*bad, "torch.default_generator.manual_seed(0)", "torch.cuda.manual_seed_all(0)"):
        assert unseeded("energies", ast.parse(f"def build_energy():\n  {line}")), line
    good = (
        "torch.rand(3, generator=g)",
        "x.normal_(generator=g)",
        "g.manual_seed(0)",
        "torch.Generator().manual_seed(0)",
    )
    for line in (*good, "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)"):
        assert not unseeded("energies", ast.parse(f"def build_energy():\n  {line}")), line
