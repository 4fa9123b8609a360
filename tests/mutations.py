"""Do the tests of the losses notice a wrong sign or scale? `python tests/mutations.py [WORD]`

Each mutant is a copy of the package with one text of one loss replaced. The tests of that loss run on the copy, and
at least one must fail. With WORD, only the losses whose names contain it are changed. Exits 1 if a mutant survives.
"""

import ast
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
TESTS = (
    *(
        f"tests/losses/test_{name}.py"
        for name in (
            "contrastive",
            "losses_exact",
            "losses_kinds",
            "losses_device",
            "dual",
            "noise_levels_loss",
            "over_levels",
        )
    ),
    "tests/samplers/test_own_samplers.py",
    "tests/energies/test_unet.py",
)


class Loss(NamedTuple):
    file: str  # of ebm/losses, or from there on
    definitions: tuple[str, ...]  # the top-level functions and classes that hold the texts
    tests: str  # names of the tests that run on its mutants, as `pytest -k` takes them
    mutants: list[tuple[str, str]]  # (text, what replaces it); a text occurs once in the definitions


LOSSES = {
    "contrastive": Loss(
        "contrastive",
        ("contrastive_divergence",),
        "value_and_gradient or recovery",
        [
            ("e_pos.mean() - e_neg.mean()", "e_neg.mean() - e_pos.mean()"),
            ("e_pos.mean() - e_neg.mean()", "e_pos.mean() + e_neg.mean()"),
            ("e_pos.mean() - e_neg.mean()", "e_pos.mean() - 2 * e_neg.mean()"),
            ("loss + l2 *", "loss - l2 *"),
        ],
    ),
    "regularisers": Loss(
        "output",
        ("energy_l2", "gradient_penalty", "squared_norm", "interpolate"),
        "l2 or penalty or interpolates",
        [
            ("e.square().mean() for", "-e.square().mean() for"),
            ("e.square().mean() for", "e.mean() for"),
            ("for e in energies]).sum()", "for e in energies]).mean()"),
            ("mean() / 2", "mean()"),
            ("squared_norm(gradient).mean() / 2", "squared_norm(gradient).mean() / -2"),
            ("flatten(1).sum(1)", "flatten(1).mean(1)"),
            ("torch.lerp(x_neg, x_pos,", "torch.lerp(x_pos, x_neg,"),
        ],
    ),
    "improved_contrastive": Loss(
        "contrastive",
        ("improved_contrastive_divergence", "_frozen_energy", "log_distance"),
        "improved or log_distances or neighbours",
        [
            ("x - step_size * gradient", "x + step_size * gradient"),
            ("x - step_size * gradient", "x - gradient"),
            ("gradient + noise_scale *", "gradient - noise_scale *"),
            ("gradient = gradient.clamp(-grad_clamp, grad_clamp)", "pass"),
            ("x = inside(x, bounds, boundary)", "pass"),
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
            ("x.reshape(parts, len(x) // parts, -1)", "x.reshape(1, len(x), -1)"),
        ],
    ),
    "evaluation": Loss(
        "output",
        ("energies", "energy_and_gradient", "gradient_of", "without_float16"),
        "labels or float16",
        [
            ("y.repeat_interleave(len(x) // len(y))", "y.repeat(len(x) // len(y))"),
            ("== torch.float16", "== torch.float64"),
            ("create_graph=create_graph, materialize", "create_graph=False, materialize"),
        ],
    ),
    "score_matching": Loss(
        "score_matching",
        ("implicit_score_matching", "sliced_score_matching", "_score", "_repeated", "_curvature", "_trace", "_output"),
        "score_matching or projections or signs_estimate",
        [
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
    ),
    "denoising": Loss(
        "score_matching",
        ("denoising_score_matching",),
        "denoising",
        [
            ("z - sigma * gradient", "z + sigma * gradient"),
            ("z - sigma * gradient", "z - gradient"),
            ("gradient / temperature", "gradient * temperature"),
            ("x_pos + sigma * z", "x_pos - sigma * z"),
            ("x_pos + sigma * z", "x_pos + sigma**2 * z"),
            (".mean() / 2", ".mean()"),
            (".mean() / 2", ".mean() / -2"),
            ("loss + l2 *", "loss - l2 *"),
        ],
    ),
    "multilevel_denoising": Loss(
        "score_matching",
        ("multilevel_denoising", "spread_levels", "spread"),
        "multilevel or spread",
        [
            ("z - sigma**2 / level", "z + sigma**2 / level"),
            ("z - sigma**2 / level * gradient", "z - level * gradient"),
            ("z - sigma**2 / level * gradient", "z - sigma * gradient"),
            ("gradient / temperature", "gradient * temperature"),
            ("x_pos + level * z", "x_pos - level * z"),
            ("x_pos + level * z", "x_pos + sigma * z"),
            (".mean() / 2", ".mean()"),
            ("loss + l2 *", "loss - l2 *"),
            ("math.log(high / low)", "math.log(low / high)"),
            ("(interval + ", "(interval - "),
            ("% size", "% len(x)"),
        ],
    ),
    "noise_contrastive": Loss(
        "contrastive",
        ("GaussianNoise", "UniformNoise", "noise_contrastive"),
        "noise",
        [
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
            ("-squared_norm((x - self.mean) / self.std) / 2", "squared_norm((x - self.mean) / self.std) / 2"),
            ("-squared_norm((x - self.mean) / self.std) / 2", "-squared_norm((x - self.mean) / self.std)"),
            ("/ 2 - log_std", "/ 2 + log_std"),
            ("math.log(2 * math.pi) / 2", "math.log(2 * math.pi)"),
            (".add_(self.mean)", ".sub_(self.mean)"),
            ("-outside.shape[1] *", "outside.shape[1] *"),
            ("loss + l2 *", "loss - l2 *"),
            ("size * math.log(self.std)", "-size * math.log(self.std)"),
            ("self.std.log().expand", "(-self.std.log()).expand"),
            ("masked_fill(outside", "masked_fill(~outside"),
        ],
    ),
    "energy_discrepancy": Loss(
        "contrastive",
        ("energy_discrepancy",),
        "energy_discrepancy",
        [
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
    ),
    "recovery": Loss(
        "contrastive",
        ("noisy", "tilted", "recovery_likelihood"),
        "tilted or noisy or recovery",
        [
            ("return e + squared_norm", "return e - squared_norm"),
            ("(2 * sigma**2)", "(sigma**2)"),
            ("(2 * sigma**2)", "(2 * sigma)"),
            ("x + sigma * normal_", "x + sigma**2 * normal_"),
            ("(energy, x_pos, x_neg, l2=l2", "(energy, x_neg, x_pos, l2=l2"),
        ],
    ),
    "recovery, levels": Loss(
        "contrastive",
        ("noisy_pairs", "recovery_likelihood"),
        "pairs_of_neighbouring or gradient_is_that or teach_the_initialiser",
        [
            ("len(log_variances) - 1", "len(log_variances)"),
            ("spread(x, generator)", "spread(x, None)"),
            ("spread(x, generator) * count", "spread(x, generator)"),
            ("(level / 2).exp()", "level.exp()"),
            ("x_s = x + scale", "x_s = x + 2 * scale"),
            ("x_t = x_s + scale", "x_t = x + scale"),
            ("math.sqrt(math.expm1(spacing))", "math.expm1(spacing)"),
            ("math.expm1(spacing)", "math.exp(spacing)"),
            ("(energy, x_pos, x_neg, l2=l2", "(energy, x_neg, x_pos, l2=l2"),
            ("x_neg.detach()", "x_neg"),
            ("* -math.expm1(-spacing)", "* math.exp(-spacing)"),
            ("level.exp() *", "(level / 2).exp() *"),
            (".mean(1) / variance", ".sum(1) / variance"),
            (".mean() / 2", ".mean()"),
            ("plain.loss + fit", "plain.loss - fit"),
        ],
    ),
    "tied chains": Loss(
        "../samplers/levels",
        ("tied", "untied", "tied_start", "_unit"),
        "tied_chains or perfect_proposal",
        [
            ("math.exp(-low - spacing)", "math.exp(-low)"),
            ("math.exp(-low - spacing)", "math.exp(low - spacing)"),
            ("e + stiffness / 2", "e - stiffness / 2"),
            ("e + stiffness / 2", "e + stiffness"),
            ("centre + along", "centre - along"),
            ("_unit(level, log_variances), u) * u", "_unit(level, log_variances), u) / u"),
            ("(mean - centre) / along", "(mean + centre) / along"),
            ("(mean - centre) / along", "(mean - centre) * along"),
            ("math.exp(low / 2) * noise", "math.exp(low) * noise"),
            ("math.exp(low / 2) * noise", "0 * noise"),
            ("((level - low) / 2).exp()", "(level - low).exp()"),
            ("math.sqrt(-math.expm1(-spacing))", "math.sqrt(math.expm1(spacing))"),
        ],
    ),
    "descent": Loss(
        "../samplers/factory",
        ("descended",),
        "mala-40-200 or steps_that_it_is_given",
        [
            ("[count - 1 - number]", "[number]"),
            ("[count - 1 - number]", "[count - number]"),
            ("len(config.log_variances) - 1", "len(config.log_variances) - 2"),
            ("x = untied(u, x, level, config.log_variances)", "x = u"),
            ("num_steps * (number + 1) // count - num_steps * number // count", "num_steps // count"),
        ],
    ),
    "proposals": Loss(
        "../energies/base",
        ("NoiseConditionalEnergy",),
        "proposed_for_gaussian or start_of_fresh or networks_of_initialisers",
        [
            ("level + spacing\n", "level\n"),
            ("self.mean + kept * centred", "self.mean - kept * centred"),
            ("+ scale * self.initialiser", "- scale * self.initialiser"),
            ("kept.sqrt() * (upper / 2)", "kept * (upper / 2)"),
            ("(self.data_variance / total).view", "(1 - self.data_variance / total).view"),
            ("torch.lerp(clean, x, math.exp(-spacing))", "torch.lerp(x, clean, math.exp(-spacing))"),
            ("torch.lerp(clean, x, math.exp(-spacing))", "clean"),
            (
                "(self.variances + math.exp(self.log_variances[1])).sqrt()",
                "(self.variances + math.exp(self.log_variances[1]))",
            ),
            ("math.exp(self.log_variances[1])", "math.exp(self.log_variances[0])"),
            ("along @ self.basis.T", "along @ self.basis"),
            ("return self.mean + (along", "return (along"),
        ],
    ),
    "energy_matching": Loss(
        "flow_matching",
        ("energy_matching", "flow_loss", "pairing", "halves"),
        "pairs or flow or contrast_of or contrast_has or floor",
        [
            ("-gradient - target", "gradient - target"),
            ("-gradient - target", "-gradient - target / 2"),
            ("target = x1 - x0 if", "target = x0 - x1 if"),
            ("torch.lerp(x0, x1, per_state", "torch.lerp(x1, x0, per_state"),
            ("else velocity(field, x_t, t)", "else -velocity(field, x_t, t)"),
            ("else velocity(field, x_t, t)", "else 2 * velocity(field, x_t, t)"),
            ("else velocity(field, x_t, t)", "else velocity(field, x_t, 1 - t)"),
            ("else velocity(field, x_t, t)", "else velocity(field, x1, t)"),
            ("field if x_neg is None else None", "field"),
            ("field if x_neg is None else None", "None"),
            ('flow_weight * terms["flow"]', 'terms["flow"]'),
            ("loss + flow_weight *", "loss - flow_weight *"),
            (".sort(dim=1)", ".sort(dim=1, descending=True)"),
            (".mean(1) - kept.mean(1)", ".mean(1) + kept.mean(1)"),
            ("contrast = contrastive_weight *", "contrast = -contrastive_weight *"),
            ("contrast = contrastive_weight * (", "contrast = ("),
            ("clamp_min(-floor)", "clamp_min(floor)"),
            ('loss + terms["contrast"]', 'loss - terms["contrast"]'),
            ("loss + l2 *", "loss - l2 *"),
            ("torch.cdist(b, a)", "torch.cdist(a, b)"),
            ("linear_sum_assignment(c)", "linear_sum_assignment(-c)"),
            ("torch.cdist(b, a).square()", "torch.cdist(b, a)"),
            ("x_flow, x_pos = halves", "x_pos, x_flow = halves"),
            ("if separate_batch and x_neg is not None", "if separate_batch and x_neg is None"),
            ("x.reshape(parts, 2, -1,", "x.reshape(1, 2, -1,"),
        ],
    ),
    "equilibrium": Loss(
        "flow_matching",
        ("equilibrium_matching",),
        "equilibrium",
        [
            ("gradient + scale * target", "gradient - scale * target"),
            ("gradient + scale * target", "gradient + target"),
            ("target = x_pos - x0", "target = x0 - x_pos"),
            ("target = x_pos - x0", "target = x_pos + x0"),
            ("else velocity(field, x_t, time)", "else -velocity(field, x_t, time)"),
            ("else velocity(field, x_t, time)", "else 2 * velocity(field, x_t, time)"),
            ("else velocity(field, x_t, time)", "else velocity(field, x_t, 1 - time)"),
            ("torch.lerp(x0, x_pos, t)", "torch.lerp(x_pos, x0, t)"),
            ("gradient_scale * ((1 - t)", "((1 - t)"),
            ("(1 - t) / (1 - decay_start)", "t / (1 - decay_start)"),
            ("/ (1 - decay_start)", "/ decay_start"),
            ("clamp_max(1)", "clamp_min(1)"),
            (".square().mean()", ".square().sum()"),
            ("loss + l2 *", "loss - l2 *"),
        ],
    ),
    "dual": Loss(
        "score_matching",
        ("dual_score_matching", "dual_terms", "log_normaliser", "_with_noise", "contrast_of", "beside_chains"),
        "dual_score_matching_written or normaliser_of or contrast_vanishes or contrast_is_within or annealed_chain "
        "or without_a_datum or datum_beside",
        [
            ("(found * (e_pos - e_neg)).mean()", "(e_pos - e_neg).mean()"),
            ("(found * (e_pos - e_neg)).mean()", "(found * (e_neg - e_pos)).mean()"),
            ("[y_neg, y_neg]", "[y_pos, y_neg]"),
            ("y_pos.view(parts, 1, -1)).to(preference", "y_pos.view(1, parts, -1)).to(preference"),
            ("(chosen + first)", "(chosen)"),
            ("same * (1 + preference)", "same * 1"),
            ("(best > 0)", "(best >= 0)"),
            ("y_neg.view(parts, 1, -1)", "y_neg.view(1, 1, -1)"),
            ("(matched * e_pos).mean()", "e_pos.mean()"),
            ("(same / of_class.clamp(min=1)).sum(1)", "same.sum(1)"),
            ("(weights * e_neg).sum() / len(e_pos)", "e_neg.mean()"),
            ("(level / 2, x).exp() * in_x - z", "(level / 2, x).exp() * in_x + z"),
            ("(level / 2, x).exp() * in_x - z", "in_x - z"),
            ("in_x - z).flatten(1).square().mean(1)", "in_x - z).flatten(1).square().sum(1)"),
            ("((1 - z.flatten(1)", "((z.flatten(1)"),
            ("(1 - z.flatten(1).square().mean(1)) / 2", "(1 - z.flatten(1).square().mean(1))"),
            ("/ 2 - in_level", "/ 2 + in_level"),
            ("in_level / x[0].numel()", "in_level"),
            ("score + change, {", "score - change, {"),
            ("level / 2, x).exp() * z, z", "level, x).exp() * z, z"),
            ("x + per_state(level / 2, x)", "x - per_state(level / 2, x)"),
            (
                "x[0].numel() / 2 * torch.log(2 * math.pi * variance)",
                "x[0].numel() * torch.log(2 * math.pi * variance)",
            ),
            ("torch.log(2 * math.pi * variance)", "torch.log(math.pi * variance)"),
            ("/ (2 * variance)", "/ variance"),
            ("gaussian - e)", "e - gaussian)"),
            ("t_max + (x_pos - mean)", "t_max - (x_pos - mean)"),
            ("loss + contrastive_weight * contrast", "loss - contrastive_weight * contrast"),
            ("e_pos.mean() - e_neg.mean()", "e_neg.mean() - e_pos.mean()"),
        ],
    ),
    "jem": Loss(
        "contrastive",
        ("marginal", "joint_energy"),
        "jem",
        [
            ("logits = -values", "logits = values"),
            ("classification + contrastive_weight *", "classification - contrastive_weight *"),
            ("classification + contrastive_weight *", "-classification + contrastive_weight *"),
            ("classification + contrastive_weight *", "classification +"),
            ("else e_pos.mean() - e_neg.mean()", "else e_pos.mean() + e_neg.mean()"),
            ("softplus(e_pos)", "softplus(-e_pos)"),
            ("softplus(-e_neg)", "softplus(e_neg)"),
            ("softplus(e_pos).mean() +", "softplus(e_pos).mean() -"),
            ("e = marginal_energy(values)", "e = -marginal_energy(values)"),
            ("e = marginal_energy(values)", "e = marginal_energy(-values)"),
            ("lambda x: marginal_energy(", "lambda x: -marginal_energy("),
            ("torch.cat([y_pos, y_neg])", "torch.cat([y_neg, y_pos])"),
            ("loss + l2 *", "loss - l2 *"),
        ],
    ),
    "contrastive_latent": Loss(
        "contrastive",
        ("contrastive_latent", "similarity_loss"),
        "contrastive_latent or encoder_learns or similarity_is",
        [
            ("e_pos.mean() - e_neg.mean() -", "e_neg.mean() - e_pos.mean() -"),
            ("- latent_weight * cosine", "+ latent_weight * cosine"),
            ("- latent_weight * cosine", "- cosine"),
            ("cosine + similarity", "cosine - similarity"),
            ("code.detach()).mean()", "code).mean()"),
            ("f[: len(x_pos)]", "f[len(x_pos) :]"),
            ("loss + l2 *", "loss - l2 *"),
            ("transpose(1, 2) / temperature", "transpose(1, 2) * temperature"),
            ("-torch.inf", "0.0"),
            ("+ count // 2) % count", ") % count"),
            ("code.reshape(parts, -1,", "code.reshape(1, -1,"),
        ],
    ),
    "flow and descent": Loss(
        "../samplers/langevin",
        ("flow", "nesterov", "_where_moving"),
        "a_flow or nesterov or stops",
        [
            ("ahead = x - step * grad", "ahead = x + step * grad"),
            ("x - step / 2 * (grad +", "x - step * (grad +"),
            ("end / max(num_steps, 1)", "end / (num_steps + 1)"),
            ("ahead - step_size * grad", "ahead + step_size * grad"),
            ("x + momentum * velocity", "x - momentum * velocity"),
            ("x, velocity = new, new - x", "x, velocity = new, x - new"),
            ("> tolerance)", "< tolerance)"),
        ],
    ),
    "annealing": Loss(
        "../samplers/factory",
        ("annealing",),
        "annealing or annealed or last_step",
        [
            ("config.sigma**2 / config.temperature", "config.sigma**2 * config.temperature"),
            ("config.hottest ** (1 - f)", "config.hottest**f"),
            ("steps[-1], noises[-1] = whole, 0.0", "pass"),
            ("config.relative_step * whole", "config.relative_step"),
        ],
    ),
    "heads of U-Nets": Loss(
        "../energies/resnet",
        ("UNetEnergyFunction",),
        "energy_of_each_head or linear_field or becomes_an_energy or no_head_pairs",
        [
            ('"dot": -1.0', '"dot": 1.0'),
            ('"quadratic": 0.5', '"quadratic": 1.0'),
            ('"norm": 0.5}', '"norm": -0.5}'),
            ("sign = 1.0 if self.kind", "sign = -1.0 if self.kind"),
            ("(self.output_scale * factor)", "factor"),
            ("else x[:, : self.planes]", "else x[:, -self.planes :]"),
        ],
    ),
    "factory": Loss(
        "factory",
        ("loss_of", "_last_step"),
        "penalty_of_the_config or settings",
        [
            ("plain.loss + config.gradient_penalty *", "plain.loss - config.gradient_penalty *"),
            ("plain.loss + config.gradient_penalty *", "plain.loss +"),
            ("chain[name][-1]", "chain[name][0]"),
        ],
    ),
}


def run_tests(root: Path, names: str) -> int:
    """pytest's exit code on the tests of `root` with these names: 0 passed, 1 failed. Leaves none of its modules."""
    os.chdir(root)
    sys.path.insert(0, str(root))  # before an installed copy
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        # The plugin collects garbage at its end, which takes as long as all else here.
        plugins = ("-p", "no:cacheprovider", "-p", "no:unraisableexception")
        code = pytest.main(["-x", "-q", "-n0", *plugins, *TESTS, "-k", names])
    assert Path(sys.modules["ebm"].__file__).is_relative_to(root), "the tests took another copy of the package"
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)  # a namespace or built-in module has none
        if file is not None and name != "__main__" and Path(file).is_relative_to(root):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not Path(path).is_relative_to(root)]
    return int(code)


def span(loss: Loss, source: str) -> list[tuple[int, int]]:
    """Where the definitions of `loss` lie in its file: pairs of positions in `source`."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return [(starts[nodes[name].lineno - 1], starts[nodes[name].end_lineno]) for name in loss.definitions]


def mutated(loss: Loss, source: str, old: str, new: str) -> str:
    """`source` with `new` for `old`, which must occur once in the definitions of `loss`."""
    found = [start + source[start:end].index(old) for start, end in span(loss, source) if old in source[start:end]]
    count = sum(source[start:end].count(old) for start, end in span(loss, source))
    assert count == 1, f"{loss.file}.py, {', '.join(loss.definitions)}: {old!r} occurs {count} times"
    return source[: found[0]] + new + source[found[0] + len(old) :]


def check(loss: Loss) -> None:
    """Fails where a text is not in its definitions, and for a mutant that is no Python: anything would kill it."""
    source = (ROOT / "ebm" / "losses" / f"{loss.file}.py").read_text()
    for old, new in loss.mutants:
        ast.parse(mutated(loss, source, old, new))


def link(file: str, place: str) -> None:
    """A second name for a file, or a copy where there can be none. Nothing writes into either: Python replaces what it
    compiles anew."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copy2(file, place)


def outcome(loss: Loss, old: str, new: str) -> int:
    """The exit code of the tests on a copy of the package where `new` stands for `old`. They run in a process of their
    own, forked so that it has loaded torch already."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in ("ebm", "tests"):  # with what is compiled already
            shutil.copytree(ROOT / name, root / name, copy_function=link)
        shutil.copy(ROOT / "pyproject.toml", root)
        path = root / "ebm" / "losses" / f"{loss.file}.py"
        source = path.read_text()
        path.unlink()
        path.write_text(mutated(loss, source, old, new))
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run_tests(root, loss.tests)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(word: str = "") -> int:
    torch.set_num_threads(1)
    sys.dont_write_bytecode = False  # the copies then have compiled all but the mutant
    chosen = {name: loss for name, loss in LOSSES.items() if word in name}
    for loss in chosen.values():
        check(loss)
    if code := run_tests(ROOT, " or ".join(loss.tests for loss in chosen.values())):
        print(f"the tests fail without any change (pytest's exit code {code})")
        return 1
    survived = 0
    for name, loss in chosen.items():
        for old, new in loss.mutants:
            code = outcome(loss, old, new)
            if code != 1:
                survived += 1
                print(f"{name}: survives (exit code {code}): {old!r} -> {new!r}", flush=True)
        print(f"{name}: {len(loss.mutants)} mutants", flush=True)
    print(f"{sum(len(loss.mutants) for loss in chosen.values()) - survived} killed, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
