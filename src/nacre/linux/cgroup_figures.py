"""What a cgroup uses, read from the kernel's files of whichever version has them."""

from __future__ import annotations

from nacre.linux import cgroup_files as files

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from nacre.linux.cgroup_layout import Layout


def stats(layout: Layout, path: str) -> dict[str, int]:
    """Keys as in docs/architecture.md, 0 for what the host does not count. Times in ns, sizes in bytes."""
    result = dict.fromkeys(
        ("cpu_ns", "memory_bytes", "working_set_bytes", "rss_bytes", "page_faults", "major_page_faults", "pids"), 0
    )
    result["memory_limit_bytes"] = 0
    result |= _memory(layout, path)
    cpu = layout.find("cpuacct") or layout.unified
    if cpu is not None:
        directory = layout.directory(cpu, path)
        if cpu.version == 1:
            result["cpu_ns"] = files.number(files.read(directory, "cpuacct.usage"))
        else:
            result["cpu_ns"] = files.table(files.read(directory, "cpu.stat")).get("usage_usec", 0) * 1000
    pids = layout.find("pids")
    if pids is not None:
        result["pids"] = files.number(files.read(layout.directory(pids, path), "pids.current"))
    return result


def _memory(layout: Layout, path: str) -> dict[str, int]:
    hierarchy = layout.find("memory")
    if hierarchy is None:
        return {}
    directory = layout.directory(hierarchy, path)
    usage, limit, prefix, rss = (
        ("memory.current", "memory.max", "", "anon")
        if hierarchy.version == 2
        else ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_", "rss")
    )
    table = files.table(files.read(directory, "memory.stat"))
    used, bound = files.number(files.read(directory, usage)), files.number(files.read(directory, limit))
    return {
        "memory_bytes": used,
        "working_set_bytes": max(0, used - table.get(prefix + "inactive_file", 0)),
        "rss_bytes": table.get(prefix + rss, 0),
        "page_faults": table.get(prefix + "pgfault", 0),
        "major_page_faults": table.get(prefix + "pgmajfault", 0),
        "memory_limit_bytes": 0 if bound >= files.UNLIMITED else bound,
    }
