"""What a config says of one data set does not apply to another: its shards, its held-out data, its run directory."""

import json
import re
from pathlib import Path
from typing import Any

HELD_OUT = ("source", "shards")  # of evaluate


def without_other_data(
    below: dict[str, Any], above: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(below, above) without what belongs to the data set of `below` where `above` has another one, and what to tell.

    Another `data.source` is another data set, whose shards and run get directories named after it unless `above` names
    them. Other `data.shards` alone are those of the same source, written there if need be, unless shards are there
    already of which nobody knows that they are: then, or where there is no source, only the held-out data go.
    """
    held_out = above.get("evaluate")
    if isinstance(held_out, dict) and "source" not in held_out and _of_unknown_origin(held_out.get("shards")):
        below, _ = _without_held_out(below, above)
    old, new = below.get("data"), above.get("data")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return below, above, []
    was, now = old.get("source"), new.get("source", old.get("source"))
    moved = "shards" in new and new["shards"] != old.get("shards")
    if was != now and (moved or (was is not None and now is not None)):
        return _other_source(below, above, was, now)
    if moved and was is None and "source" not in new:
        left, dropped = _without_held_out(below, above)
        return left, above, [f"data.shards={new['shards']} {_does_not_apply(dropped)}"] if dropped else []
    if moved and "source" not in new and _of_unknown_origin(new["shards"]):
        left, dropped = _without_held_out(below, above)
        left["data"] = old | {"source": None}
        dropped.insert(0, f"data.source={was}")
        return left, above, [f"the shards in {new['shards']} were made elsewhere: {_does_not_apply(dropped)}"]
    return below, above, []


def _other_source(
    below: dict[str, Any], above: dict[str, Any], was: str | None, now: str | None
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    old, new = below["data"], above["data"]
    left, dropped = _without_held_out(below, above)
    named, above = [], dict(above)
    name = _name_of(str(new["shards"] if new.get("shards") else now))
    if "shards" not in new:
        above["data"] = new | {"shards": f"data/{name}/train"}
        named.append(f"data.shards={above['data']['shards']}")
        dropped.append(f"data.shards={old.get('shards')}")
        if now is not None and ":" not in now and "evaluate" not in above:  # its test split is known by name
            above["evaluate"] = {"source": now, "shards": f"data/{name}/test"}
            named.append(f"evaluate.shards={above['evaluate']['shards']}")
    run = above.get("run", {})
    if isinstance(run, dict) and "dir" not in run and isinstance(below.get("run"), dict) and "dir" in below["run"]:
        dropped.append(f"run.dir={below['run']['dir']}")
        above["run"] = run | {"dir": f"runs/{name}"}
        named.append(f"run.dir={above['run']['dir']}")
    note = f"data.source={now} is another data set than {was}: {_does_not_apply(dropped)}"
    return left, above, [f"{note}{'; instead ' if named else ''}{', '.join(named)}"] if dropped else []


def _does_not_apply(dropped: list[str]) -> str:
    held_out = any(item.startswith("evaluate.") for item in dropped)
    hint = " (set evaluate.shards to have held-out data)" if held_out else ""
    return f"the config's {', '.join(dropped)} {'do' if len(dropped) > 1 else 'does'} not apply{hint}"


def _without_held_out(below: dict[str, Any], above: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`below` without its held-out data, and what was dropped that `above` does not give."""
    held_out = below.get("evaluate")
    if not isinstance(held_out, dict):
        return dict(below), []
    given = above["evaluate"] if isinstance(above.get("evaluate"), dict) else {}
    dropped = [f"evaluate.{k}={held_out[k]}" for k in HELD_OUT if held_out.get(k) is not None and k not in given]
    return below | {"evaluate": {k: value for k, value in held_out.items() if k not in HELD_OUT}}, dropped


def _of_unknown_origin(shards: object) -> bool:
    """Whether there is a manifest that does not say what its shards were made from."""
    try:
        manifest = json.loads((Path(str(shards)).expanduser() / "manifest.json").read_text())
        return isinstance(manifest, dict) and manifest.get("source") is None
    except (OSError, ValueError, RuntimeError, RecursionError):  # no shards yet, or a URL, or for the reader to refuse
        return False


def _name_of(place: str) -> str:
    """A name for a data set: the last part of its place that is no split, pattern or file name extension."""
    parts = [part for part in re.split(r"[/:#]", place) if part and "*" not in part]
    names = [re.sub(r"\.(npy|npz|parquet)$", "", part) for part in parts]
    proper = [name for name in names if name not in ("train", "training", "test", "val", "validation", "~", "..", ".")]
    return re.sub(r"[^\w.-]", "_", proper[-1]).lstrip(".-") or "own" if proper else "own"
