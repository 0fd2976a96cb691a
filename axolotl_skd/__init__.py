"""Speculative Knowledge Distillation for Axolotl.

`plugins: [axolotl_skd.SKDPlugin]` is all that a config names. The class is resolved on first use, so
that `axolotl_skd.evaluation` can be imported by tools that have neither axolotl nor torch.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


class PluginImportError(RuntimeError):
    """The plugin itself failed to import.

    Deliberately no `ImportError`: Axolotl's plugin manager catches those, forgets the plugin and
    trains on as plain supervised fine-tuning.
    """


def __getattr__(name: str) -> Any:
    if name != "SKDPlugin":
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r} (plugins: takes axolotl_skd.SKDPlugin)"
        )
    try:
        from axolotl_skd.plugin import SKDPlugin
    except ImportError as error:
        raise PluginImportError(
            f"axolotl_skd.SKDPlugin could not be imported: {error}. Training would go on without "
            "distillation, so it stops here. Check the installation with `pip check` (axolotl >= 0.19 "
            "and its own pinned packages are needed)."
        ) from error
    return SKDPlugin
