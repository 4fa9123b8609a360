"""docs/data.md: each command in it runs, on inputs of the kind that it speaks of, to a trained energy."""

import argparse
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from runs import ROOT

from ebm.commands import index, shard
from ebm.data.sources import NAMES

PAGE = ROOT / "docs" / "data.md"
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
LABELS = np.arange(64, dtype=np.uint8) % 4
QUICK = [
    *("train.steps=2", "checkpoint.every=2", "train.batch_size=8", "data.streams=2", "data.workers=0"),
    *("sampler.num_steps=2", "buffer.size=64", "tracking.wandb=disabled", "tracking.sample_steps=2"),
]
ALL = """
import json, sys
from ebm.__main__ import main
for arguments in json.loads(sys.stdin.read()):
    code = main(arguments)
    assert code == 0, (arguments, code)
"""


def picture(i: int, mode: str = "L", side: int = 12) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.resize(IMAGES[i], (side, side)).astype(np.uint8)).convert(mode).save(out, "PNG")
    return out.getvalue()


def write_inputs(root) -> None:
    for i in range(64):
        for name in (f"pictures/{'cat' if i % 2 else 'dog'}/{i}.png", f"loose/{i}.png"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(picture(i, "RGB" if i % 3 else "L"))
        name = root / f"animals/{('train', 'val')[i % 2]}/{'cat' if i % 3 else 'dog'}/{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(picture(i))
    (root / "labels.csv").write_text(
        "file,label\n" + "".join(f"{i}.png,{'odd' if i % 2 else 'even'}\n" for i in range(64))
    )
    (root / "downloaded").mkdir()
    with tarfile.open(root / "downloaded/00000.tar", "w") as tar:
        for i in range(64):
            members = {"jpg": picture(i, "RGB", 16), "txt": b"a caption", "json": json.dumps({"width": i % 2}).encode()}
            for end, data in members.items():
                info = tarfile.TarInfo(f"{i:09d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    np.save(root / "images.npy", IMAGES)
    np.save(root / "labels.npy", LABELS)
    np.savez(root / "set.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:9], y_test=LABELS[:9])
    (root / "fashion").mkdir()
    for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (root / f"fashion/train-{kind}-ubyte").write_bytes(head + array.tobytes())
    rows = {"image": [{"bytes": picture(i, "L", 8)} for i in range(64)], "label": [int(label) for label in LABELS]}
    (root / "table").mkdir()
    parquet.write_table(pa.table(rows), root / "table/train.parquet")


def test_the_page_has_every_flag_and_source():
    text = PAGE.read_text()
    for command in (shard, index):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        assert not [flag for flag in flags if not re.search(rf"{flag}\b", text)]
    assert all(f"`{name}`" in text for name in NAMES)


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs(tmp_path):
    commands = [
        shlex.split(line, comments=False)
        for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert len(commands) > 15 and all(words[0] == "ebm" for words in commands)
    write_inputs(tmp_path)
    calls = [[*words[1:], *(QUICK if words[1] == "train" else [])] for words in commands]
    done = subprocess.run(
        [sys.executable, "-c", ALL],
        input=json.dumps(calls),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for run in (call[1].removeprefix("run.dir=") for call in calls if call[0] == "train"):
        assert (tmp_path / run / "DONE").exists(), run
