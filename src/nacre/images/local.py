"""Images that bear this node's own name and are made on it when they are first pulled: the demo's, from Debian packages.

`make` has `python -m nacre.images.build_demo` do it: packing is long work, and the daemon has others to serve.
"""

from __future__ import annotations

from nacre.config import Config
from nacre.images import child
from nacre.images.model import Progress
from nacre.images.recipes import RECIPES

NAMES = tuple(recipe.name for recipe in RECIPES)


async def make(config: Config, name: str, progress: Progress) -> None:
    """The image of that recipe into the node's store. Raises the maker's Failure: no apt, no network, a full disk."""

    def say(words: str) -> None:
        progress(f"made on this machine from Debian packages: {words}", 0, 0)

    await child.made(f"make {name}", "nacre.images.build_demo", config.prefix, name, progress=say)
