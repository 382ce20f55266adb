"""`PREFIX.json`, the manifest beside two token files.

It carries what Megatron-LM's layout has no room for: SHA-256 of both files, the largest token, the UTF-8 bytes of the
text (bits per byte needs them), which tokenizer and which source. Files without one (made by Megatron-LM) open too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainkit.errors import UserError

MANIFEST_FORMAT = 1


def manifest_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.json")


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """`PREFIX.json`: what the two files hold and where that came from. It names no path, so that the files may move."""

    format: int = MANIFEST_FORMAT
    files: dict[str, dict[str, Any]]
    """`{"bin": {"bytes": …, "sha256": …}, "idx": …}`."""
    dtype: str
    tokens: int
    documents: int
    min_token: int
    max_token: int
    text_bytes: int = 0
    """UTF-8 bytes of the text that the tokens stand for; 0 = not known."""
    tokenizer: str = ""
    """Content hash of the tokenizer; empty = not known."""
    source: dict[str, Any]
    """What the tokens were made from, in the words of the program that made them."""

    @property
    def identity(self) -> str:
        """Hash of the content of both files."""
        return hashlib.sha256(f"{self.files['bin']['sha256']}{self.files['idx']['sha256']}".encode()).hexdigest()


def read_manifest(prefix: Path | str) -> TokenManifest | None:
    """The manifest of a prefix, None where there is none; `UserError` where it was damaged or changed by hand."""
    content = manifest_content(prefix)
    if content is None:
        return None
    path = manifest_path(prefix)
    if content.get("format") != MANIFEST_FORMAT:
        found = content.get("format")
        raise UserError(f"{path} has format {found}, this version reads {MANIFEST_FORMAT}; make the files again")
    if content.pop("checksum") != checksum(content):
        raise UserError(f"{path} does not match its own checksum: it was damaged or changed; make the files again")
    return TokenManifest(**content)


def manifest_content(prefix: Path | str) -> dict[str, Any] | None:
    """The JSON of a manifest, None where there is none. A file of another kind (raw data, say) is a `UserError`."""
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "checksum" in content and "files" in content:
            return dict(content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError):
        pass
    raise UserError(f"{path} is not a manifest of token files; choose another prefix, or remove it")


def checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: TokenManifest) -> str:
    content = asdict(manifest)
    content["checksum"] = checksum(content)
    return json.dumps(content, indent=1) + "\n"
