"""A GPU host as far as ssh can tell: an sshd on 127.0.0.1 with a throw-away key, a home and a tmux server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0


@dataclass(frozen=True)
class Host:
    """What a laptop needs to know of it, and what only a test may know."""

    name: str
    """As it is called in the ssh configuration of the test."""
    home: Path
    root: Path
    """`REMOTE_ROOT`. With a space, as nobody would choose and everybody's scripts must bear."""
    port: int
    sshd: subprocess.Popen[bytes]

    def connections(self) -> list[int]:
        """Processes that serve an open connection."""
        return children(self.sshd.pid)


def missing_tools() -> list[str]:
    return [name for name in ("ssh", "ssh-keygen", "tmux", "rsync", "uv", "git") if shutil.which(name) is None] + (
        [] if sshd_path() else ["sshd"]
    )


def sshd_path() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextmanager
def open_host(folder: Path, name: str, root: Path, key: Path) -> Generator[Host]:
    """Serve until the block ends, and leave no process behind."""
    home = folder / name
    home.mkdir(parents=True)
    home.chmod(0o700)
    host_key = folder / f"{name}.host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host_key], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sockets = folder / f"{name}.tmux"
    sockets.mkdir(mode=0o700)
    variables = {
        "HOME": home,
        "PATH": os.pathsep.join([*tool_folders(), "/usr/local/bin", "/usr/bin", "/bin"]),
        "TMUX_TMPDIR": sockets,
        "HISTFILE": home / ".bash_history",
        "OMP_NUM_THREADS": "1",
        **shared_environment(),
    }
    settings = " ".join(f'"{variable}={value}"' for variable, value in variables.items())
    configuration = folder / f"{name}.sshd_config"
    configuration.write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {host_key}\nPidFile none\n"
        f"AuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "PermitRootLogin yes\nPrintMotd no\n"
        f"SetEnv {settings}\n"
    )
    program = sshd_path()
    assert program is not None
    with suppress(OSError):  # where sshd separates privileges; only root can make it, and only root needs it
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = (folder / f"{name}.sshd_log").open("wb")
    sshd = subprocess.Popen([program, "-D", "-e", "-f", configuration], stdout=log, stderr=log)
    try:
        wait_for_port(port, sshd, folder / f"{name}.sshd_log")
        yield Host(name, home, root, port, sshd)
    finally:
        end_tree(sshd.pid)
        sshd.wait()
        log.close()
        subprocess.run(
            ["tmux", "kill-server"],
            env={**os.environ, "TMUX_TMPDIR": str(sockets)},
            capture_output=True,
            check=False,
        )


def write_ssh_config(path: Path, hosts: list[Host], key: Path) -> None:
    path.write_text(
        "".join(
            f"Host {host.name}\n  HostName 127.0.0.1\n  Port {host.port}\n  IdentityFile {key}\n  IdentitiesOnly yes\n"
            f"  StrictHostKeyChecking no\n  UserKnownHostsFile {path}.known\n  LogLevel ERROR\n"
            for host in hosts
        )
    )


def copy_checkout(to: Path) -> None:
    """The working tree as git lists it, as a checkout of its own: the laptop."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "init", "--quiet"], cwd=to, check=True)
    subprocess.run([*git, "add", "--all"], cwd=to, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "laptop"], cwd=to, check=True)


def tool_folders() -> list[str]:
    """Of uv and just, which live where no system looks."""
    found = [shutil.which(name) for name in ("uv", "just")]
    return list(dict.fromkeys([str(Path(sys.executable).parent), *(str(Path(path).parent) for path in found if path)]))


def shared_environment() -> Mapping[str, str]:
    """What makes the host use the environment that runs this test, instead of an installation of its own."""
    return {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1", "UV_OFFLINE": "1"}


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"sshd does not answer: {log.read_text()}")


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def end_tree(pid: int) -> None:
    for child in children(pid):
        end_tree(child)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
