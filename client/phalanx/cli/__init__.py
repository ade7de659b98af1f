"""The command `phalanx`."""


def main() -> None:
    """Run the command line of this process and exit."""
    from phalanx.cli.app import app  # typer is not needed by those who only import phalanx

    app()
