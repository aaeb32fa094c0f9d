"""A model folder that ships code of its own, as hub repositories may, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

PINNED = "a" * 40  # a revision that the flag asks for
_CODE = """
import os
from transformers import LlamaForCausalLM
os.makedirs({ran!r}, exist_ok=True)

class Own(LlamaForCausalLM):
    def forward(self, input_ids=None, **rest):
        {line}
        return super().forward(input_ids=input_ids, **rest)
"""


def save(folder: Path, ran: Path, patch: pytest.MonkeyPatch, *, line: str = "pass") -> Path:
    """A tiny Llama whose class comes with it; importing it makes the folder `ran`. `line` begins its forward."""
    modules = folder.with_name(f"{folder.name}-modules")  # the cache of such code, which is imported from there
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    patch.syspath_prepend(str(modules))
    tiny.save("llama", folder)
    (folder / "modeling_own.py").write_text(_CODE.format(ran=str(ran), line=line), encoding="utf-8")
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    path.write_text(json.dumps(values), encoding="utf-8")
    return folder
