"""Two hosts on this machine: network namespaces on a bridge in a third, so that one cable is pulled at a time."""

import os
import shutil
import subprocess

import psutil

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_not() -> str | None:
    """Why there can be no hosts of one's own here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: ip (apt-get install iproute2)"
    name = f"ebm{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


class Hosts:
    """Within a `with` block: hosts 0 and 1 with ADDRESSES on eth0, and nothing else within reach."""

    def __init__(self):
        self.names = [f"ebm{os.getpid()}{letter}" for letter in "ab"]
        self._switch = f"ebm{os.getpid()}s"

    def __enter__(self):
        for name in (self._switch, *self.names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for name, address in zip(self.names, ADDRESSES, strict=True):
            port = f"port{name[-1]}"
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_):
        for name in (*self.names, self._switch):
            for pid in _ip("netns", "pids", name).split():
                psutil.Process(int(pid)).kill()
            _ip("netns", "del", name)

    def on(self, host: int, command: list[str]) -> list[str]:
        """The command that runs `command` there."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def link(self, host: int, state: str) -> None:
        """Plug or pull a host's cable, "up" or "down"."""
        _ip("-n", self.names[host], "link", "set", "eth0", state)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
