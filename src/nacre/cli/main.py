"""`nacre`: one table of subcommands, each imported when it is called."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

# name → (module under nacre.cli, attribute, what `nacre --help` says)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "up": ("lifecycle", "up", "Start the node: API, controllers, kubelet and CRI in one daemon."),
    "down": ("lifecycle", "down", "Stop the node and take every pod, mount, link and rule off the host."),
    "status": ("lifecycle", "status", "What is up, and since when."),
    "logs": ("logs", "logs", "The daemon's own logs, by component."),
    "doctor": ("doctor", "doctor", "What this host can do, with evidence and remedies; exit 1 if pods cannot run."),
    "explain": ("explain", "explain", "Why a pod is not running: first cause, evidence, remedy."),
    "trace": ("trace", "trace", "What crossed each joint for a pod: API object, CRI, OCI, VM, agent."),
    "kubectl": ("kubectl", "kubectl", "The real kubectl, spoken to this node."),
    "config": ("kubectl", "config", "The admin kubeconfig."),
    "image": ("image", "image", "Pull, list, import, export, remove and build images."),
    "enable": ("addons", "enable", "Switch an add-on on (kata: pods in virtual machines)."),
    "disable": ("addons", "disable", "Switch an add-on off."),
    "addons": ("addons", "addons", "The add-ons and their state."),
    "demo": ("demo", "demo", "The main job, shown: nginx and a login server, each as container and in a VM."),
    "bench": ("bench", "bench", "nacre beside containerd+runc, driven by the same CRI calls."),
    "cri": ("cri", "cri", "The CRI service alone, for use under a real kubelet or crictl."),
    "inspect": ("inspect", "inspect", "One archive of logs, records and state, secrets masked."),
    "reset": ("reset", "reset", "Remove everything of this node from the host, data included."),
}


def main() -> None:
    """Console script. Exit codes: 0 done, 1 a Failure (its sentence is on stderr), 2 wrong usage, 130 interrupted."""
    if sys.argv[1:] == ["--version"]:  # before click, whose import alone takes longer than the answer
        from nacre import __version__

        print(f"nacre {__version__}")
        return
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """One `nacre` command; answers the exit code. What tests call."""
    import click

    from nacre.cli import output
    from nacre.oci.errors import Failure

    try:
        answer = _group().main(args=arguments, prog_name="nacre", standalone_mode=False)
    except Failure as failure:
        output.failure(failure)
        return 1
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left: `nacre trace web | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return answer if isinstance(answer, int) else 0


def _group() -> click.Group:
    import click

    class Lazy(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in COMMANDS:
                return None
            from importlib import import_module

            module, attribute, _help = COMMANDS[cmd_name]
            command: click.Command = getattr(import_module(f"nacre.cli.{module}"), attribute)
            return command

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, row[2]) for name, row in COMMANDS.items()])

    @click.group(cls=Lazy, help="Kubernetes pods on one machine, as containers or each in a virtual machine of its own.")
    @click.option("--prefix", metavar="DIR", help="A node of its own under DIR (else NACRE_PREFIX): paths, ports, names.")
    @click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version.")
    @click.pass_context
    def group(ctx: click.Context, prefix: str | None) -> None:
        from nacre import config

        ctx.obj = config.load(prefix)

    return group


def _version(ctx: Any, _parameter: Any, value: bool) -> None:
    if value:
        from nacre import __version__

        print(f"nacre {__version__}")
        ctx.exit()
