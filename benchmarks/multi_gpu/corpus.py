"""Real text without a network: the sources of the Python packages that are installed here."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path


def write_package_sources(path: Path, max_bytes: int) -> int:
    """Write source files as documents of a .jsonl, in an order that mixes packages; their bytes.

    Args:
        path: of the .jsonl.
        max_bytes: of all documents; the first one that passes it is the last.
    """
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")}
    files = {file for root in roots for file in root.rglob("*.py")}
    total = 0
    with path.open("w", encoding="utf-8") as output:
        for file in sorted(files, key=lambda each: hashlib.sha256(str(each).encode()).digest()):
            text = file.read_text(encoding="utf-8", errors="replace")
            if not text.strip():
                continue
            output.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            total += len(text.encode())
            if total > max_bytes:
                break
    return total
