"""Sealed files: what was written comes back, any damage is told by name, and a failed write leaves what was there."""

from __future__ import annotations

import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file
from sealing import seal, unsealed
from tiny import fresh_seed

from fade_core import FileHeader, FileKind
from fade_core.errors import CheckpointError
from fade_core.support import sealed


class Recipe(FileHeader):
    """A header with every kind of field."""

    size: Annotated[int, Field(strict=True, ge=1, le=1000)]
    names: tuple[str, ...] = ()
    notes: dict[str, Any] | None = None


KIND = FileKind("recipe", 3, "a recipe", "cook another", Recipe)
HEADER = {"size": 7, "names": ["a", "é"], "notes": {"deep": [1, {"x": None}]}}


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    KIND.write(tmp_path / "file", HEADER, {"b": torch.arange(6).view(2, 3), "a": torch.tensor([0.5, -0.0])})
    return tmp_path / "file"


def number(most: int, random: torch.Generator) -> int:
    return int(torch.randint(most, (), generator=random))


def refused(path: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        KIND.read(path)
    assert len(str(caught.value)) <= 2000


def test_what_was_written_comes_back(tmp_path: Path, random: torch.Generator) -> None:
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(dtype): torch.randn(3, 5, generator=random).mul(9).to(dtype) for dtype in dtypes}
    tensors |= {"none": torch.empty(0, 4), "turned": torch.randn(4, 3, generator=random).T}
    KIND.write(tmp_path / "one", HEADER, tensors)
    KIND.write(tmp_path / "two", HEADER, tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    header, found = KIND.read(tmp_path / "one")
    assert header == Recipe(**HEADER)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    KIND.write(tmp_path / "empty", {"size": 1}, {})
    assert KIND.read(tmp_path / "empty") == (Recipe(size=1), {})


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(path: Path) -> None:
    content = path.read_bytes()
    assert seal(path, *unsealed(path)).read_bytes() == content


def test_a_flipped_bit_anywhere_is_told(path: Path, random: torch.Generator) -> None:
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << number(8, random)
        path.write_bytes(damaged)
        refused(path, "file .*(is damaged|has no checksum)")


def test_a_file_that_is_cut_short_or_goes_on_is_told(path: Path, random: torch.Generator) -> None:
    content = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, len(content) - 1, number(len(content), random)):
        path.write_bytes(content[:cut])
        refused(path, "is damaged")
    path.write_bytes(content + b"x")
    refused(path, "is damaged")


def test_other_things_are_told(tmp_path: Path, random: torch.Generator) -> None:
    path = tmp_path / "file"
    for content in (
        bytes(number(256, random) for _ in range(4000)),
        (2**62).to_bytes(8, "little"),
        pickle.dumps(HEADER),
    ):
        path.write_bytes(content)
        refused(path, "is not a safetensors file that FADE wrote, or is damaged.*cook another")
    save_file({"a": torch.zeros(1)}, path)
    refused(path, "is a safetensors file, but not a recipe")
    save_file({"a": torch.zeros(1)}, path, metadata={"fade": '{"kind": "recipe", "format": 3, "size": 7}'})
    refused(path, "has no checksum: an older version of FADE wrote it.*cook another")
    for nothing in (tmp_path / "nowhere", tmp_path, "/dev/null"):
        refused(nothing, "there is no file .*cook another")
    for nothing in (None, 3, "a\0b"):
        refused(nothing, "a path is needed|there is no file")


HEADERS = {
    "another kind": ({"kind": "cake"}, "is not a recipe; found 'cake'"),
    "no kind": ({"kind": None}, "is not a recipe; found None"),
    "the format before": ({"format": 2}, "has format 2, this version of FADE reads format 3; cook another"),
    "a format that is true": ({"format": True}, "has format True"),
    "an unknown field": ({"sizes": 7}, r"header of .*unknown field 'sizes'; did you mean 'size'"),
    "a missing field": ({"size": ...}, "size: this field is needed"),
    "a number that is true": ({"size": True}, "size: true/false is not a value here"),
    "a negative number": ({"size": -1}, "size: input should be greater than or equal to 1; found -1"),
    "a huge number": ({"size": 10**30}, "size: input should be less than or equal to 1000"),
    "a fraction": ({"size": 1.5}, "size: input should be a valid integer"),
    "text": ({"size": "7"}, "size: input should be a valid integer; found '7'"),
    "text for a list": ({"names": "a" * 5000}, "names: a list is needed; found 'aaa"),
    "a list for a table": ({"notes": [[]]}, "notes: a table of fields is needed"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_right_is_told_even_with_its_checksum(path: Path, name: str) -> None:
    change, message = HEADERS[name]
    header, tensors = unsealed(path)
    header = {field: value for field, value in (header | change).items() if value is not ...}
    refused(seal(path, header, tensors), message)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ('"kind": "recipe", "format": 3, "size": NaN}', "NaN is no number"),
        ('"kind": "recipe", "format": 3, "size": -Infinity}', "-Infinity is no number"),
        ('"kind": "recipe", "format": 3, "size": ' + "9" * 5000 + "}", "header of .* is damaged"),
        ('"kind": "recipe", "format": 3, "notes": ' + '{"a":' * 40 + "1" + "}" * 41, "nested more than 32 deep"),
        ('"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "header of .* is damaged: maximum recursion depth"),
        ('"a": ', "header of .* is damaged"),
    ],
)
def test_numbers_and_nesting_that_no_header_has_are_told(path: Path, rest: str, message: str) -> None:
    refused(seal(path, rest, {}), message)


# --- writing ---


def unwritten(path: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be written: .*{message}"):
        KIND.write(path, HEADER, {"a": torch.zeros(9000)})


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    unwritten(tmp_path / "no" / "where", "No such file or directory")
    unwritten(path / "below", "Not a directory")
    unwritten(tmp_path, "it is there and is no file")
    unwritten(os.devnull, "it is there and is no file")
    unwritten(tmp_path / ("x" * 300), "File name too long")
    unwritten("a\0b", "null")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    unwritten(tmp_path / "round", "")
    with pytest.raises(CheckpointError, match="size: input should be less than or equal to 1000"):
        KIND.write(path, {"size": 1001}, {})
    assert path.read_bytes() == content
    assert {found.name for found in tmp_path.iterdir()} == {"file", "round"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        unwritten(path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path, path: Path) -> None:
    path.chmod(0o400)
    unwritten(path, "it is read-only")
    tmp_path.chmod(0o500)
    unwritten(tmp_path / "new", "Permission denied")
    tmp_path.chmod(0o700)


def test_whatever_ends_a_write_leaves_the_old_file(tmp_path: Path, path: Path, monkeypatch: Any) -> None:
    content = path.read_bytes()

    def interrupted(tensors: Any, filename: Any, metadata: Any) -> None:
        Path(filename).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(sealed, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        KIND.write(path, HEADER, {})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_permissions_stay_as_they_are(tmp_path: Path, path: Path) -> None:
    link, before = tmp_path / "link", os.umask(0o027)
    try:
        KIND.write(tmp_path / "new", HEADER, {})
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    link.symlink_to(path)
    path.chmod(0o604)
    KIND.write(link, {"size": 9}, {})
    assert link.is_symlink()
    assert KIND.read(path)[0].size == 9
    assert path.stat().st_mode & 0o777 == 0o604
