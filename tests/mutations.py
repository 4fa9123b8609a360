"""Do the tests of the losses notice a wrong sign or scale? `python tests/mutations.py [WORD]`

Each mutant is a copy of the package with one text of one loss replaced; the tests of that loss run on the copy, and
at least one must fail. WORD: only the files whose names hold it. Exits 1 where a mutant survives.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TESTS = ("tests/losses/test_contrastive.py", "tests/losses/test_losses_exact.py", "tests/losses/test_losses_kinds.py")

RELEVANT = {  # names of the tests that run on a file's mutants
    "contrastive": "value_and_gradient or recovery",
    "regularisers": "l2 or penalty or interpolates",
    "improved_contrastive": "improved or log_distances or neighbours",
    "output": "labels or float16",
    "score_matching": "score_matching or projections or signs_estimate",
    "denoising": "denoising",
    "noise_contrastive": "noise",
    "energy_discrepancy": "energy_discrepancy",
    "recovery": "tilted or noisy or recovery",
    "energy_matching": "pairs or flow or contrast_of or floor",
    "jem": "jem",
    "__init__": "penalty_of_the_config or settings",
}

MUTANTS = {  # file of ebm/losses: (text, what replaces it)
    "contrastive": [
        ("e_pos.mean() - e_neg.mean()", "e_neg.mean() - e_pos.mean()"),
        ("e_pos.mean() - e_neg.mean()", "e_pos.mean() + e_neg.mean()"),
        ("e_pos.mean() - e_neg.mean()", "e_pos.mean() - 2 * e_neg.mean()"),
        ("loss + l2 *", "loss - l2 *"),
    ],
    "regularisers": [
        ("e.square().mean() for", "-e.square().mean() for"),
        ("e.square().mean() for", "e.mean() for"),
        ("for e in energies]).sum()", "for e in energies]).mean()"),
        ("mean() / 2", "mean()"),
        ("sum(1).mean() / 2", "sum(1).mean() / -2"),
        ("flatten(1).sum(1)", "flatten(1).mean(1)"),
        ("torch.lerp(x_neg, x_pos, u)", "torch.lerp(x_pos, x_neg, u)"),
    ],
    "improved_contrastive": [
        ("x - step_size * gradient", "x + step_size * gradient"),
        ("x - step_size * gradient", "x - gradient"),
        ("gradient + noise_scale *", "gradient - noise_scale *"),
        ("gradient = gradient.clamp(-grad_clamp, grad_clamp)", "pass"),
        ("x = _inside(x, *bounds, boundary)", "pass"),
        ("loss + kl_weight *", "loss - kl_weight *"),
        ("loss + kl_weight *", "loss +"),
        ("low_energy - entropy_weight", "low_energy + entropy_weight"),
        ("- entropy_weight * entropy", "- entropy"),
        ("slope * (x - a.detach())", "slope * (a.detach() - x)"),
        (".sum() / len(x)", ".sum()"),
        ("e.detach().mean() +", "e.mean() +"),
        ("x = x_neg.detach().requires_grad_(True)", "x = (x_neg + 0.1).detach().requires_grad_(True)"),
        ("fill_(torch.inf)", "fill_(0)"),
        ("squared.argmin", "squared.argmax"),
        ("clamp_min(1e-6).log()", "clamp_min(1e-6)"),
        ("high - ((x - low)", "low + ((x - low)"),
        ("unflatten(0, (parts, -1))", "unflatten(0, (1, -1))"),
    ],
    "output": [
        ("y.repeat_interleave(len(x) // len(y))", "y.repeat(len(x) // len(y))"),
        ("== torch.float16", "== torch.float64"),
    ],
    "score_matching": [
        ("-gradient / temperature", "gradient / temperature"),
        ("-gradient / temperature", "-gradient * temperature"),
        ("squared / 2 + divergence", "squared / 2 - divergence"),
        ("squared / 2 + divergence", "divergence - squared / 2"),
        ("squared / 2 + divergence", "squared + divergence"),
        ("squared / 2 + divergence", "squared / 2 + divergence / 2"),
        ("enumerate(columns)]).sum(0)", "enumerate(columns)]).mean(0)"),
        ("(product * v).flatten(1).sum(1)", "product.flatten(1).sum(1)"),
        (">= 0).to(x.dtype) * 2 - 1", ">= 0).to(x.dtype) * 2"),
        ("for v in signs.unbind(1)]).mean(0)", "for v in signs.unbind(1)]).sum(0)"),
        ("for v in directions.unbind(1)]).mean(0)", "for v in directions.unbind(1)]).sum(0)"),
        ("flatten(2).sum(2).square().mean(1)", "flatten(2).sum(2).square().sum(1)"),
        ("if variance_reduction:", "if not variance_reduction:"),
        ("loss + l2 *", "loss - l2 *"),
    ],
    "denoising": [
        ("z - sigma * gradient", "z + sigma * gradient"),
        ("z - sigma * gradient", "z - gradient"),
        ("gradient / temperature", "gradient * temperature"),
        ("x_pos + sigma * z", "x_pos - sigma * z"),
        ("x_pos + sigma * z", "x_pos + sigma**2 * z"),
        (".mean() / 2", ".mean()"),
        (".mean() / 2", ".mean() / -2"),
        ("flatten(1).sum(1)", "flatten(1).mean(1)"),
        ("loss + l2 *", "loss - l2 *"),
    ],
    "noise_contrastive": [
        ("softplus(-odds_pos)", "softplus(odds_pos)"),
        ("softplus(odds_neg)", "softplus(-odds_neg)"),
        ("+ ratio * softplus", "+ softplus"),
        ("+ ratio * softplus", "- ratio * softplus"),
        ("-e_pos - log_normaliser", "e_pos - log_normaliser"),
        ("-e_pos - log_normaliser", "-e_pos + log_normaliser"),
        ("-e_neg - log_normaliser", "e_neg - log_normaliser"),
        ("-e_neg - log_normaliser", "-e_neg + log_normaliser"),
        ("- noise.log_density(x_pos)", "+ noise.log_density(x_pos)"),
        ("- noise.log_density(x_noise)", "+ noise.log_density(x_noise)"),
        ("log_density(x_pos) - math.log(ratio)", "log_density(x_pos) + math.log(ratio)"),
        ("log_density(x_noise) - math.log(ratio)", "log_density(x_noise) + math.log(ratio)"),
        ("-squared / 2", "squared / 2"),
        ("-squared / 2", "-squared"),
        ("- std.log().sum()", "+ std.log().sum()"),
        ("math.log(2 * math.pi) / 2", "math.log(2 * math.pi)"),
        (".add_(self.mean)", ".sub_(self.mean)"),
        ("-inside.shape[1] *", "inside.shape[1] *"),
        ("loss + l2 *", "loss - l2 *"),
    ],
    "energy_discrepancy": [
        ("e_pos[:, None] - e_neg", "-e_pos[:, None] + e_neg"),
        ("e_pos[:, None] - e_neg", "e_pos[:, None] + e_neg"),
        ("scale = math.sqrt(time)", "scale = time"),
        ("centre = x_pos + scale", "centre = x_pos + 0 * scale"),
        ("centre[:, None] + scale * draws", "centre[:, None] + 0 * draws"),
        ("math.log(stabiliser)", "-math.log(stabiliser)"),
        ("logsumexp(1) - math.log(num_samples)", "logsumexp(1) + math.log(num_samples)"),
        ("loss = (exponents", "loss = -(exponents"),
        ("loss + l2 *", "loss - l2 *"),
    ],
    "recovery": [
        ("return e + (x - centre)", "return e - (x - centre)"),
        ("(2 * sigma**2)", "(sigma**2)"),
        ("(2 * sigma**2)", "(2 * sigma)"),
        ("x + sigma * normal_", "x + sigma**2 * normal_"),
        ("(energy, x_pos, x_neg, l2=l2", "(energy, x_neg, x_pos, l2=l2"),
    ],
    "energy_matching": [
        ("-gradient - (x1 - x0)", "gradient - (x1 - x0)"),
        ("-gradient - (x1 - x0)", "-gradient - (x0 - x1)"),
        ("torch.lerp(x0, x1, t)", "torch.lerp(x1, x0, t)"),
        ("flow_weight * flow,", "flow,"),
        ("loss + flow_weight * flow", "loss - flow_weight * flow"),
        (".sort(dim=1)", ".sort(dim=1, descending=True)"),
        (".mean(1) - kept.mean(1)", ".mean(1) + kept.mean(1)"),
        ("contrast = contrastive_weight *", "contrast = -contrastive_weight *"),
        ("contrast = contrastive_weight * (", "contrast = ("),
        ("clamp_min(-floor)", "clamp_min(floor)"),
        ("loss + contrast.mean()", "loss - contrast.mean()"),
        ("loss + l2 *", "loss - l2 *"),
        ("torch.cdist(b, a)", "torch.cdist(a, b)"),
        ("linear_sum_assignment(c)", "linear_sum_assignment(-c)"),
        ("torch.cdist(b, a).square()", "torch.cdist(b, a)"),
    ],
    "jem": [
        ("logits = -values", "logits = values"),
        ("classification + contrastive_weight *", "classification - contrastive_weight *"),
        ("classification + contrastive_weight *", "-classification + contrastive_weight *"),
        ("classification + contrastive_weight *", "classification +"),
        ("(e_pos.mean() - e_neg.mean())", "(e_pos.mean() + e_neg.mean())"),
        ("if joint else -torch.logsumexp(-values", "if joint else torch.logsumexp(-values"),
        ("if joint else -torch.logsumexp(-values", "if joint else -torch.logsumexp(values"),
        ("lambda x: -torch.logsumexp(-", "lambda x: torch.logsumexp(-"),
        ("torch.cat([y_pos, y_neg])", "torch.cat([y_neg, y_pos])"),
        ("loss + l2 *", "loss - l2 *"),
    ],
    "__init__": [
        ("plain.loss + config.gradient_penalty *", "plain.loss - config.gradient_penalty *"),
        ("plain.loss + config.gradient_penalty *", "plain.loss +"),
        ("chain[name][-1]", "chain[name][0]"),
    ],
}


def run_tests(root: Path, names: str) -> int:
    """pytest's exit code on the tests of `root` with these names: 0 passed, 1 failed. Leaves none of its modules."""
    os.chdir(root)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        code = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *TESTS, "-k", names])
    assert Path(sys.modules["ebm"].__file__).is_relative_to(root), "the tests took another copy of the package"
    for name in list(sys.modules):
        if name.split(".")[0] in ("ebm", "conftest", "gaussians") or name.startswith("test_losses"):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not Path(path).is_relative_to(root)]
    return int(code)


def outcome(file: str, old: str, new: str) -> int:
    """The exit code of the tests on a copy of the package where `new` stands for `old`. In a process of its own,
    forked so that it has loaded torch already."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        shutil.copytree(ROOT / "ebm", root / "ebm")  # with what is compiled already
        shutil.copytree(ROOT / "tests", root / "tests")
        shutil.copy(ROOT / "pyproject.toml", root)
        path = root / "ebm" / "losses" / f"{file}.py"
        path.write_text(path.read_text().replace(old, new))
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run_tests(root, RELEVANT[file])
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(word: str = "") -> int:
    torch.set_num_threads(1)
    sys.dont_write_bytecode = False  # the copies then have compiled all but the mutant
    files = [file for file in MUTANTS if word in file]
    for file in files:
        source = (ROOT / "ebm" / "losses" / f"{file}.py").read_text()
        absent = [old for old, _ in MUTANTS[file] if source.count(old) != 1]
        assert not absent, f"{file}.py: not there, or more than once: {absent}"
    if code := run_tests(ROOT, " or ".join(RELEVANT[file] for file in files)):
        print(f"the tests fail without any change (pytest's exit code {code})")
        return 1
    survived = 0
    for file in files:
        for old, new in MUTANTS[file]:
            code = outcome(file, old, new)
            if code != 1:
                survived += 1
                print(f"{file}: survives (exit code {code}): {old!r} -> {new!r}", flush=True)
        print(f"{file}: {len(MUTANTS[file])} mutants", flush=True)
    print(f"{sum(len(MUTANTS[file]) for file in files) - survived} killed, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
