"""All that a GPU is needed for, in at most 8 minutes: tests, speed, quality, two ranks; one JSON file.

python benchmarks/gpu.py [--tiny] [--parts PART ...] [--data DIR] [--out gpu.json]

Parts: tests (the CUDA tests, in one process), chain (steps a second: this engine, eager and compiled, the bare network,
TorchEBM where it can be imported), step (where a step's time goes, with exact and with fastest algorithms), compile
(seconds to the end of a two-step run, without and with a warm cache), ranks (the same run with one rank and with two
that share the GPU, over gloo), quality (speedrun.py). Each part runs in processes of its own with a limit of its own,
and what it has found when it fails or is stopped is kept: --out is written after every part. --tiny runs every part on
a CPU, or a GPU, in about two minutes, to see that it works.

--data DIR: Fashion-MNIST, as the four .gz files of its authors or as train.npz and test.npz (an array `images`).
Without it, the parts that train take the digits. Nothing is installed and nothing is downloaded.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

from timing import alternate, machine, seconds, spread

ROOT = Path(__file__).parent.parent
LIMITS = {"tests": 110, "chain": 110, "step": 70, "compile": 70, "ranks": 50, "quality": 70}  # seconds; 480 in all
TINY_LIMIT = 240
CUDA_TESTS = (
    "tests/samplers/test_engine_cuda.py",
    "tests/training/test_cuda.py",
    "tests/training/test_step_host_reads.py::test_no_step_waits_on_a_gpu",
    "tests/streams/test_philox.py",
)
CHAINS = {  # case: (image, widths, blocks, batch)
    "28x28 64-128-128 x256": ((1, 28, 28), (64, 128, 128), 1, 256),
    "32x32 128-256-256-256 x64": ((3, 32, 32), (128, 256, 256, 256), 2, 64),
    "32x32 128-256-256-256 x512": ((3, 32, 32), (128, 256, 256, 256), 2, 512),
}
SMALL = ["sampler.num_steps=2", "train.batch_size=32", "buffer.size=256", "data.workers=0", "data.window=64",
         "train.log_every=1", "tracking.wandb=disabled", "tracking.samples_every=1000000"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small form of every part, on a CPU too")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a part: its folder
    options = parser.parse_args()
    if options.work:
        PARTS[options.parts[0]](options, options.work)
        return
    result = {"machine": machine(), "commit": commit(), "tiny": options.tiny, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        if options.data:
            shards(options.data, Path(folder))
        for name in options.parts:
            result["parts"][name] = found = part(name, options, Path(folder))
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {found['status']} after {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))
    failed = [name for name, found in result["parts"].items() if found["status"] != "done"]
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}; {options.out} has what they found, and their last lines")


def part(name: str, options: argparse.Namespace, folder: Path) -> dict:
    """Run a part in a process group of its own, and end the whole group at its limit."""
    work, log = folder / name, folder / f"{name}.log"
    work.mkdir()
    command = [sys.executable, __file__, "--parts", name, "--work", str(work), *(["--tiny"] if options.tiny else [])]
    command += ["--data", str(options.data.resolve())] if options.data else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                                   start_new_session=True)  # fmt: skip
        try:
            code = process.wait(TINY_LIMIT if options.tiny else LIMITS[name])
            status = "done" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
        finally:
            end_group(process)
    found = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    file = work / "result.json"
    found |= {"result": json.loads(file.read_text())} if file.exists() else {}
    if status != "done":
        found["log"] = log.read_text(errors="replace")[-3000:]
    return found


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a part, its own processes included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def keep(work: Path, result: dict) -> None:
    """What a part has found so far."""
    (work / "new.json").write_text(json.dumps(result))
    (work / "new.json").replace(work / "result.json")


def commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def tests(options: argparse.Namespace, work: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "--durations=5",
    ]
    command += ["-k", "known or counter or moments"] if options.tiny else []
    start = time.monotonic()
    done = subprocess.run([*command, *CUDA_TESTS], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    keep(work, {"summary": lines[-1] if lines else done.stderr[-500:], "seconds": round(time.monotonic() - start, 1),
                "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]})  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-1000:])
    raise SystemExit(done.returncode)


def chain(options: argparse.Namespace, work: Path) -> None:
    """Steps a second of each side, the sides in turn; one process, so that all see the same clocks and heat."""
    from ebm.runtime.process import prepare_process

    prepare_process()
    import torch
    from chain import bare, torchebm

    from ebm.energies import ResNetEnergyFunction

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = {"8x8 8-16 x8": ((1, 8, 8), (8, 16), 1, 8)} if options.tiny else CHAINS
    steps, rounds, result = (2, 2, {}) if options.tiny else (20, 5, {})
    for case, (image, widths, blocks, batch) in cases.items():
        torch.manual_seed(0)
        energy = ResNetEnergyFunction(*image, widths, blocks).train().to(device)
        x = (torch.rand(batch, *image) * 2 - 1).to(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        network, facts = bare(energy, x, dtype, steps)
        sides = {"eager": our_chain(energy, x, dtype, steps, False),
                 "compiled": our_chain(energy, x, dtype, steps, True), "bare": network}  # fmt: skip
        if has_torchebm():
            sides["torchebm"] = torchebm(energy, x, dtype, steps)[0]
        for side in sides.values():
            for _ in range(2):
                side()
        times = alternate({name: lambda side=side: seconds(side) for name, side in sides.items()}, rounds)
        best = min(median(times["eager"]), median(times["compiled"]))
        result[case] = {
            "steps_per_s": {name: spread([steps / s for s in values], 2) for name, values in times.items()},
            "mfu": round(facts["flops"] * steps / best / facts["matmul_flops_per_s"], 3),
            "compiled_over_eager": round(median(times["eager"]) / median(times["compiled"]), 3),
        }
        keep(work, result)


def our_chain(energy, x, dtype, steps: int, compiled: bool):
    from ebm.energies import FoldedEnergy, chain_dtype
    from ebm.samplers import Engine, langevin
    from ebm.samplers.compiled import TOLERANCE, Compiler
    from ebm.streams import stream_sources

    dtype = chain_dtype(dtype, x.device)
    compiler = Compiler(always=True, tolerance=TOLERANCE[dtype], limit=60) if compiled else None
    run = Engine(FoldedEnergy(energy, dtype).refresh(), compiler=compiler)
    noise = stream_sources(0, "chain", range(4), device=x.device)
    settings = {"num_steps": steps, "step_size": 10.0, "noise_scale": 0.005, "grad_clamp": 0.03, "bounds": (-1.0, 1.0)}
    return lambda: run(langevin, x, generator=noise, **settings)


def has_torchebm() -> bool:
    from importlib.util import find_spec

    return find_spec("torchebm") is not None


def shards(data: Path, folder: Path) -> None:
    """Write the shards of --data once, for all parts."""
    for split in ("train", "test"):
        shard = [sys.executable, "-m", "ebm", "shard", "--out", str(folder / split), "--split", split, "--source"]
        if (data / f"{split}.npz").exists():
            import numpy as np

            np.save(folder / f"{split}.npy", np.load(data / f"{split}.npz")["images"])
            shard += [f"npy:{folder / split}.npy"]
        else:
            shard += ["fashion_mnist", "--root", str(data)]
        subprocess.run(shard, cwd=ROOT, check=True, stdout=sys.stderr, timeout=120)


def config(options: argparse.Namespace, work: Path) -> list[str]:
    """Arguments of train.py for the parts that train: Fashion-MNIST from --data, or the digits."""
    folder, name, more = work.parent, "fashion_mnist", ["data.source=null", "evaluate.source=null"]
    if options.data is None:
        folder, name, more = work, "digits", []
    elif options.tiny:
        more += ["energy.features=[8,8]"]
    where = [f"data.shards={folder / 'train'}", f"evaluate.shards={folder / 'test'}"]
    return [
        "--config",
        f"configs/{name}.yaml",
        *where,
        *more,
        *(SMALL if options.tiny else ["tracking.wandb=disabled"]),
    ]


def script(name: str, out: Path, *arguments: str) -> dict:
    """The JSON object that a benchmark writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--out", str(out), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads(out.read_text())


def step(options: argparse.Namespace, work: Path) -> None:
    arguments, result = config(options, work), {}
    steps = ["--steps", "4" if options.tiny else "60"]
    for name, settings in {"exact": [], "fastest": ["train.deterministic=false"]}.items():
        own = [f"run.dir={work / name}", *settings]
        found = script("step.py", work / f"{name}.json", *arguments[:2], *steps, *arguments[2:], *own)
        result[name] = {key: found[key] for key in ("step_s", "parts_s", "over_chain_and_loss")}
        keep(work, result)


def train(work: Path, name: str, arguments: list[str], *settings: str, ranks: int = 1) -> float:
    """Seconds of a training command from start to end; its log goes to this process's output."""
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments, f"run.dir={work / name}", *settings]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def compile(options: argparse.Namespace, work: Path) -> None:
    arguments, result = config(options, work), {}
    settings = [*SMALL[4:], "train.steps=2", "train.compile=true" if options.tiny else "train.compile=auto"]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    for name in ("cold", "warm"):
        result[f"{name}_s"] = round(train(work, name, arguments, *settings), 1)
        choices = work / name / "compiled.json"
        result["choices"] = json.loads(choices.read_text()) if choices.exists() else None
        keep(work, result)


def ranks(options: argparse.Namespace, work: Path) -> None:
    """The same run with one rank and with two: the same samples and chains, and losses that agree."""
    arguments, result, losses, traces = config(options, work), {}, [], []
    settings = [*SMALL, "train.steps=10", "data.trace=true", "train.backend=gloo", "train.compile=false"]
    for number in (1, 2):
        result[f"{number}_s"] = round(train(work, str(number), arguments, *settings, ranks=number), 1)
        lines = (work / str(number) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines])
        traces.append((work / str(number) / "trace.jsonl").read_text())
        keep(work, result)
    result["same_trace"] = traces[0] == traces[1]
    result["largest_difference_of_losses"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    keep(work, result)
    if not result["same_trace"]:
        raise SystemExit("one rank and two drew other samples or chains")


def quality(options: argparse.Namespace, work: Path) -> None:
    arguments = config(options, work)
    own = ["--every", "4", "--num", "64"] if options.tiny else ["--every", "250", "--limit", "40"]
    steps = ["train.steps=4"] if options.tiny else []
    where = [*arguments[:2], "--run", str(work / "run")]
    found = script("speedrun.py", work / "speedrun.json", *where, *own, *arguments[2:], *steps)
    keep(work, {key: found[key] for key in ("distance", "reached", "points")})


PARTS = {"tests": tests, "chain": chain, "step": step, "compile": compile, "ranks": ranks, "quality": quality}

if __name__ == "__main__":
    main()
