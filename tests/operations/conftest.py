"""A laptop, hosts, and a server of data, all on 127.0.0.1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.operations.hosts import (
    Host,
    copy_checkout,
    missing_tools,
    open_host,
    shared_environment,
    tool_folders,
    write_ssh_config,
)
from tests.operations.servers import serve_files

KEY = "e5" + "0123456789abcdef" * 2 + "wandb7"
"""Long enough to pass for a W&B key, and found nowhere by accident."""
TOKENIZER = "simplestories_8k"

TINY = """\
extends = "{base}"

[run]
name = "tiny"

[model]
context_length = 32
depth = 1

[training]
max_steps = {steps}
total_batch_size = 128
device_batch_size = 4
log_every = 1
eval_every = 0
save_every = 10
sample_every = 0
precision = "fp32"
threads = 1

[schedule]
warmup_steps = 2

[logging]
plots = false

[inference]
prompts = []
"""


@dataclass(frozen=True)
class Laptop:
    """A checkout from which somebody calls `just`."""

    root: Path
    variables: dict[str, str]

    def just(self, *words: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """What a recipe prints, standard error included."""
        done = subprocess.run(
            ["just", "--justfile", str(self.root / "Justfile"), *words],
            cwd=cwd or self.root,
            env={**self.variables, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert not check or done.returncode == 0, f"just {' '.join(words)}: {done.returncode}\n{done.stdout}"
        assert check or done.returncode != 0, f"just {' '.join(words)} should have failed\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Generator[list[Host]]:
    """Two of them, with one file system between them, as in a cluster."""
    if missing := missing_tools():
        pytest.skip(f"{', '.join(missing)} not found: install openssh-server, openssh-client, tmux, rsync, git and uv")
    # tmux's sockets may lie no deeper than about 100 characters.
    folder = tmp_path_factory.mktemp("hosts")
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    root = folder / "remote root"
    with open_host(folder, "a", root, key) as first, open_host(folder, "b", root, key) as second:
        write_ssh_config(folder / "ssh_config", [first, second], key)
        yield [first, second]


@pytest.fixture(scope="session")
def laptop(hosts: list[Host], simplestories: str, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    root = tmp_path_factory.mktemp("laptop") / "check out"
    root.mkdir()
    copy_checkout(root)
    for steps, name in ((30, "tiny.toml"), (100_000, "long.toml")):
        text = TINY.format(base="config/resources/simplestories.toml", steps=steps)
        (root / name).write_text(text.replace('"tiny"', f'"{Path(name).stem}"'))
    (root / "env" / "wandb.env").write_text(f"WANDB_API_KEY={KEY}\n")
    (root / "env" / "machine.env").write_text("TRANSFORMERLM_LOG=info\n")
    home = root.parent / "home"
    home.mkdir()
    path = os.pathsep.join([*tool_folders(), "/usr/local/bin", "/usr/bin", "/bin"])
    variables = {
        "PATH": path,
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PRIME_HOST": hosts[0].name,
        "REMOTE_ROOT": str(hosts[0].root),
        "SSH_CONFIG": str(hosts[0].home.parent / "ssh_config"),
        "SIMPLESTORIES_URL": simplestories,
        **shared_environment(),
    }
    return Laptop(root, variables)


@pytest.fixture(scope="session")
def simplestories(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The address of files as SimpleStories has them, only smaller."""
    folder = tmp_path_factory.mktemp("simplestories")
    stories = ["corpus.num_train_stories=200", "corpus.num_val_stories=20"]
    tokenizer = folder / "tokenizer"
    for module, settings in (
        ("cli.train_tokenizer", [f"output.dir={tokenizer}", "tokenizer.vocab_size=300"]),
        ("cli.make_data", [f"tokenizer.path={tokenizer}", f"output.train_prefix={folder}/train",
                           f"output.val_prefix={folder}/val"]),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", module, *stories, *settings], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    files = folder / "files"
    files.mkdir()
    for kind, ending in (("vocab", "json"), ("merges", "txt"), ("special_tokens", "json")):
        shutil.copy(tokenizer / f"{kind}.{ending}", files / f"{kind}_{TOKENIZER}.{ending}")
    for made, name in (("train", "train"), ("val", "test")):
        for ending in ("bin", "idx"):
            shutil.copy(folder / f"{made}.{ending}", files / f"simplestories_{name}_text_document.{ending}")
    with serve_files(files) as server:
        yield server.url
