"""Throughput of 1, 2 and 4 ranks at a fixed batch a rank, and what the measured pieces predict for more.

python benchmarks/scaling.py [--ranks 1 2] [--batch 128] [--steps 200] [--rounds 3] [--out FILE] [key=value ...]

Real `accelerate launch` runs on digits with one thread a rank, the rank counts in turns; the step is the median of
perf/step_s, each of 10 steps, after the first 20. Ranks beyond the machine's cores share them, and are marked so. The
share of communication is that of an all-reduce of the network's gradient alone, timed in two processes (gloo).

The prediction takes `--step-ms` (a step of one GPU without communication) and `--gradient-mb`. For N GPUs in nodes of 8
it gives the time of a ring all-reduce, 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency, over the slower of
`--intra-gb` and `--inter-gb` (GB/s a GPU; assumed, not measured), and the step where none of it overlaps with the
backward pass, and where all but one bucket of 25 MB does. Chains communicate nothing, so all of it is in the loss.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # for their helpers

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import Run, free_port, records
from timing import alternate, machine, publish, ratios, spread, table

from ebm.config import load_config
from ebm.data.shards import ensure_shards
from ebm.energies import build_energy

ROOT = Path(__file__).parent.parent

BUCKET_MB = 25  # DistributedDataParallel's
WARM_UP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=128, help="images a rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=250.0)
    parser.add_argument("--gradient-mb", type=float, default=24.0)
    parser.add_argument("--intra-gb", type=float, default=200.0, help="all-reduce bandwidth inside a node, GB/s")
    parser.add_argument("--inter-gb", type=float, default=25.0, help="between nodes, GB/s a GPU")
    parser.add_argument("--latency-us", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(options, Path(folder)) | {"predicted": predicted(options)}
    publish(result, options.out)


def measured(options, folder: Path) -> dict:
    config = load_config(None, options.overrides)
    shards = folder / "shards"
    ensure_shards(str(shards), config.data.source, "train")
    sides = {str(n): lambda n=n: step_seconds(n, options, shards, folder) for n in options.ranks}
    times = alternate(sides, options.rounds)
    parameters = sum(p.numel() for p in build_energy(config.energy, config.data.shape, 0).parameters())
    reduce = all_reduce_seconds(parameters)
    rows, result = [], {}
    for n, values in times.items():
        rates = [int(n) * options.batch / s for s in values]
        one = [options.batch / s * int(n) for s in times[str(options.ranks[0])]]
        efficiency = median(ratios(rates, one)) * options.ranks[0]
        crowded = int(n) > (os.cpu_count() or 1)
        result[n] = {"step_s": spread(values), "images_per_s": spread(rates, 1), "efficiency": round(efficiency, 3),
                     "share_of_all_reduce": round(reduce / median(values), 4) if int(n) > 1 else 0.0,
                     "more_ranks_than_cores": crowded}  # fmt: skip
        name, share = f"{n}{' (share cores)' if crowded else ''}", result[n]["share_of_all_reduce"]
        rows.append([name, 1e3 * median(values), median(rates), f"{efficiency:.1%}", f"{share:.2%}"])
    print(table(["ranks", "ms a step", "images/s", "efficiency", "all-reduce"], rows))
    return {"machine": machine(), "batch_a_rank": options.batch, "threads_a_rank": 1, "parameters": parameters,
            "all_reduce_s": round(reduce, 6), "ranks": result}  # fmt: skip


def step_seconds(ranks: int, options, shards: Path, folder: Path) -> float:
    number = len(list(folder.glob("run_*")))
    run_dir = folder / f"run_{number}"
    settings = {
        "run.dir": run_dir, "data.shards": shards, "data.streams": 4, "train.batch_size": ranks * options.batch,
        "train.steps": options.steps, "train.log_every": 10, "buffer.size": ranks * 4096,
        "tracking.wandb": "disabled", "tracking.samples_every": 10**6, "tracking.sample_steps": 1,
        "tracking.num_samples": 1, "checkpoint.every": 10**6, "health.every": 10**6,
    }  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    if ranks > 1:
        launch += ["--config_file", str(ROOT / "launch/accelerate/cpu_2.yaml"), "--num_processes", str(ranks)]
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *options.overrides]
    log = folder / f"log_{number}"
    run = Run([*launch, str(ROOT / "train.py"), *overrides], log)
    if run.wait(1200) != 0:
        raise SystemExit(log.read_text())
    return median(r["perf/step_s"] for r in records(run_dir / "metrics.jsonl") if r["step"] > WARM_UP)


def all_reduce_seconds(numbers: int) -> float:
    """Median seconds to sum `numbers` float32 over two processes."""
    with tempfile.NamedTemporaryFile() as file:
        mp.spawn(_reduce, (numbers, free_port(), file.name), nprocs=2)
        return float(file.read())


def _reduce(rank: int, numbers: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    values, times = torch.ones(numbers), []
    for _ in range(50):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - start)
    if rank == 0:
        Path(out).write_text(str(median(times)))
    dist.destroy_process_group()


def predicted(options) -> list[dict]:
    rows, found = [], []
    for n in (8, 16, 32, 64, 128, 256, 512, 1024):
        bandwidth = options.intra_gb if n <= 8 else min(options.intra_gb, options.inter_gb)

        def ring(megabytes: float, n=n, bandwidth=bandwidth) -> float:
            return 2 * (n - 1) / n * megabytes / bandwidth + 2e-3 * (n - 1) * options.latency_us  # ms; 1 GB/s = 1 MB/ms

        alone = options.step_ms + ring(options.gradient_mb)
        overlapped = options.step_ms + ring(min(options.gradient_mb, BUCKET_MB))
        found.append({"gpus": n, "all_reduce_ms": round(ring(options.gradient_mb), 2), "step_ms": round(alone, 1),
                      "step_ms_overlapped": round(overlapped, 1), "efficiency": round(options.step_ms / alone, 3),
                      "efficiency_overlapped": round(options.step_ms / overlapped, 3)})  # fmt: skip
        rows.append(list(found[-1].values()))
    print(table([name.replace("_", " ") for name in found[0]], rows))
    return found


if __name__ == "__main__":
    main()
