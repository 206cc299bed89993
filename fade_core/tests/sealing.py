"""Files as FADE seals them, and files as an attacker would: any header, any tensors, the checksum right all the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def unsealed(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header, without its checksum, and tensors of a file."""
    with safe_open(path, "pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["fade"])
    del header["sha256"]
    return header, {name: tensor.clone() for name, tensor in load_file(path).items()}


def seal(path: Path, header: dict[str, Any] | str, tensors: dict[str, Tensor]) -> Path:
    """Write a file of any header, a table or the rest of one as JSON, and give it the right checksum."""
    rest = json.dumps(header)[1:] if isinstance(header, dict) else header
    save_file(tensors, path, metadata={"fade": f'{{"sha256": "{"0" * 64}", {rest}'})
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest().encode()  # with zeros in the place of the checksum
    path.write_bytes(content.replace(b"0" * 64, digest, 1))
    return path
