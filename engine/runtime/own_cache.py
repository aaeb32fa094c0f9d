"""Where the engine keeps what it can make again: beside the Hugging Face cache, so that HF_HOME moves both."""

from __future__ import annotations

from pathlib import Path


def cache_folder() -> Path:
    """It may not be there yet. All of it can be deleted at any time."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent / "ko-dialogue-engine"
