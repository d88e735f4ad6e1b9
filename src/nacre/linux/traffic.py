"""Traffic control, as far as a VM's link needs it: an ingress qdisc, one u32 filter that matches every frame, and mirred as its action.

cls_matchall would say the same in fewer words but is not in every kernel; u32 with a key of mask 0 is (linux/pkt_sched.h,
pkt_cls.h, tc_act/tc_mirred.h).
"""

from __future__ import annotations

import socket

from nacre.linux.netlink import TEXT, Flag, Layout, ListOf, Record, Request, Table

_NEWQDISC, _NEWTFILTER = 36, 44
_INGRESS_PARENT = 0xFFFFFFF1
_INGRESS_HANDLE = 0xFFFF0000
_ETH_P_ALL = 0x0003
_TERMINAL = 1  # TC_U32_TERMINAL
_STOLEN = 4  # TC_ACT_STOLEN: the frame is the action's, nobody else sees it
_EGRESS_REDIRECT = 1  # TCA_EGRESS_REDIR

_MIRRED = Table({"parameters": (2, Record("=IIiiiiI"))})  # index, capabilities, action, two counts, eaction, ifindex
_ACTION = Table({"kind": (1, TEXT), "options": (2, _MIRRED)})
_SELECTOR = Record("=BBBxHHhhIIIii")  # tc_u32_sel with one tc_u32_key behind it
_U32 = Table({"selector": (5, _SELECTOR), "actions": (7, ListOf(_ACTION))})
_TRAFFIC = Layout("=BxxxiIII", ("family", "index", "handle", "parent", "info"), Table({"kind": (1, TEXT), "options": (2, _U32)}))


def redirect_requests(source: int, target: int, name: str) -> tuple[Request, Request]:
    """Requests after which each frame arriving at link index `source` (called `name`) is sent out of link index `target`."""
    qdisc = _TRAFFIC.encode({"index": source, "handle": _INGRESS_HANDLE, "parent": _INGRESS_PARENT}, {"kind": "ingress"})
    everything = (_TERMINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    mirred = {"kind": "mirred", "options": {"parameters": (0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, target)}}
    priority = 1 << 16
    rule = _TRAFFIC.encode(
        {"index": source, "parent": _INGRESS_HANDLE, "info": priority | socket.htons(_ETH_P_ALL)},
        {"kind": "u32", "options": {"selector": everything, "actions": [mirred]}},
    )
    make = Flag.CREATE | Flag.EXCL
    return (
        Request(_NEWQDISC, make, qdisc, "RTM_NEWQDISC ingress", name),
        Request(_NEWTFILTER, make, rule, "RTM_NEWTFILTER u32 mirred", name),
    )
