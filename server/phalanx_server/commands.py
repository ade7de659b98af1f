"""The commands that come with the server package, plugged into `phalanx` through its entry-point group."""

import typer

from phalanx_server import plan_command, scheduler_command, server_command, up_command


def register(app: typer.Typer) -> None:
    for module in (up_command, server_command, scheduler_command, plan_command):
        module.register(app)
