"""Chain steps a second: this engine, TorchEBM 0.8.9, the plain loop of JEM's kind, and the limit, the bare network.

python benchmarks/chain.py [--cases 48x64 16x64 16x16] [--dtypes fp32 bf16] [--steps 20] [--rounds 7] [--out FILE]

A case WxB is a ResNet energy of widths W, 2W, 2W on 32x32 colour images with spectral norm on, and a batch of B
(W = 128: widths 128, 256, 256, 256 with two blocks each). The limit is the network alone, spectral norm folded and
channels last: K forwards and input gradients of one batch and nothing else. Each side runs in a process of its own, as
its users run it; the sides take turns. MFU is the network's FLOPs over the rate of a large matrix product in the same
type. On a CPU TorchEBM computes in float32 whatever it is asked for, and so does this project where the CPU only
emulates bfloat16. Needs: pip install --no-deps torchebm==0.8.9
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIDES = ("engine", "bare", "torchebm", "plain")
IMAGE = (3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="WIDTHxBATCH")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=20, help="K, steps of a chain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    import torch
    from timing import machine, publish, table

    every = [f"{w}x{b}" for w in (16, 48, 128) for b in (16, 64, 128, 256, 512)]
    cases = options.cases or (every if torch.cuda.is_available() else ["48x64", "16x64", "16x16", "128x16"])
    result = {"machine": machine(), "steps": options.steps, "rounds": options.rounds, "cases": {}}
    sides = {name: Side(name) for name in SIDES}
    rows = []
    for dtype in options.dtypes:
        for case in cases:
            found = measure(sides, f"{case} {dtype} {options.steps}", options.rounds)
            result["cases"][f"{case} {dtype}"] = found
            steps = [found["steps_per_s"][side]["median"] for side in SIDES]
            rows.append([f"{case} {dtype}", *steps, found["to_torchebm"], found["to_plain"], found["over_bare"],
                         f"{found['mfu']:.0%}"])  # fmt: skip
    print(table(["case", *(f"{s}/s" for s in SIDES), "/torchebm", "/plain", "time/bare", "MFU"], rows))
    publish(result, options.out)


def measure(sides: dict[str, "Side"], case: str, rounds: int) -> dict:
    from statistics import median

    from timing import alternate, ratios, spread

    rates = {name: side.ask(f"start {case}") for name, side in sides.items()}  # warm-up; the limit's rates
    times = alternate({name: lambda side=side: side.ask("go")["s"] for name, side in sides.items()}, rounds)
    steps = int(case.split()[2])

    def ratio(one: str, other: str) -> float:
        return round(median(ratios(times[one], times[other])), 3)

    flops = rates["bare"]["flops"]
    return {
        "steps_per_s": {name: spread([steps / s for s in values], 3) for name, values in times.items()},
        "to_torchebm": ratio("torchebm", "engine"),
        "to_plain": ratio("plain", "engine"),
        "over_bare": ratio("engine", "bare"),
        "mfu": round(flops * steps / median(times["engine"]) / rates["bare"]["matmul_flops_per_s"], 3),
    }


class Side:
    """A process that runs one side's chains on request."""

    def __init__(self, name: str):
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", name], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def ask(self, request: str) -> dict:
        print(request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a side of the benchmark ended with {self.process.wait()}")
        return json.loads(answer)


def serve(name: str) -> None:
    """Answer requests on stdin: "start CASE DTYPE STEPS" builds and warms up, "go" times one chain."""
    if name in ("engine", "bare"):
        from ebm.runtime.process import prepare_process

        prepare_process()
    from timing import seconds

    answers, chain = sys.stdout, None
    sys.stdout = sys.stderr
    for request in sys.stdin:
        word, *case = request.split()
        if word == "start":
            chain, facts = build(name, *case)
            for _ in range(2):
                chain()
            print(json.dumps(facts), file=answers, flush=True)
        else:
            print(json.dumps({"s": seconds(chain)}), file=answers, flush=True)


def build(name: str, case: str, dtype_name: str, steps: str):
    """(a function that runs one chain, facts)."""
    import torch

    from ebm.energies import ResNetEnergyFunction

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for every side
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, batch = map(int, case.split("x"))
    features, blocks = ((128, 256, 256, 256), 2) if width == 128 else ((width, 2 * width, 2 * width), 1)
    energy = ResNetEnergyFunction(*IMAGE, features, blocks).train().to(device)
    x = (torch.rand(batch, *IMAGE) * 2 - 1).to(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    return {"engine": engine, "bare": bare, "torchebm": torchebm, "plain": plain}[name](energy, x, dtype, int(steps))


def engine(energy, x, dtype, steps):

    from ebm.energies import FoldedEnergy, chain_dtype
    from ebm.samplers import Engine, langevin
    from ebm.streams import stream_sources

    run = Engine(FoldedEnergy(energy, chain_dtype(dtype, x.device)).refresh())
    noise = stream_sources(0, "chain", range(4), device=x.device)
    settings = {"num_steps": steps, "step_size": 10.0, "noise_scale": 0.005, "grad_clamp": 0.03, "bounds": (-1.0, 1.0)}
    return lambda: run(langevin, x, generator=noise, **settings), {}


def bare(energy, x, dtype, steps):
    import torch
    from timing import seconds
    from torch.utils.flop_counter import FlopCounterMode

    from ebm.energies import FoldedEnergy, chain_dtype

    dtype = chain_dtype(dtype, x.device)
    folded = FoldedEnergy(energy, dtype).refresh()
    x = x.contiguous(memory_format=torch.channels_last)

    def chain():
        for _ in range(steps):
            state = x.detach().requires_grad_(True)
            torch.autograd.grad(folded(state).sum(), state)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        folded(x)
    side = 8192 if x.is_cuda else 2048
    a, b = (torch.randn(side, side, device=x.device, dtype=dtype) for _ in range(2))
    rate = 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(5))
    return chain, {"flops": 2 * counter.get_total_flops(), "matmul_flops_per_s": rate}


def torchebm(energy, x, dtype, steps):
    import torch
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.network = energy

        def forward(self, x):
            return self.network(x)

    sampler = LangevinDynamics(Model().to(x.device), step_size=10.0, noise_scale=0.005, clamp=(-1.0, 1.0),
                               device=x.device)  # fmt: skip
    if dtype != torch.float32 and x.is_cuda:
        sampler.setup_mixed_precision(True, dtype)
    return lambda: sampler.sample(x=x.clone(), n_steps=steps), {}


def plain(energy, x, dtype, steps):
    """As JEM and its successors write it: the module in evaluation mode, a new graph a step, noise by randn_like."""
    import torch

    def chain():
        energy.eval()
        state = x.clone().requires_grad_(True)
        for _ in range(steps):
            with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
                total = energy(state).sum()
            (grad,) = torch.autograd.grad(total, [state], retain_graph=True)
            state.data += -10.0 * grad.clamp(-0.03, 0.03) + 0.005 * torch.randn_like(state)
            state.data.clamp_(-1.0, 1.0)
        energy.train()
        return state.detach()

    return chain, {}


if __name__ == "__main__":
    main()
