"""Self-supervised pretraining of Earth-observation encoders, and fine-tuning on few labels.

The names below load on first use, so ``import bocage`` imports neither torch nor timm.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bocage.recipes import list_recipes
    from bocage.shards.read.open import open_shards
    from bocage.ssl.encoders.bands import NewBand, adapt_bands
    from bocage.ssl.encoders.export import load_encoder, save_encoder

__version__ = importlib.metadata.version("bocage")
__all__ = ["NewBand", "adapt_bands", "list_recipes", "load_encoder", "open_shards", "save_encoder"]

_MODULES = {
    "NewBand": "bocage.ssl.encoders.bands",
    "adapt_bands": "bocage.ssl.encoders.bands",
    "list_recipes": "bocage.recipes",
    "load_encoder": "bocage.ssl.encoders.export",
    "open_shards": "bocage.shards.read.open",
    "save_encoder": "bocage.ssl.encoders.export",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bocage' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
