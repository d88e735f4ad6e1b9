"""What a pod is called, and whom it asks for names: host name and domain, /etc/hosts, resolvers (Kubernetes "DNS for Services and Pods")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nacre.wire import cri_pb2 as cri

CLUSTER_DOMAIN = "cluster.local"
_LABEL = 63  # characters of one name
_HOST = "# Kubernetes-managed hosts file (host network)."
_OWN = ("# Kubernetes-managed hosts file.", "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback")


def host_name(pod: Mapping[str, Any]) -> str:
    """`hostname`, else the pod's name, as long as a name may be."""
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:_LABEL].rstrip("-.")


def full_name(pod: Mapping[str, Any]) -> str:
    """With the domain that `subdomain` puts the pod into; "" without one."""
    subdomain = pod["spec"].get("subdomain")
    return f"{host_name(pod)}.{subdomain}.{pod['metadata']['namespace']}.svc.{CLUSTER_DOMAIN}" if subdomain else ""


def kernel_name(pod: Mapping[str, Any]) -> str:
    """What `hostname` says in the pod; "" on the host's network, which has the host's."""
    if pod["spec"].get("hostNetwork"):
        return ""
    return (pod["spec"].get("setHostnameAsFQDN") and full_name(pod)) or host_name(pod)


def hosts(pod: Mapping[str, Any], addresses: Sequence[str], of_host: str) -> str:
    """/etc/hosts of the pod's containers; `of_host` is the host's own, for who shares its network. "" where that will do."""
    aliases = ["\t".join([alias["ip"], *(alias.get("hostnames") or [])]) for alias in pod["spec"].get("hostAliases") or []]
    if pod["spec"].get("hostNetwork"):
        return "\n".join([_HOST, of_host.rstrip("\n"), *aliases]) + "\n" if aliases else ""
    called = "\t".join(name for name in (full_name(pod), host_name(pod)) if name)
    return "\n".join([*_OWN, *(f"{address}\t{called}" for address in addresses), *aliases]) + "\n"


def resolvers(spec: Mapping[str, Any]) -> Any:
    """The CRI's DNSConfig; None where the host's resolvers will do. `dnsConfig` adds to those, or with policy None is all there is.

    There is no cluster DNS, so ClusterFirst is Default, as for every kubelet without --cluster-dns.
    """
    asked = spec.get("dnsConfig")
    if not asked:
        return None
    servers, searches, options = list[str](), list[str](), dict[str, str]()
    if spec.get("dnsPolicy") != "None":
        from nacre.network import resolvers as network  # here: few pods ask, and it brings all of `network`

        found = network.find()
        servers, searches = list(found.nameservers), list(found.search)
        options = {name: value for name, _colon, value in (one.partition(":") for one in found.options)}
    options |= {one["name"]: str(one.get("value") or "") for one in asked.get("options") or []}
    return cri.DNSConfig(
        servers=_once([*servers, *(asked.get("nameservers") or [])]),
        searches=_once([*searches, *(asked.get("searches") or [])]),
        options=[f"{name}:{value}" if value else name for name, value in options.items()],
    )


def _once(words: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(words))
