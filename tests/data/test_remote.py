"""Shards over http and from object stores: the same samples as from a disk, or an error that names the shard."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from runs import command, final_hashes, finish
from shard_server import ShardServer

from ebm.__main__ import main
from ebm.config import load_config
from ebm.data import Access, ShardReader, load_manifest
from ebm.data.cache import LOCK, ShardCache, locked
from ebm.data.indexing import index_shards
from ebm.data.items import ArraySource
from ebm.data.manifest import MAX_MANIFEST, check_files, verify
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards, write_shards
from ebm.errors import ConfigError, DataError
from ebm.streams import owned_streams

SHARDS, SIZE, STREAMS = 8, 20, 4


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Eight shards of 20 noise images, of about 30 kB each."""
    images = np.random.default_rng(0).integers(0, 256, (SHARDS * SIZE, 12, 12, 3), dtype=np.uint8)
    source = ArraySource("test", images, np.arange(len(images)) % 10)
    return write_shards(source, tmp_path_factory.mktemp("remote"), samples_per_shard=SIZE, workers=1, progress=False)


@pytest.fixture
def server(local, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ShardServer(local.directory) as server:
        yield server


@pytest.fixture
def access(tmp_path):
    return Access(cache_dir=str(tmp_path / "cache"), retries=2, timeout=0.5, wait=0.01)


def remote(server, access):
    manifest = load_manifest(server.url, access)
    check_files(manifest)
    server.requests.clear()
    return manifest


def reader(manifest, streams, workers=0, positions=None, **options) -> ShardReader:
    settings = {"seed": 1, "num_streams": STREAMS, "per_stream": 4, "window": 15} | options
    return ShardReader(
        manifest, manifest.shape, streams=list(streams), workers=workers, positions=positions, **settings
    )


def files(access) -> dict[str, int]:
    directory = Path(access.cache_dir)
    with locked(directory / LOCK):  # workers add and remove meanwhile
        names = [path.name for path in directory.iterdir() if path.name != LOCK]
        return {name: (directory / name).stat().st_size for name in names if (directory / name).exists()}


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


# The same as from a disk


def test_a_manifest_over_http_is_the_local_one(server, access, local):
    for url in (server.url, server.url.rstrip("/"), f"{server.url}manifest.json"):
        found = load_manifest(url, access)
        assert found.shards == local.shards and found.shape == local.shape
        assert found.path(found.shards[1]) == f"{server.url}shard-000001.tar"
    assert load_manifest(f"file://{local.directory}", access) == local


@pytest.mark.parametrize(("workers", "room"), [(0, SHARDS), (0, 2), (2, 2)])
def test_batches_positions_and_resuming_are_those_of_local_shards(server, access, local, workers, room):
    """Two ranks that share a cache, with room for two shards or all, over two epochs and resumed in the middle."""
    largest = max(shard.bytes for shard in local.shards)
    access = Access(**vars(access) | {"cache_bytes": room * largest + 1, "timeout": 20})
    for rank in range(2):
        streams = owned_streams(STREAMS, rank, 2)
        here, there = reader(local, streams), reader(remote(server, access), streams, workers)
        for step in range(20):
            a, b = next(here), next(there)
            assert a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert here.positions == there.positions
            assert sum(files(access).values()) <= access.cache_bytes
            if step == 7:
                there.close()
                there = reader(remote(server, access), streams, workers, positions=here.positions)
        there.close()


def test_a_node_reads_its_streams_shards_alone_and_each_once(server, access, local):
    manifest = remote(server, access)
    one = reader(manifest, [1])
    while one.epoch < 0.9:
        next(one)
    order, owned = one.order, set()
    for position in range(order.length(1) + 1):  # and the first window of the next epoch, which is asked for ahead
        owned |= {local.shards[shard].name for shard, _, _ in order.segments(order.window(1, position))}
    assert len(server.requests) == len(set(server.requests)) < SHARDS
    assert set(server.requests) <= owned


def test_the_next_windows_shards_come_while_this_one_is_used(server, access):
    manifest = remote(server, access)
    one = reader(manifest, [0], num_streams=1, window=SIZE)
    first, second = (one.order.segments(one.order.window(0, position))[0][0] for position in (0, SIZE))
    next(one)
    wait_for(lambda: len(server.requests) >= 2)
    assert set(server.requests[:2]) == {shard_name(first), shard_name(second)}


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_read_all_and_names_that_need_quoting(server, access, local, tmp_path):
    for block, (images, labels, keys) in zip(
        read_all(server.url, local.shape, access=access), read_all(local, local.shape), strict=True
    ):
        assert torch.equal(block[0], images) and torch.equal(block[1], labels) and block[2] == keys
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "a b#1?%20é.tar").write_bytes(local.path(local.shards[0]).read_bytes())
    index_shards(odd)
    with ShardServer(odd) as other:
        assert sum(len(keys) for *_, keys in read_all(other.url, local.shape, access=access)) == SIZE


def test_verify(server, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert main(["index", server.url, "--verify"]) == 0 and f"8 shards in {server.url} have" in capsys.readouterr().out
    assert main(["index", server.url]) == 2 and "index the shards where they are" in capsys.readouterr().err
    server.faults["shard-000003.tar"] = ["status 403"]
    assert main(["index", server.url, "--verify"]) == 4
    assert f"{server.url}shard-000003.tar: HTTP 403" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_object_store(local, access):
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/set/{path.name}": path.read_bytes() for path in local.directory.iterdir()})
    access = Access(**vars(access) | {"schemes": ("memory",)})
    manifest = load_manifest("memory://bucket/set", access)
    check_files(manifest)
    here, there = reader(local, range(STREAMS)), reader(manifest, range(STREAMS))
    for _ in range(20):
        a, b = next(here), next(there)
        assert a.keys == b.keys and torch.equal(a.images, b.images)
    store.pipe("/bucket/set/shard-000000.tar", b"\0" * local.shards[0].bytes)
    with pytest.raises(DataError, match=r"memory://bucket/set/shard-000000.tar: sha256 is .* \(3 tries"):
        verify(manifest)
    store.rm("/bucket/set/shard-000000.tar")
    with pytest.raises(DataError, match=r"shard-000000.tar: FileNotFoundError"):
        verify(manifest)
    store.rm("/bucket", recursive=True)


def test_s3(local, access, monkeypatch):
    """The library itself against a server of its protocol: pip install s3fs 'moto[server]'."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("no_proxy", "*")
    s3 = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*s3.get_host_and_port()))
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("bucket")
    store.pipe({f"bucket/set/{path.name}": path.read_bytes() for path in local.directory.iterdir()})
    access = Access(**vars(access) | {"schemes": ("s3",), "timeout": 20})
    found = read_all("s3://bucket/set", local.shape, access=access)
    for there, here in zip(found, read_all(local, local.shape), strict=True):
        assert torch.equal(there[0], here[0]) and there[2] == here[2]
    store.rm(f"bucket/set/{shard_name(2)}")
    with pytest.raises(DataError, match=rf"s3://bucket/set/{shard_name(2)}: FileNotFoundError"):
        verify(load_manifest("s3://bucket/set/manifest.json", access))
    s3.stop()


# Faults

PASSING = ("stall", "drip", "drip_headers", "mute", "noise", "cut", "reset", "altered", "longer", "gzip")
PASSING += ("unsized_cut", "chunked_cut", "status 500", "status 503", "status 429")
REASONS = {
    "stall": r"stalled after \d+ bytes: no more than that in 0.5 s",
    "drip": r"stalled after \d+ bytes",
    "drip_headers": r"stalled after 0 bytes",
    "mute": r"stalled after 0 bytes",
    "noise": r"BadStatusLine",
    "cut": r"the connection ended 1 bytes early",
    "reset": r"ConnectionResetError",
    "altered": r"sha256 is \w+, the manifest says \w+",
    "longer": r"has more than the \d+ bytes",
    "gzip": r"ended after|has more than|sha256",
    "unsized_cut": r"ended after \d+ of \d+ bytes",
    "chunked_cut": r"IncompleteRead",
    "status 500": "HTTP 500",
    "status 503": "HTTP 503",
    "status 429": "HTTP 429",
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_tried_again_and_one_that_stays_names_the_shard(server, access, local, fault):
    manifest, shard = remote(server, access), local.shards[0]
    server.faults[shard.name] = [fault, fault]
    with manifest.open(manifest.shards[0]) as file:
        assert file.read() == local.path(shard).read_bytes()
    assert server.requests == [shard.name] * 3 and files(access) == {f"{shard.sha256}.tar": shard.bytes}

    server.faults[local.shards[1].name] = [fault, "always"]
    one = reader(manifest, range(STREAMS), on_error="skip", max_skipped=0.9)
    with pytest.raises(DataError, match=rf"{server.url}shard-000001.tar: ({REASONS[fault]}).* \(3 tries; more with"):
        list(islice(one, 20))
    wait_for(lambda: not [name for name in files(access) if name.endswith(".part")])


@pytest.mark.parametrize("fault", ["status 404", "status 403", "status 401", "status 204", "status 304"])
def test_what_will_not_change_is_not_tried_again(server, access, fault):
    manifest = remote(server, access)
    server.faults["shard-000000.tar"] = [fault, "always"]
    with pytest.raises(DataError, match=f"shard-000000.tar: HTTP {fault[-3:]} .* Check the URL"):
        manifest.open(manifest.shards[0])
    assert server.requests == ["shard-000000.tar"] and files(access) == {}


@pytest.mark.parametrize("shape", ["kept", "unsized", "chunked", "slow"])
def test_unusual_bodies_are_read(server, access, local, shape):
    server.faults["manifest.json"] = ["whole" if shape == "slow" else shape]
    manifest = remote(server, Access(**vars(access) | {"timeout": 20}))
    server.faults["shard-000000.tar"] = [shape]
    with manifest.open(manifest.shards[0]) as file:
        assert file.read() == local.path(local.shards[0]).read_bytes()


def test_nobody_there(access):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(DataError, match=f"{url}manifest.json: URLError.*refused.*3 tries"):
        load_manifest(url, access)


@pytest.mark.parametrize("fault", ["stall", "cut", "unsized_cut", "status 500", "reset"])
def test_a_manifests_faults(server, access, local, fault):
    server.faults["manifest.json"] = [fault, fault]
    assert load_manifest(server.url, access).shards == local.shards
    server.faults["manifest.json"] = [fault, "always"]
    with pytest.raises(DataError, match=f"{server.url}manifest.json: .*3 tries"):
        load_manifest(server.url, access)


def test_a_manifest_without_end(server, access, monkeypatch):
    monkeypatch.setattr("ebm.data.manifest.MAX_MANIFEST", 1 << 20)
    server.faults["manifest.json"] = ["endless", "always"]
    with pytest.raises(DataError, match=r"manifest.json: larger than 1048576 bytes, which no manifest is"):
        load_manifest(server.url, access)
    assert server.requests == ["manifest.json"] and MAX_MANIFEST > 1 << 20


# What may be read


def test_redirects_lead_to_the_web_alone(server, access, local, tmp_path):
    manifest = remote(server, access)
    server.faults["shard-000000.tar"] = ["redirect /shard-000000.tar", "redirect shard-000000.tar"]
    with manifest.open(manifest.shards[0]) as file:
        assert file.read() == local.path(local.shards[0]).read_bytes()
    secret = local.path(local.shards[1])
    for target in (f"file://{secret}", "ftp://127.0.0.1/x", "data:,x", "memory://x", "pipe:id", "gopher://127.0.0.1/"):
        server.faults["shard-000001.tar"] = [f"redirect {target}"]
        with pytest.raises(DataError, match=r"shard-000001.tar: redirects to '.*', which is not followed"):
            manifest.open(manifest.shards[1])
    server.faults["shard-000001.tar"] = ["redirect /shard-000001.tar", "always"]
    with pytest.raises(DataError, match=r"shard-000001.tar: redirects more than 5 times"):
        manifest.open(manifest.shards[1])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/set", "data.schemes=[s3]"),
        ("memory://bucket/set", "data.schemes="),
        ("pipe:cat /etc/passwd", "never read from a program"),
        ("pipe://cat /etc/passwd", "data.schemes"),
        ("ftp://host/set", "data.schemes"),
        ("http://user:secret@host/set", "http://host/set: must be a plain URL"),
        ("https://host/set?token=secret", "must be a plain URL"),
        ("http::file:///etc/", "no shards in"),
        ("https://host/a::b", "must be a plain URL"),
    ],
)
def test_urls_that_are_refused(url, words):
    with pytest.raises((ConfigError, DataError)) as caught:
        load_manifest(url)
    assert words in str(caught.value) and "secret@" not in str(caught.value) and "token" not in str(caught.value)


def test_schemes_and_keys_in_the_config():
    config = load_config(None, ["data.shards=s3://bucket/set", "data.schemes=[s3]", "data.retries=9"])
    access = Access.of(config.data)
    assert (access.schemes, access.retries, access.timeout) == (("s3",), 9, 60.0)
    for bad in ("[pipe]", "[file]", "[simplecache]", "pipe"):
        with pytest.raises(ConfigError, match=r"data\.schemes"):
            load_config(None, [f"data.schemes={bad}"])


def test_a_source_is_not_written_to_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ensure_shards("https://host.invalid/set/", "digits", "train")
    assert not list(tmp_path.iterdir())


# The cache


def small_cache(tmp_path, shards: int = 3) -> ShardCache:
    cache = ShardCache(tmp_path / "cache", shards * 1000)
    cache.prepare(1000)
    return cache


def write(data: bytes):
    return lambda file: file.write(data)


def test_the_least_recently_used_goes_first(tmp_path):
    cache = small_cache(tmp_path)
    mine = [cache.directory / name for name in ("mine.tar", "mine.part")]
    for path in mine:
        path.write_bytes(bytes(3000))
    for name in "abc":
        cache.open(name * 64, 1000, write(name.encode() * 1000)).close()
    cache.open("a" * 64, 1000, None).close()
    cache.open("d" * 64, 1000, write(b"d" * 1000)).close()
    assert {path.stem[0] for path in cache.directory.glob(f"{'?' * 64}.*")} == set("acd")
    assert all(path.exists() for path in mine), "files that are not the cache's own"


def test_a_shard_that_goes_stays_readable(tmp_path):
    cache = small_cache(tmp_path, shards=1)
    with cache.open("a" * 64, 1000, write(b"a" * 1000)) as file:
        cache.open("b" * 64, 1000, write(b"b" * 1000)).close()
        assert [path.stem for path in cache.directory.glob("*.tar")] == ["b" * 64] and file.read() == b"a" * 1000


def test_many_threads_never_go_beyond_the_bound_and_never_see_half_a_shard(tmp_path):
    cache, most, done = small_cache(tmp_path), [0], threading.Event()

    def slowly(data):
        def fetch(file):
            for at in range(0, 1000, 250):
                file.write(data[at : at + 250])
                time.sleep(0.002)

        return fetch

    def use(seed):
        for number in np.random.default_rng(seed).integers(0, 8, 40):
            data = bytes([number]) * 1000
            with cache.open(str(number) * 64, 1000, slowly(data)) as file:
                assert file.read() == data
        return True

    def watch():
        while not done.is_set():
            with locked(cache.directory / LOCK):  # else what is removed and what then comes both count
                sizes = []
                for path in cache.directory.iterdir():
                    with suppress(FileNotFoundError):
                        sizes.append(path.stat().st_size)
            most[0] = max(most[0], sum(sizes))

    threading.Thread(target=watch, daemon=True).start()
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(use, range(6)))
    done.set()
    assert 1000 < most[0] <= 3000 and not list(cache.directory.glob("*.part"))


def test_too_small_or_not_ours(tmp_path, server, access):
    with pytest.raises(ConfigError, match=r"data.cache_bytes=999 is below the largest shard, 1000 bytes"):
        ShardCache(tmp_path / "cache", 999).prepare(1000)
    with pytest.raises(ConfigError, match=r"data.cache_dir=/proc/1/cache"):
        ShardCache(Path("/proc/1/cache"), 9999).prepare(1000)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match=r"others can write to it"):
        ShardCache(tmp_path / "open", 9999).prepare(1000)


def test_directories_in_which_others_could_put_files(tmp_path):
    for mode in (0o777, 0o770, 0o702):
        (tmp_path / f"{mode:o}").mkdir()
        (tmp_path / f"{mode:o}").chmod(mode)
        with pytest.raises(ConfigError, match=rf"others can write to it; run `chmod go-w .*{mode:o}`"):
            ShardCache(tmp_path / f"{mode:o}", 9999).prepare(1000)
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("ours")
    ShardCache(tmp_path / "link", 9999).prepare(1000)
    if os.getuid() == 0:
        os.chown(tmp_path / "link", 1234, -1, follow_symlinks=False)
        with pytest.raises(ConfigError, match="is a link of another user"):
            ShardCache(tmp_path / "link", 9999).prepare(1000)
        os.chown(tmp_path / "ours", 1234, -1)
        with pytest.raises(ConfigError, match="belongs to another user"):
            ShardCache(tmp_path / "ours", 9999).prepare(1000)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Parts that a killed process left there count until they are old, then they are removed."""

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    cache = small_cache(tmp_path)
    left = cache.directory / ("b" * 64 + ".part")
    left.write_bytes(b"x" * 2500)
    os.utime(left, (time.time() - 7200,) * 2)
    with cache.open("a" * 64, 1000, lambda file: file.write(b"y" * 1000) and None) as file:
        assert file.read() == b"y" * 1000
    assert not left.exists()


def test_a_certificate_that_is_not_trusted_is_final_and_names_the_remedy(tmp_path, local, access, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    call = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", str(key), "-out", str(certificate), *options]
    if shutil.which("openssl") is None or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("openssl can't make a certificate here")
    monkeypatch.setenv("no_proxy", "*")
    with ShardServer(local.directory) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
        url = server.url.replace("http:", "https:")
        with pytest.raises(DataError, match=r"certificate can't be verified .*SSL_CERT_FILE") as caught:
            load_manifest(url, access)
        assert "tries" not in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert load_manifest(url, access).samples == local.samples


def test_a_full_disk_says_so(tmp_path):
    def full(file):
        raise OSError(28, "No space left on device")

    cache = small_cache(tmp_path)
    with pytest.raises(DataError, match=r"data.cache_dir=.*No space left on device.*data.cache_bytes=3000"):
        cache.open("a" * 64, 1000, full)
    assert [path.name for path in cache.directory.iterdir()] == ["lock"]


def test_damage_in_the_cache_is_fetched_again(server, access, local):
    manifest = remote(server, access)
    for change in ("flip", "cut"):
        manifest.open(manifest.shards[0]).close()
        path = Path(access.cache_dir, f"{local.shards[0].sha256}.tar")
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data if change == "flip" else data[:-1])
        found, expected = next(read_all(manifest, local.shape)), next(read_all(local, local.shape))
        assert torch.equal(found[0], expected[0])
        assert path.read_bytes() == local.path(local.shards[0]).read_bytes()


def child(url, access, ready, go, results):
    manifest = load_manifest(url, access)
    ready.release()
    go.wait()
    with manifest.open(manifest.shards[0]) as file:
        results.put(file.read())


def start(server, access, count):
    context = multiprocessing.get_context("fork")
    ready, go, results = context.Semaphore(0), context.Event(), context.SimpleQueue()
    processes = [context.Process(target=child, args=(server.url, access, ready, go, results)) for _ in range(count)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=20)
    go.set()
    return processes, results


def test_processes_share_a_download(server, access, local):
    access = Access(**vars(access) | {"timeout": 20})
    remote(server, access)
    server.faults["shard-000000.tar"] = ["slow"]
    processes, results = start(server, access, 4)
    whole = local.path(local.shards[0]).read_bytes()
    assert [results.get() for _ in processes] == [whole] * 4
    for process in processes:
        process.join()
    assert server.requests.count("shard-000000.tar") == 1


def test_a_killed_download_is_never_taken_for_whole(server, access, local):
    access = Access(**vars(access) | {"timeout": 20, "cache_bytes": 2 * local.shards[0].bytes})
    manifest, shard = remote(server, access), local.shards[0]
    server.faults[shard.name] = ["stall"]
    (process,), _ = start(server, access, 1)
    part = Path(access.cache_dir, f"{shard.sha256}.part")
    wait_for(lambda: shard.name in server.requests and part.exists() and part.stat().st_size == shard.bytes)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert files(access) == {part.name: shard.bytes}
    with manifest.open(manifest.shards[0]) as file:
        assert file.read() == local.path(shard).read_bytes()
    # And one that nobody asks for again does not take up room for ever.
    Path(access.cache_dir, f"{'0' * 64}.part").write_bytes(bytes(shard.bytes))
    manifest.open(manifest.shards[1]).close()
    assert sorted(files(access)) == sorted(f"{one.sha256}.tar" for one in local.shards[:2])


# A run


@pytest.mark.slow
def test_a_runs_trace_is_that_of_local_shards(tmp_path, monkeypatch):
    """Two ranks, a worker each, a cache of two shards; some of the shards fail once."""
    monkeypatch.setenv("no_proxy", "*")
    digits = tmp_path / "digits"
    from ebm.data.sources import open_source

    write_shards(open_source("digits"), digits, samples_per_shard=200, workers=1, progress=False)
    largest = max(shard.bytes for shard in load_manifest(digits).shards)
    with ShardServer(digits) as server:
        for number, fault in enumerate(("reset", "altered", "cut", "status 500")):
            server.faults[shard_name(number)] = [fault]
        options = {"data__workers": 1, "train__steps": 30, "data__cache_dir": tmp_path / "cache"}
        options |= {"data__cache_bytes": 2 * largest + 1000}
        for name, shards in (("here", digits), ("there", server.url)):
            finish(command(2, tmp_path / name, shards, **options), tmp_path / f"{name}.log")
    here, there = (tmp_path / name for name in ("here", "there"))
    assert (here / "trace.jsonl").read_bytes() == (there / "trace.jsonl").read_bytes()
    assert final_hashes(here) == final_hashes(there)
