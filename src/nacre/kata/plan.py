"""What every VM of this node is: its shape and what it boots from, kept as DATA/kata/plan.json by `planning.make`; shims read it.

Written whole (temporary name, rename); a kill leaves the older plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nacre.kata.machine import Boot, Shape
from nacre.oci.errors import NotFound

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """See the module."""

    shape: Shape
    boot: Boot
    guest: str  # the appliance's version


def path(data: str) -> str:
    return f"{data}/kata/plan.json"


def load(data: str) -> Plan:
    """The plan that `make` kept. Raises NotFound."""
    what = "start a virtual machine"
    try:
        with open(path(data), "rb") as file:
            document = json.load(file)
        return decode(document)
    except FileNotFoundError as error:
        raise NotFound(what=what, cause=f"there is no {path(data)}", remedy="nacre enable kata") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NotFound(what=what, cause=f"{path(data)} cannot be read: {error}", remedy="nacre enable kata") from error


def decode(document: dict[str, Any]) -> Plan:
    """Raises KeyError, TypeError, ValueError for what is no plan of this version."""
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']}")
    return Plan(shape=Shape(**document["shape"]), boot=Boot(**document["boot"]), guest=document["guest"])
