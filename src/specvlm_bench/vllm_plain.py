"""vLLM as a peer: plain decoding of a target's language shapes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specvlm.core.errors import CapacityError
from specvlm.families import family_for

_TIMEOUT_S = 900
_SHAPES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "hidden_act", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip


def is_installed(python: str) -> bool:
    """Whether that interpreter is there and finds vLLM."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def language_config(config: Any) -> dict[str, Any]:
    """Return the config.json of a text model with the language shapes of a vision language model's HF config."""
    text = config.get_text_config()
    model_type = family_for(config.model_type).text_model_type
    theta = text.rope_parameters["rope_theta"]
    language = {name: getattr(text, name) for name in _SHAPES} | {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "rope_theta": theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # and by 5
        "tie_word_embeddings": False,
    }
    if getattr(text, "head_dim", None):
        language["head_dim"] = text.head_dim
    return language


def measure(
    config: Any, dtype: str, prompts: Sequence[int], num_tokens: int, repeats: int, python: str = sys.executable
) -> dict[str, Any]:
    """Return the answer of vllm_peer.py for prompts of these lengths in tokens.

    Raises:
        CapacityError: the process failed; its last line is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, request, answer = (Path(folder, name) for name in ("model", "request.json", "answer.json"))
        model.mkdir()
        (model / "config.json").write_text(json.dumps(language_config(config)), encoding="utf-8")
        content = {"model": str(model), "dtype": dtype, "prompts": list(prompts), "num_tokens": num_tokens,
                   "repeats": repeats}  # fmt: skip
        request.write_text(json.dumps(content), encoding="utf-8")
        script = str(Path(__file__).with_name("vllm_peer.py"))
        try:
            done = subprocess.run(
                [python, "-P", script, str(request), str(answer)], capture_output=True, text=True, timeout=_TIMEOUT_S,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CapacityError(f"vLLM took more than {_TIMEOUT_S} s: measure fewer lengths at once") from error
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise CapacityError(f"vLLM ended with status {done.returncode}: {last[0][:300]}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
