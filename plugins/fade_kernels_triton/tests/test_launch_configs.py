"""Which launch configuration a call gets, and files of them."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from oracle import seed, tier_case

from fade_core.errors import ConfigError
from fade_kernels_triton import config as config_module
from fade_kernels_triton import configfile
from fade_kernels_triton.config import VARIABLE, lookup, own, shipped
from fade_kernels_triton.configfile import CASE_RULES, CONFIG_RULES, ConfigFile, parse, read_file, user_file, write_file
from fade_kernels_triton.decode import decode_attention
from fade_kernels_triton.launch import DecodeConfig, LaunchCase

CASE = LaunchCase(4, "channel", 64, 128, 4, 64, 32768)
ODD = DecodeConfig(warps=2, stages=5, resident=11, registers=168, subnormal=False)
"""A configuration that nothing shipped has."""
HERE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A user without files, a GPU called "Fast 9000", and no file read before."""
    for cached in (lookup, own):
        cached.cache_clear()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config_module, "gpu_name", lambda device: "Fast 9000" if device.type == "cuda" else "")
    monkeypatch.setattr(config_module, "overlaps", lambda device: device.type == "cuda")
    yield
    for cached in (lookup, own):
        cached.cache_clear()


def written(path: Path, *rows: tuple[LaunchCase, DecodeConfig], gpu: str = "Fast 9000") -> Path:
    write_file(path, ConfigFile(gpu, rows))
    return path


# --- the choice ---


def test_every_shipped_case_gets_the_configuration_found_for_it():
    assert len(shipped().decode) > 10
    for case, wanted in shipped().decode:
        assert lookup(case, HERE) == wanted


def test_the_nearest_shipped_case_serves_others():
    longer = replace(CASE, context=4 * CASE.context)
    assert lookup(longer, HERE) == lookup(CASE, HERE)
    assert lookup(replace(CASE, head_dim=256, rows_and_heads=8), HERE).warps == 2


def test_what_a_gpu_does_not_take_is_left_out():
    assert lookup(CASE, HERE).overlap
    assert lookup(CASE, torch.device("cpu")) == replace(lookup(CASE, HERE), overlap=False)


def test_the_users_rows_come_before_shipped_ones_of_the_same_format_only():
    far = replace(CASE, rows_and_heads=1, context=64)
    written(user_file("Fast 9000"), (far, ODD))
    assert lookup(CASE, HERE) == ODD  # though a shipped row has exactly this size
    assert lookup(replace(CASE, axis="token"), HERE) == dict(shipped().decode)[replace(CASE, axis="token")]
    two_bits = replace(CASE, bits=2, tile=128)
    assert lookup(two_bits, HERE) == dict(shipped().decode)[two_bits]


def test_among_the_users_rows_the_nearest_in_size_is_taken():
    small, big = replace(CASE, context=1024), replace(CASE, context=65536)
    written(user_file("Fast 9000"), (small, replace(ODD, stages=2)), (big, replace(ODD, stages=6)))
    assert lookup(replace(CASE, context=512), HERE).stages == 2
    assert lookup(CASE, HERE).stages == 6


def test_the_variable_names_a_file_of_whatever_gpu(monkeypatch, tmp_path):
    written(user_file("Fast 9000"), (CASE, replace(ODD, stages=2)))
    monkeypatch.setenv(VARIABLE, str(written(tmp_path / "mine.json", (CASE, ODD), gpu="Slow 1")))
    assert lookup(CASE, HERE) == ODD
    assert lookup(CASE, torch.device("cpu")) == ODD


def test_a_missing_file_is_an_error_only_if_it_was_named(monkeypatch, tmp_path):
    assert own(HERE) is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        lookup(CASE, torch.device("cuda", 1))  # the first device's answer is kept


def test_a_file_of_another_gpu_is_refused():
    written(user_file("Fast 9000"), (CASE, ODD), gpu="Fast-9000")
    with pytest.raises(ConfigError, match=r"decode-fast-9000\.json are of 'Fast-9000'; this GPU is 'Fast 9000'.*tune"):
        lookup(CASE, HERE)


def test_files_are_read_once(monkeypatch):
    written(user_file("Fast 9000"), (CASE, ODD))
    reads = []
    monkeypatch.setattr(config_module, "read_file", lambda path: (reads.append(path), read_file(path))[1])
    for context in (1024, 2048, 4096, 1024):
        lookup(replace(CASE, context=context), HERE)
    assert len(reads) == 1


def test_a_launch_asks_for_its_own_case(monkeypatch, device):
    from fade_kernels_triton import decode

    asked = []
    monkeypatch.setattr(decode, "lookup", lambda case, where: (asked.append((case, where)), DecodeConfig())[1])
    seed()
    query = torch.randn(2, 6, 2, 64, device=device).half()
    decode_attention(query, [tier_case(2, 2, 3, 64, 2, "token", 128, device=device).tier])
    assert asked == [(LaunchCase(2, "token", 128, 64, 6, 4, 512), query.device)]


# --- files ---


def test_names_of_files(monkeypatch):
    assert user_file("NVIDIA GeForce RTX 4090 (Ti)").name == "decode-nvidia-geforce-rtx-4090-ti.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert user_file("NVIDIA H200") == Path.home() / ".config/fade/decode-nvidia-h200.json"


def test_a_file_survives_writing_and_reading(tmp_path):
    path = tmp_path / "deep" / "down.json"
    held = ConfigFile('Name with "quotes"', ((CASE, ODD), (replace(CASE, bits=2), DecodeConfig())))
    write_file(path, held)
    assert read_file(path) == held
    assert sum('"case"' in line for line in path.read_text().splitlines()) == 2  # a row a line
    assert [p.name for p in path.parent.iterdir()] == ["down.json"]
    write_file(path, ConfigFile("none", ()))
    assert read_file(path).decode == ()


def test_a_row_replaces_the_one_of_its_case():
    held = ConfigFile("x", ((CASE, DecodeConfig()), (replace(CASE, bits=2), DecodeConfig())))
    assert held.with_row(CASE, ODD).decode == ((CASE, ODD), (replace(CASE, bits=2), DecodeConfig()))
    assert len(held.with_row(replace(CASE, tile=128), ODD).decode) == 3


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*--output"):
        write_file(tmp_path / "file" / "x.json", ConfigFile("x", ()))


def test_fields_that_a_row_leaves_out_have_their_defaults():
    text = json.dumps({"gpu": "x", "decode": [{"case": asdict(CASE), "config": {"warps": 2}}]})
    assert parse(text, "f").decode == ((CASE, DecodeConfig(warps=2)),)


def test_every_field_has_a_rule():
    assert list(CASE_RULES) == [field.name for field in fields(LaunchCase)]
    assert list(CONFIG_RULES) == [field.name for field in fields(DecodeConfig)]


def row(**changes: object) -> dict[str, dict[str, object]]:
    made = {"case": asdict(CASE), "config": asdict(ODD)}
    for name, value in changes.items():
        side = "case" if name in made["case"] or name == "head" else "config"
        made[side] |= {name: value}
    return made


GOOD = row()
SHORT = {"case": {k: v for k, v in GOOD["case"].items() if k != "tile"}, "config": GOOD["config"]}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "is not JSON"),
        ("[]", 'holds list; an object of "gpu" and "decode"'),
        ('{"gpu": "x"}', r"holds \['gpu'\]"),
        ('{"gpu": 3, "decode": []}', '"gpu" is a name'),
        ('{"gpu": "x", "decode": {}}', '"decode" a list'),
        ([3], 'row 1 is 3; an object of "case" and "config"'),
        ([GOOD, {"case": GOOD["case"]}], "row 2 is"),
        ([{"case": 1, "config": {}}], "row 1, case is 1; an object of bits, axis"),
        ([row(warps=3)], "row 1, config: warps is 3; it takes 1, 2, 4, 8, 16"),
        ([row(warps=True)], "warps is true"),
        ([row(stages=0)], "stages is 0; it takes a whole number from 1 to 8"),
        ([row(resident=2.0)], "resident is 2.0"),
        ([row(overlap=1)], "overlap is 1; it takes false, true"),
        ([row(wraps=2)], "row 1, config has wraps; the fields are warps, stages"),
        ([row(head=2)], "row 1, case has head; the fields are bits"),
        ([GOOD, SHORT], "row 2, case lacks tile"),
        ([row(axis="row")], 'axis is "row"; it takes "token", "channel"'),
        ([row(context=0)], "context is 0; it takes a whole number from 1 up"),
        ([row(columns=None)], "columns is null"),
        ([GOOD, row(bits=2), GOOD], "row 3: the case of row 1 again"),
    ],
)
def test_bad_files_are_refused_with_file_row_and_what_works(text, wanted, monkeypatch, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text if isinstance(text, str) else json.dumps({"gpu": "x", "decode": text}))
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ConfigError, match=wanted) as refused:
        lookup(CASE, HERE)
    assert str(path) in str(refused.value)
    assert configfile.REMEDY in str(refused.value) or "Delete one" in str(refused.value)


def test_a_folder_in_place_of_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        lookup(CASE, HERE)
