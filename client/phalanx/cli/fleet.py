"""Commands about nodes and clusters."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from phalanx.cli import output
from phalanx.cli.output import Column
from phalanx.cli.session import connected
from phalanx.models import Node, Remaining, Suspect

NODE_COLUMNS = (
    Column("NAME", lambda node: node.name),
    Column("CLUSTER", lambda node: node.cluster),
    Column("STATE", lambda node: _state(node), is_state=True),
    Column("GPUS", lambda node: f"{node.gpus_used}/{node.gpus}", right=True),
    Column("TYPE", lambda node: node.gpu_type),
    Column("CPUS", lambda node: f"{node.cpus:g}", right=True),
    Column("MEMORY", lambda node: output.gibibytes(node.memory_bytes), right=True),
    Column("ADDRESS", lambda node: node.address),
    Column("SEEN", lambda node: output.ago(node.last_seen_at)),
    Column("JOBS", lambda node: ", ".join(node.jobs)),
)

CLUSTER_COLUMNS = (
    Column("NAME", lambda cluster: cluster.name),
    Column("ID", lambda cluster: cluster.id),
    Column("AGENT SEEN", lambda cluster: output.ago(cluster.agent_seen_at) or "never"),
    Column("CREATED", lambda cluster: output.ago(cluster.created_at)),
)

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="A node by name or id.")]

# What people look for under a word that looks like another command, or like none.
OTHER_WORDS = {"undrain": "uncordon", "resume": "uncordon"}


class NodesGroup(TyperGroup):
    """Names the command that was meant where its spelling is not near."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if meant := OTHER_WORDS.get(args[0]):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)


nodes = typer.Typer(cls=NodesGroup, help="List nodes; take them out of service and back.", invoke_without_command=True)
clusters = typer.Typer(help="List the Ray clusters, or add one.", invoke_without_command=True)


@nodes.callback()
def nodes_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        list_nodes(output_as)


@nodes.command("list")
def list_nodes(output_as: output.Output = output.Format.TABLE) -> None:
    """List all nodes."""
    with connected() as client:
        output.items(client.nodes(), NODE_COLUMNS, output_as, empty="no nodes: start an agent (`phalanx agent`)")


@nodes.command("show")
def show_node(node: NodeArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show one node."""
    with connected() as client:
        found = client.node(node)
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    labels = " ".join(f"{key}={value}" for key, value in sorted(found.labels.items()))
    skew = f"{found.clock_skew_s * 1e3:.0f} ms" if found.clock_skew_s is not None else None
    shown = [(column.title.lower(), column.show(found)) for column in NODE_COLUMNS]
    users = "one for each tenant" if found.own_users else "the runner's own, for every tenant"
    more = [("users of ranks", users), ("labels", labels), ("clock skew", skew), ("outlook", found.outlook)]
    more += [("suspect", _suspected(found.suspect))] if found.suspect else []
    output.fields([("id", found.id), *shown, *more, *(("remains", _remains(each)) for each in found.remaining)])


@nodes.command()
def cordon(node: NodeArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Place nothing new on a node; what runs there goes on."""
    with connected() as client:
        _print(client.cordon(node), "takes nothing new", output_as)


@nodes.command()
def uncordon(node: NodeArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Let a node take work again, after cordon or drain."""
    with connected() as client:
        _print(client.uncordon(node), "takes work", output_as)


@nodes.command()
def drain(node: NodeArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Place nothing new on a node, and move what runs there where there is room elsewhere; says what will stay."""
    with connected() as client:
        _print(client.drain(node), "is being emptied; its preemptible jobs move where there is room", output_as)


def _state(node: Node) -> str:
    state = node.state if node.alive else "lost"
    return f"{state}, suspect" if node.suspect else state


def _suspected(suspect: Suspect) -> str:
    last = f": {suspect.message}" if suspect.message else ""
    return f"health checks of {suspect.attempts} attempts, the last {output.ago(suspect.last_at)}{last}"


def _print(node: Node, said: str, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(node.raw, output_as)
    typer.echo(f"{node.name} {said} ({node.gpus_used} of {node.gpus} GPUs in use)")
    if node.outlook:
        typer.echo(node.outlook)
    for each in node.remaining:
        typer.echo(f"  {_remains(each)}")


def _remains(remaining: Remaining) -> str:
    ends = f"{remaining.ends_by:%Y-%m-%d %H:%M:%SZ} at the latest" if remaining.ends_by else "no time limit"
    return f"{remaining.job}  {remaining.why.replace('_', ' ')}, {ends}"


@clusters.callback()
def clusters_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        list_clusters(output_as)


@clusters.command("list")
def list_clusters(output_as: output.Output = output.Format.TABLE) -> None:
    """List the clusters."""
    with connected() as client:
        output.items(client.clusters(), CLUSTER_COLUMNS, output_as, empty="no clusters")


@clusters.command("create")
def create_cluster(name: str, output_as: output.Output = output.Format.TABLE) -> None:
    """Add a cluster and print its agent's token, once."""
    with connected() as client:
        made = client.create_cluster(name)
    if output_as is not output.Format.TABLE:
        return output.data(made.raw, output_as)
    typer.echo(made.token)
    typer.echo(f"{made.name} ({made.id}): the token above is for its agent, and is shown only now", err=True)


def register(app: typer.Typer) -> None:
    app.add_typer(nodes, name="nodes")
    app.add_typer(clusters, name="clusters")
