"""Fields of Kubernetes that this nacre does not act on yet: refused where silence would mislead, else named in a warning.

The one table behind it, which docs/coverage.md shows; a field leaves the table with the change that makes it work. Paths are
relative to the kind, `[]` stands for every element.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nacre.api.status import Cause, forbidden_field


@dataclass(frozen=True, slots=True)
class Gap:
    """`refused`: a pod that asks for it must not run as if it had it; else a Warning header names it. `fine`: values that ask for nothing."""

    path: str
    refused: bool
    why: str
    fine: tuple[object, ...] = ()

    @property
    def title(self) -> str:
        """The path, with the values that are taken."""
        return f"`{self.path}`" + (f" other than {', '.join(json.dumps(value) for value in self.fine)}" if self.fine else "")


_SERVED = frozenset({"emptyDir", "hostPath", "configMap", "secret", "downwardAPI", "projected"})
_VOLUME_WHY = "volumes of this type are not mounted yet"

_NO_PROFILE, _APPARMOR = "nacre has no AppArmor profile of its own; name one with Localhost", ("Localhost", "Unconfined")
_CONTAINER: tuple[tuple[Any, ...], ...] = (
    ("securityContext.appArmorProfile.type", True, _NO_PROFILE, _APPARMOR),
    ("securityContext.procMount", True, "the masks of /proc are not left out yet", ("Default",)),
    ("securityContext.seLinuxOptions", True, "SELinux labels are not applied"),
    ("securityContext.windowsOptions", True, "every node runs Linux"),
    ("volumeDevices", True, "block volumes are not attached yet"),
    ("volumeMounts[].bindMountOptions", True, "bind mount options are not applied yet"),
    ("resizePolicy", False, "resources of a running container are not resized yet"),
    ("resources.claims", True, "dynamic resource allocation is not served"),
    ("restartPolicyRules", True, "rules by exit code are not applied yet"),
    ("lifecycle.stopSignal", True, "the image's stop signal is used"),
    ("env[].valueFrom.fileKeyRef", True, "environment files are not read yet"),
)
_OWNED = (
    *(f"{kind}.defaultUser" for kind in ("configMap", "secret", "downwardAPI", "projected")),
    *(f"{kind}.items[].user" for kind in ("configMap", "secret", "downwardAPI")),
    *(f"projected.sources[].{kind}.items[].user" for kind in ("configMap", "secret", "downwardAPI")),
)

POD = (
    Gap("spec.affinity", False, "the scheduler of one node ignores affinity"),
    Gap("spec.topologySpreadConstraints", False, "there is one node to spread over"),
    Gap("spec.priorityClassName", True, "PriorityClasses are not served yet"),
    Gap("spec.schedulingGates", True, "gated pods are not served yet"),
    Gap("spec.readinessGates", False, "readiness gates are not waited for yet"),
    Gap("spec.resourceClaims", True, "dynamic resource allocation is not served"),
    Gap("spec.resources", True, "resources of the pod as a whole are not applied yet; give them to its containers"),
    Gap("spec.evictionResponders", False, "there is no eviction to respond to yet"),
    Gap("spec.schedulingGroup", True, "pods are scheduled one by one"),
    Gap("spec.ephemeralContainers", True, "ephemeral containers are not run yet"),
    Gap("spec.os", False, "every node runs Linux"),
    Gap("spec.hostnameOverride", True, "the override is not applied yet; use hostname"),
    Gap("spec.securityContext.windowsOptions", True, "every node runs Linux"),
    Gap("spec.securityContext.seLinuxOptions", True, "SELinux labels are not applied"),
    Gap("spec.securityContext.seLinuxChangePolicy", True, "SELinux labels are not applied"),
    Gap("spec.volumes[].projected.sources[].serviceAccountToken", True, "service account tokens are not issued yet"),
    Gap("spec.volumes[].projected.sources[].clusterTrustBundle", True, "trust bundles are not served"),
    Gap("spec.volumes[].projected.sources[].podCertificate", True, "pod certificates are not issued"),
    Gap("spec.hostUsers", True, "user namespaces are not made for pods yet", (True,)),
    Gap("spec.priority", False, "pods do not displace one another", (0,)),
    Gap("spec.preemptionPolicy", False, "pods do not displace one another", ("PreemptLowerPriority",)),
    Gap("spec.tolerations[].tolerationSeconds", False, "taints do not evict pods yet"),
    Gap("spec.securityContext.appArmorProfile.type", True, _NO_PROFILE, _APPARMOR),
    *(Gap(f"spec.{kind}[].{path}", *rest) for kind in ("containers", "initContainers") for path, *rest in _CONTAINER),
    *(Gap(f"spec.volumes[].{path}", True, "files of volumes belong to root, or to fsGroup") for path in _OWNED),
)
SERVICE_ACCOUNT = (Gap("secrets", False, "token secrets are not issued yet"),)
TABLES: dict[tuple[str, str], tuple[Gap, ...]] = {("", "Pod"): POD, ("", "ServiceAccount"): SERVICE_ACCOUNT}


def gaps(group: str, name: str, thing: dict[str, Any]) -> Iterator[tuple[str, Gap]]:
    """What `thing` asks for in vain: (path with indices, gap)."""
    for gap in TABLES.get((group, name), ()):
        for path in _found(thing, gap.path.split("."), "", gap.fine):
            yield path, gap
    if name == "Pod" and not group:
        for index, volume in enumerate(thing.get("spec", {}).get("volumes", [])):
            for source in volume.keys() - _SERVED - {"name"}:
                yield f"spec.volumes[{index}].{source}", Gap("spec.volumes[]", True, _VOLUME_WHY)


def judge(group: str, name: str, thing: dict[str, Any]) -> tuple[list[Cause], list[str]]:
    """(refusals, warnings) for a new object."""
    causes, warnings = [], []
    for path, gap in gaps(group, name, thing):
        if gap.refused:
            causes.append(forbidden_field(path, f"not supported by this nacre: {gap.why}"))
        else:
            warnings.append(f"{path}: not acted on by this nacre: {gap.why}")
    return causes, warnings


def _found(node: Any, parts: list[str], path: str, fine: tuple[object, ...]) -> Iterator[str]:
    if not parts:
        if node not in (None, [], {}, "") and node not in fine:
            yield path
        return
    name, many = parts[0].removesuffix("[]"), parts[0].endswith("[]")
    child = node.get(name) if isinstance(node, dict) else None
    here = f"{path}.{name}" if path else name
    if child is None:
        return
    if not many:
        yield from _found(child, parts[1:], here, fine)
    elif isinstance(child, list):
        for index, item in enumerate(child):
            yield from _found(item, parts[1:], f"{here}[{index}]", fine)


def markdown() -> str:
    """The tables as docs/coverage.md shows them."""
    lines = []
    for (group, name), table in TABLES.items():
        lines += [f"### {name}{f' ({group})' if group else ''}", "", "| field | answer | why |", "|-|-|-|"]
        lines += [f"| {gap.title} | {'refused' if gap.refused else 'warned'} | {gap.why} |" for gap in table]
        if name == "Pod":
            served = ", ".join(sorted(_SERVED))
            lines.append(f"| `spec.volumes[]` other than {served} | refused | {_VOLUME_WHY} |")
        lines.append("")
    return "\n".join(lines)
