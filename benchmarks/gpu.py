"""All that a GPU is needed for, in at most 8 minutes: tests, speed, quality, two ranks; one JSON file.

python benchmarks/gpu.py [--tiny] [--parts PART ...] [--data DIR] [--out gpu.json] [--commit NAME]

Parts: tests (the CUDA tests, in four processes where pytest-xdist is installed), chain (steps a second: this engine,
eager, eager with the fastest algorithms, and compiled, the bare network, TorchEBM where it can be imported), step
(where a step's time goes: as shipped, eager, and eager with the fastest algorithms; in each with the loss as a CUDA
graph and without), compile (seconds to the first step and what they go into, without and with a warm cache), ranks (the
same run with one rank and with two that share the GPU, over gloo), quality (speedrun.py). Each part runs in processes
of its own with a limit of its own, and what it has found when it fails or is stopped is kept: --out is written every
few seconds; parts of the same commit and machine that it has already, and that are not run again, stay in it. --tiny
runs every part on a CPU, or a GPU, in about two minutes, to see that it works.

--data DIR: Fashion-MNIST, as the four .gz files of its authors, as train.npz and test.npz (an array `images`), or as
folders of shards, train and test (`ebm shard`). Without it, the parts that train take the digits. --commit: what is
measured, where this folder is no git repository. Nothing is installed and nothing is downloaded.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import psutil
from timing import alternate, machine, seconds, spread, write

ROOT = Path(__file__).parent.parent
WHOLE = 480  # seconds
LIMITS = {"tests": 110, "chain": 90, "step": 110, "compile": 90, "ranks": 45, "quality": 225}
TINY_LIMIT = 600  # of each part; a busy machine takes several times as long as an idle one
CUDA_TESTS = (
    "tests/samplers/test_engine_cuda.py",
    "tests/training/test_cuda.py",
    "tests/training/test_step_host_reads.py::test_no_step_waits_on_a_gpu",
    "tests/samplers/test_host_reads.py::test_a_chain_never_waits_for_the_device",
    "tests/samplers/test_sampler_factory.py::test_a_captured_chain_of_every_kind_is_the_plain_one",
    "tests/samplers/test_sampler_factory.py::test_long_fresh_chains_are_captured_and_the_plain_ones",
    "tests/losses/test_losses_device.py::test_a_loss_never_waits_for_the_device",
    "tests/data/test_workers.py::test_pinned_batches_are_the_same",
    "tests/streams/test_philox.py::test_the_kernel_on_the_device",
    "tests/streams/test_philox.py::test_moments_and_distribution",
)
CHAINS = {  # case: (image, widths, blocks, batch)
    "28x28 64-128-128 x256": ((1, 28, 28), (64, 128, 128), 1, 256),
    "32x32 128-256-256-256 x64": ((3, 32, 32), (128, 256, 256, 256), 2, 64),
    "32x32 128-256-256-256 x512": ((3, 32, 32), (128, 256, 256, 256), 2, 512),
}
FEW_STEPS = ["data.workers=0", "data.window=64", "train.log_every=1", "tracking.wandb=disabled",
             "tracking.samples_every=1000000"]  # fmt: skip
SMALL = [*FEW_STEPS, "sampler.num_steps=2", "train.batch_size=32", "buffer.size=256"]
TINY = [*SMALL, "energy.features=[8,8]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small form of every part, on a CPU too")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--commit", help="name of what is measured; default: git's")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a part: its folder
    options = parser.parse_args()
    if options.work:
        PARTS[options.parts[0]](options, options.work)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # which ends the part under way too
    end = time.monotonic() + (len(PARTS) * TINY_LIMIT if options.tiny else WHOLE)
    result = {"machine": versions(), "commit": options.commit or commit(), "tiny": options.tiny}
    result["parts"] = earlier_parts(options.out, result)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if options.data:
            shards(options.data, Path(folder))
        for name in options.parts:
            limit = min(TINY_LIMIT if options.tiny else LIMITS[name], end - time.monotonic())
            for found in part(name, options, Path(folder), limit):
                result["parts"][name] = found
                write(result, options.out)
            print(f"{name}: {found['status']} after {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))
    failed = [name for name, found in result["parts"].items() if found["status"] != "done"]
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}; {options.out} has what they found, and their last lines")


def earlier_parts(out: Path, result: dict) -> dict:
    """Those in `out`, where the rest of it is `result`."""
    before = json.loads(out.read_text()) if out.exists() else {}
    parts = before.pop("parts", {})
    return parts if before == result else {}


def part(name: str, options: argparse.Namespace, folder: Path, limit: float):
    """Run a part in processes of its own, which end at its limit. Yields what it has found so far, again and again."""
    work, log = folder / name, folder / f"{name}.log"
    work.mkdir()
    command = [sys.executable, __file__, "--parts", name, "--work", str(work), *(["--tiny"] if options.tiny else [])]
    command += ["--data", str(options.data.resolve())] if options.data else []
    start, status = time.monotonic(), "under way"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=environment(folder, options.tiny))  # fmt: skip
        try:
            while status == "under way":
                try:
                    code = process.wait(max(0.0, min(5.0, start + limit - time.monotonic())))
                    status = "done" if code == 0 else f"exit {code}"
                except subprocess.TimeoutExpired:
                    status = "under way" if time.monotonic() < start + limit else "stopped at its limit"
                if status == "under way":
                    yield so_far(status, start, work)
        finally:
            end_processes(process)
    found = so_far(status, start, work)
    if status != "done":
        found["log"] = log.read_text(errors="replace")[-8000:]
    yield found


def so_far(status: str, start: float, work: Path) -> dict:
    """What a part has written into its folder, with how long it took."""
    found, file = {"status": status, "seconds": round(time.monotonic() - start, 1)}, work / "result.json"
    return found | ({"result": json.loads(file.read_text())} if file.exists() else {})


def environment(folder: Path, tiny: bool) -> dict[str, str]:
    """Of every part: what a training process sets up for itself, this checkout first, and caches of its own."""
    sys.path.insert(0, str(ROOT))
    from ebm.runtime.process import prepare_process

    prepare_process()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "XDG_CACHE_HOME": str(folder / "cache")}
    few = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if tiny else {}  # its worker processes each load torch
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | caches | few


def end_processes(process: subprocess.Popen) -> None:
    """End what is left of a part with all its descendants: torchrun's ranks are in sessions of their own."""
    try:
        left = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:  # it has ended, and so have those that it waited for
        left = []
    if process.poll() is None:
        process.kill()
    for one in left:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def keep(work: Path, result: dict) -> None:
    """What a part has found so far."""
    write(result, work / "result.json")


def versions() -> dict:
    import torch

    return machine() | {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}


def commit() -> str | None:
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def tests(options: argparse.Namespace, work: Path) -> None:
    """Keeps after each test how many have passed, and which have not."""
    settings = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--durations=10", "--show-capture=no"]
    together = ["-n", "4"] if find_spec("xdist") and not options.tiny else []  # a test waits for the host more than not
    command = [sys.executable, "-u", "-m", "pytest", *settings, *together, *CUDA_TESTS]
    start, found, summary = time.monotonic(), {"counts": Counter(), "failed": []}, ""

    def keep_found(**more: str) -> None:
        keep(work, more | found | {"seconds": round(time.monotonic() - start, 1)})

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            summary = line.strip() or summary
            outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
            if outcome and "%]" in line:  # no line of the summary
                found["counts"][outcome[1]] += 1
                found["failed"] += [line.strip()] if outcome[1] in ("FAILED", "ERROR") else []
                keep_found()
    keep_found(summary=summary)
    raise SystemExit(process.returncode)


def chain(options: argparse.Namespace, work: Path) -> None:
    """Steps a second of each side, the sides in turn; one process, so that all see the same clocks and heat."""
    from ebm.runtime.process import prepare_process

    prepare_process()
    import torch
    from chain import bare, torchebm

    from ebm.energies import ResNetEnergyFunction
    from ebm.runtime.distributed import set_numerics

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def numerics(deterministic: bool, run):
        """`run` under a run's default numerics, or with the fastest algorithms."""

        def side():
            set_numerics(device, deterministic, tf32=False)
            return run()

        return side

    cases = {"8x8 4 x8": ((1, 8, 8), (4,), 1, 8)} if options.tiny else CHAINS
    steps, rounds, result = (2, 2, {}) if options.tiny else (20, 5, {})
    for case, (image, widths, blocks, batch) in cases.items():
        torch.manual_seed(0)
        energy = ResNetEnergyFunction(*image, widths, blocks).train().to(device)
        x = (torch.rand(batch, *image) * 2 - 1).to(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        network, facts = bare(energy, x, dtype, steps)
        limit = TINY_LIMIT if options.tiny else 60
        engines = {"eager": our_engine(energy, x, dtype), "eager, fastest algorithms": our_engine(energy, x, dtype),
                   "compiled": our_engine(energy, x, dtype, limit)}  # fmt: skip
        sides = {name: numerics("fastest" not in name, our_chain(engine, x, steps)) for name, engine in engines.items()}
        sides["bare"] = numerics(False, network)
        if has_torchebm():
            sides["torchebm"] = numerics(False, torchebm(energy, x, dtype, steps)[0])
        for name, side in sides.items():
            for _ in range(2):
                side()
            print(f"{case}: {name} is warm", flush=True)
        times = alternate({name: lambda side=side: seconds(side) for name, side in sides.items()}, rounds)
        best = min(median(times["eager"]), median(times["compiled"]))  # of what gives the same bits every time
        result[case] = {
            "steps_per_s": {name: spread([steps / s for s in values], 2) for name, values in times.items()},
            "mfu": round(facts["flops"] * steps / best / facts["matmul_flops_per_s"], 3),
            "compiled_over_eager": round(median(times["eager"]) / median(times["compiled"]), 3),
            "was_compiled": engines["compiled"].energy not in engines["compiled"]._functions.values(),
        }
        keep(work, result)


def our_engine(energy, x, dtype, compile_within: float | None = None):
    from ebm.energies import FoldedEnergy, chain_dtype
    from ebm.samplers import Engine
    from ebm.samplers.compiled import TOLERANCE, Compiler

    dtype = chain_dtype(dtype, x.device)
    compiler = None if compile_within is None else Compiler(True, TOLERANCE[dtype], compile_within)
    return Engine(FoldedEnergy(energy, dtype).refresh(), compiler=compiler)


def our_chain(engine, x, steps: int):
    from ebm.samplers import langevin
    from ebm.streams import stream_sources

    noise = stream_sources(0, "chain", range(4), device=x.device)
    settings = {"num_steps": steps, "step_size": 10.0, "noise_scale": 0.005, "grad_clamp": 0.03, "bounds": (-1.0, 1.0)}
    return lambda: engine(langevin, x, generator=noise, **settings)


def has_torchebm() -> bool:
    return find_spec("torchebm") is not None


def shards(data: Path, folder: Path) -> None:
    """Write the shards of --data once, for all parts, unless these are shards."""
    for split in ("train", "test"):
        if (data / split / "manifest.json").exists():
            (folder / split).symlink_to((data / split).resolve())
            continue
        shard = [sys.executable, "-m", "ebm", "shard", "--out", str(folder / split), "--split", split, "--source"]
        if (data / f"{split}.npz").exists():
            import numpy as np

            np.save(folder / f"{split}.npy", np.load(data / f"{split}.npz")["images"])
            shard += [f"npy:{folder / split}.npy"]
        else:
            shard += ["fashion_mnist", "--root", str(data)]
        subprocess.run(shard, cwd=ROOT, check=True, stdout=sys.stderr, timeout=120)


def config(options: argparse.Namespace, work: Path, name: str = "fashion_mnist") -> list[str]:
    """Arguments of train.py for the parts that train: config `name` with Fashion-MNIST from --data, or the digits."""
    folder, sources = work.parent, ["data.source=null", "evaluate.source=null"]
    if options.data is None:
        folder, name, sources = work, "digits", ["data.source=digits", "evaluate.source=digits"]
    where = [f"data.shards={folder / 'train'}", f"evaluate.shards={folder / 'test'}"]
    return ["--config", f"configs/{name}.yaml", *where, *sources,
            *(TINY if options.tiny else ["tracking.wandb=disabled"])]  # fmt: skip


def script(name: str, out: Path, *arguments: str) -> dict:
    """The JSON object that a benchmark writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--out", str(out), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads(out.read_text())


def step(options: argparse.Namespace, work: Path) -> None:
    arguments, result = config(options, work), {}
    steps = ["--steps", "4" if options.tiny else "240"]
    eager = ["train.compile=false"]
    variants = {"shipped": [], "eager": eager, "eager, fastest algorithms": [*eager, "train.deterministic=false"]}
    for name, settings in variants.items():
        own = [f"run.dir={work / name.replace(', ', '_').replace(' ', '_')}", *settings]
        found = script("step.py", work / "step.json", *arguments[:2], *steps, *arguments[2:], *own)
        result[name] = {key: value for key, value in found.items() if key not in ("machine", "config")}
        keep(work, result)
        if options.tiny:  # on a CPU the others are the same
            return


def train(work: Path, name: str, arguments: list[str], *settings: str, ranks: int = 1) -> list[tuple[float, str]]:
    """The lines of a training command's log, which go to this process's output too, with the seconds since its start;
    the last is of its end."""
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments, f"run.dir={work / name}", *settings]
    start, lines = time.monotonic(), []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append((round(time.monotonic() - start, 1), line.rstrip()))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return [*lines, (round(time.monotonic() - start, 1), "ended")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def compile(options: argparse.Namespace, work: Path) -> None:
    arguments, result = config(options, work), {}
    settings = [*FEW_STEPS, "train.steps=2", f"train.compile={'true' if options.tiny else 'auto'}"]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    for name in ("cold", "warm"):
        lines = train(work, name, arguments, *settings)
        first = next(seconds for seconds, line in lines if line.startswith("step 1/"))
        choices = work / name / "compiled.json"
        result[name] = {
            "first_step_s": first,
            "log": [f"{seconds} s: {line}" for seconds, line in lines if seconds <= first] + [f"{lines[-1][0]} s: end"],
            "choices": json.loads(choices.read_text()) if choices.exists() else None,
        }
        keep(work, result)


def ranks(options: argparse.Namespace, work: Path) -> None:
    """The same run with one rank and with two: the same samples and chains, and losses that agree."""
    arguments, result, losses, traces = config(options, work), {}, [], []
    settings = [*SMALL, "train.steps=10", "data.trace=true", "train.backend=gloo", "train.compile=false"]
    for number in (1, 2):
        result[f"{number}_s"] = train(work, str(number), arguments, *settings, ranks=number)[-1][0]
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
    """Four checkpoints at most: each takes a process to measure."""
    arguments = config(options, work, "fashion_mnist_density_gpu")
    own = ["--every", "4", "--num", "64", "--steps", "10"] if options.tiny else ["--every", "1000", "--limit", "130"]
    steps = ["train.steps=4"] if options.tiny else []
    where = [*arguments[:2], "--run", str(work / "run")]
    script("speedrun.py", work / "result.json", *where, *own, *arguments[2:], *steps)


PARTS = {"tests": tests, "chain": chain, "step": step, "compile": compile, "ranks": ranks, "quality": quality}

if __name__ == "__main__":
    main()
