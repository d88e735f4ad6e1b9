"""The image of proof pods: this machine's own shell and the libraries it is linked with, a few MB, made once."""

from __future__ import annotations

import os
import subprocess
import tempfile

from nacre.cli import archive
from nacre.config import Config

IMAGE = "nacre.local/proof:1"
SHELL = "/bin/sh"


def ensure(config: Config) -> str:
    """The image's name; it is made and imported unless the node has it."""
    from nacre.cli import image

    if not image.has(config, IMAGE):
        with tempfile.TemporaryDirectory(prefix="nacre-proof-") as place:
            path = f"{place}/proof.tar"
            archive.write(path, [IMAGE], layer(), entrypoint=[SHELL], made_by="nacre enable")
            image.import_archive(config, path)
    return IMAGE


def layer() -> bytes:
    """/bin/sh with its dynamic linker and libraries at the very paths that it was linked with."""
    files = {}
    for path in (SHELL, *libraries(SHELL)):
        with open(path, "rb") as file:
            files[path.lstrip("/")] = file.read()
    return archive.tar(files)


def libraries(binary: str) -> list[str]:
    """What ldd(1) names: libraries and the dynamic linker."""
    said = subprocess.run(["ldd", os.path.realpath(binary)], capture_output=True, text=True, check=False).stdout
    return [word for line in said.splitlines() for word in line.split() if word.startswith("/")]
