"""Images that bear this node's own name and are made on it when they are first pulled: the demo's, from Debian packages.

`make` runs `python -m nacre.images.build_demo PREFIX NAME PARENT` (packing is long work, and the daemon has others to serve), which
says one JSON object a line: {"progress"}, then {"made"} or {"failure"}, and ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import os

from nacre.config import Config
from nacre.images import child
from nacre.images.model import Progress
from nacre.images.recipes import RECIPES
from nacre.oci.errors import Failure, decode

NAMES = tuple(recipe.name for recipe in RECIPES)


async def make(config: Config, name: str, progress: Progress) -> None:
    """The image of that recipe into the node's store. Raises the maker's Failure: no apt, no network, a full disk."""
    pipe = asyncio.subprocess.PIPE
    command = child.python("nacre.images.build_demo", config.prefix, name, str(os.getpid()))
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    assert process.stdout is not None and process.stderr is not None
    try:
        async for line in process.stdout:
            said = json.loads(line)
            if "failure" in said:
                raise decode(said["failure"])
            if "made" in said:
                return
            progress(f"made on this machine from Debian packages: {said['progress']}", 0, 0)
        raise Failure(
            what=f"make {name}", cause="its maker ended without a word", evidence=child.last_lines(await process.stderr.read())
        )
    except asyncio.CancelledError:
        process.kill()
        raise
    finally:
        await process.wait()
