"""A third party's policy, built, installed and used through a config file in a virtual environment of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLE = Path(__file__).parents[1] / "examples" / "fade_policy_knorm"
MOST_LINES = 40

pytestmark = pytest.mark.slow  # a virtual environment, and Python started in it

SEVERAL = """
import contextlib, importlib, io, json, sys, traceback

def fade(arguments):
    from fade_core.cli import main
    sys.argv = ["fade", *arguments]
    main()

def pytest(arguments):
    sys.exit(importlib.import_module("pytest").main(arguments))

def where(arguments):
    print(importlib.import_module(*arguments).__file__)

found = {}
for name, (what, *arguments) in json.loads(sys.argv[1]).items():
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            globals()[what](arguments)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = traceback.format_exc()
    found[name] = code, said.getvalue()
print(json.dumps(found))
"""
"""What a process does one thing after another, and then prints how each ended and what it printed."""


class Environment:
    """A virtual environment that sees this one's packages, so that nothing is downloaded."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = folder / scripts / "python"
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        # addsitedir and not a plain path: editable installs are .pth files themselves
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (self.site / "parent.pth").write_text(line, encoding="utf-8")

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run its Python."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "PYTEST"))}
        found = subprocess.run(
            [str(self.python), *map(str, arguments)],
            env={**clean, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found


@dataclass(frozen=True)
class Ran:
    """What one process did in the environment."""

    ended: dict[str, tuple[int | str, str]]
    errors: str

    def said(self, name: str) -> str:
        """What it printed, if it went well."""
        code, printed = self.ended[name]
        assert code in (0, None), f"{code}\n{printed}\n{self.errors}"
        return printed


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("third_party") / "venv")
    made.run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", EXAMPLE)
    return made


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama and a byte tokenizer, saved."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


PROMPT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3


def run_all(environment: Environment, model: Path) -> Ran:
    """All that is asked below, in one process: it takes longer to start than to answer."""
    config = EXAMPLE / "knorm.toml"
    asked = {
        "where": ("where", "fade_policy_knorm"),
        "plugins": ("fade", "plugins", "--json"),
        "check": ("fade", "check", "policies:knorm", "--json"),
        "validate": ("fade", "config", "validate", config),
        "generate": (
            *("fade", "generate", PROMPT, "--config", config, "--model", model, "--max-new-tokens", "40"),
            *("--device", "cpu", "--raw", "--json"),
        ),
        "kit": (
            *("pytest", "-q", "-p", "fade_core.testing.pytest_plugin", "-p", "no:cacheprovider"),
            *("--fade-component", "policies:knorm", "-c", os.devnull),
        ),
    }
    found = environment.run("-c", SEVERAL, json.dumps(asked, default=str))
    return Ran(json.loads(found.stdout.splitlines()[-1]), found.stderr)


def test_the_example_is_short() -> None:
    lines = (EXAMPLE / "fade_policy_knorm.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES


def test_it_is_found_checked_and_used_through_a_config_file(environment: Environment, model: Path) -> None:
    ran = run_all(environment, model)
    assert str(environment.site) in ran.said("where")
    listed = json.loads(ran.said("plugins"))["plugins"]
    (plugin,) = [p for p in listed if p["dist"] == "fade-policy-knorm"]
    assert (plugin["status"], plugin["components"]["policies"]) == ("loaded", ["knorm"])
    report = json.loads(ran.said("check"))
    assert report["ok"]
    assert len(report["results"]) >= 7
    assert "passed" in ran.said("kit")
    ran.said("validate")
    evicting = json.loads(ran.said("generate"))
    assert evicting["new_tokens"] == 40
    assert evicting["prompt_tokens"] == len(PROMPT)
    kept = sum(held for name, held in evicting["tiers"].items() if name not in ("fp16", "layer"))
    every_token = 2 * 2 * 2 * (16 * 8 + 32) / 8  # layers, heads, K and V; 8 bits and a word of metadata a token
    assert 0 < kept < 0.8 * every_token * (len(PROMPT) + 40)


def test_a_policy_that_is_not_installed_is_named(model: Path, tmp_path: Path) -> None:
    """Here, where the example is not installed, the same file says what is missing."""
    from fade_core import FadeConfig
    from fade_core.errors import FadeError

    if importlib.util.find_spec("fade_policy_knorm") is not None:
        pytest.skip("the example is installed here")
    with pytest.raises(FadeError, match="knorm") as caught:
        FadeConfig.from_file(EXAMPLE / "knorm.toml")
    assert "h2o" in str(caught.value)
