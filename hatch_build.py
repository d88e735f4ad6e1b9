"""What the wheel holds beyond the sources: the CRI messages compiled from our .proto, and Kubernetes' object structure.

Runs for wheels and for editable installs alike, so a checkout after `pip install -e .` is as complete as the wheel.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SRC = ROOT / "src"


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        proto = SRC / "nacre/wire/cri.proto"
        if _stale(proto.with_name("cri_pb2.py"), proto):
            subprocess.run(
                [sys.executable, "-m", "grpc_tools.protoc", f"-I{SRC}", f"--python_out={SRC}", f"--pyi_out={SRC}", proto],
                check=True,
            )
        extractor, definitions = SRC / "nacre/api/extract.py", SRC / "nacre/api/definitions.json.gz"
        if _stale(definitions, extractor):
            subprocess.run([sys.executable, extractor, definitions], check=True)


def _stale(target: Path, source: Path) -> bool:
    return not target.exists() or target.stat().st_mtime < source.stat().st_mtime
