"""`nacre` as a user calls it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click
import pytest

from nacre.cli import main


def test_every_subcommand_of_the_table_exists() -> None:
    for name, (module, attribute, text) in main.COMMANDS.items():
        command = getattr(import_module(f"nacre.cli.{module}"), attribute)
        assert isinstance(command, click.Command), name
        assert text.endswith("."), name


def test_help_lists_the_commands_without_importing_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in main.COMMANDS:
        assert f"  {name} " in text


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["fly"]) == 2
    assert "No such command 'fly'" in capsys.readouterr().err


def test_a_mistyped_configuration_key_is_named_with_its_file(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prefix / "etc/nacre").mkdir(parents=True)
    (prefix / "etc/nacre/config.toml").write_text("api_prt = 1\n")
    assert main.run(["status"]) == 1
    said = capsys.readouterr().err
    assert f"{prefix}/etc/nacre/config.toml" in said
    assert "unknown key api_prt" in said


@pytest.mark.parametrize("key", ["pods_per_shim", "patience"])
def test_a_shim_for_no_pod_and_no_patience_are_refused_with_the_file(
    prefix: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    (prefix / "etc/nacre").mkdir(parents=True)
    (prefix / "etc/nacre/config.toml").write_text(f"{key} = 0\n")
    assert main.run(["status"]) == 1
    assert f"{key} is 0" in capsys.readouterr().err


def test_status_of_a_node_that_is_down_says_so_and_how_to_start_it(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["status"]) == 1
    said = capsys.readouterr().err
    assert f"no daemon listens on {prefix}/run/nacre/node.sock" in said
    assert "nacre up" in said


def test_kubectl_before_the_first_start_says_what_is_missing(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["kubectl", "get", "pods"]) == 1
    assert "admin.conf does not exist" in capsys.readouterr().err
