"""What a cache with ``max_cache_len`` refuses or gets wrong today: each line is a test that has to fail, and why.

Patterns of test ids (``fnmatch``; brackets stand for themselves) to reasons. The root ``conftest.py`` makes them strict
expected failures. A line goes with the last of its failures, and this file with the last line.
"""

_FAULT = "fade_core/tests/test_bad_input.py::test_"
_SAME = "tests/test_same_answer.py::test_"
_SLIDING = "transformers' sliding windows of fixed size take no tokens back and keep their rows"

REFUSED: dict[str, str] = {
    f"{_FAULT}sliding_layers_*-400]": "transformers' sliding windows of fixed size cannot be taken back",
    f"{_SAME}every_mode_says_the_same[gemma3_text-*-prompt_lookup]": _SLIDING,
    "tests/test_modes.py::*[gemma3_text-*prompt_lookup-300]": _SLIDING,
    f"{_SAME}every_mode_says_the_same[gemma3_text-*-assisted]": _SLIDING,
    "tests/test_modes.py::*[gemma3_text-*assisted-300]": _SLIDING,
    f"{_SAME}every_mode_says_the_same[gemma3_text-*-early_exit]": _SLIDING,
    "tests/test_modes.py::*[gemma3_text-*early_exit-300]": _SLIDING,
    f"{_SAME}every_mode_says_the_same[gemma3_text-*-contrastive]": _SLIDING,
    "tests/test_modes.py::*[gemma3_text-*contrastive-300]": _SLIDING,
    f"{_SAME}every_mode_says_the_same[gemma3_text-*-rows_by_hand]": _SLIDING,
    "tests/test_rows.py::test_layers_of_transformers_own_join_too[gemma4_text-1000]": _SLIDING,
    "tests/test_modes.py::*[gemma3_text-*rows_by_hand-300]": _SLIDING,
}
