"""Owns `phalanx scaling fit`: past runs in, of the service or of a file; a scaling law, a forecast and a recommendation
out. Refuses to fit anything itself (`scaling`).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from phalanx.cli import output, session
from phalanx.cli.failures import INVALID, CommandError

from phalanx_server.scaling import picture, table
from phalanx_server.scaling.history import TAIL, Names, run_of, why_not
from phalanx_server.scaling.runs import LeftOut, Run, Runs, read_runs, sorted_out
from phalanx_server.scaling.study import Question, document, study

if TYPE_CHECKING:
    from phalanx.client import Client
    from phalanx.models import Job

MOST_RUNS = 1_000
POINTS = 1_000
LEVELS = (0.5, 0.999)
LINE_EVERY_S = 10.0

scaling = typer.Typer(help="Fit scaling laws to past runs.", invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(scaling, name="scaling")


@scaling.callback()
def about(ctx: typer.Context) -> None:
    """Fit scaling laws to past runs: what a larger model or more data would bring."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@scaling.command("fit")
def fit(
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="JOB|ARRAY…", help="Runs of the service, by id or name.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="All jobs of this name; may be repeated.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="All jobs with this label; repeated: with all.")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="All jobs of this tenant and those below it, or of them those of --name, --label."),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Runs of a file (CSV or JSON: name, parameters, tokens, loss) instead.")
    ] = None,
    loss_metric: Annotated[str, typer.Option(help="The metric that is the loss.")] = Names.loss,
    tokens_metric: Annotated[str, typer.Option(help="The metric that counts tokens seen.")] = Names.tokens,
    parameters_metric: Annotated[str, typer.Option(help="The metric that is the model's size.")] = Names.parameters,
    tail: Annotated[
        float, typer.Option(min=0, max=0.5, help="The final loss is the mean over this last share of the steps.")
    ] = TAIL,
    parameters: Annotated[float | None, typer.Option(help="Forecast a run of this size, such as 1e9.")] = None,
    tokens: Annotated[float | None, typer.Option(help="And of so many tokens, such as 2e10.")] = None,
    flops: Annotated[float | None, typer.Option(help="Recommend size and tokens for this compute.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Recommend size and tokens for so many GPU-hours.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPU, such as h100; else that of the runs.")] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of its peak; else measured by runs on it, or 0.4.")
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp8, tf32 or fp32: which peak.")] = "bf16",
    interval: Annotated[float, typer.Option(min=LEVELS[0], max=LEVELS[1], help="How often intervals hold.")] = 0.9,
    resamples: Annotated[int, typer.Option(min=50, max=10_000, help="Of the bootstrap over runs.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw loss over compute into this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Fit L(N, D) = E + A/N^alpha + B/D^beta to finished runs; forecast a run, and split a budget into N and D."""
    question = Question(
        planned=_planned(parameters, tokens),
        budget_flops=_over_0("--flops", flops),
        budget_gpu_hours=_over_0("--gpu-hours", gpu_hours),
        gpu=gpu,
        mfu=mfu,
        precision=precision,
        level=interval,
        resamples=resamples,
        seed=seed,
    )
    if flops is not None and gpu_hours is not None:
        raise typer.BadParameter("give --flops or --gpu-hours, not both")
    chosen = bool(jobs or name or label or tenant)
    if chosen == (runs is not None):
        raise typer.BadParameter("give jobs (by id, --name, --label or --tenant), or --runs FILE")
    if tenant and jobs and not (name or label):
        raise typer.BadParameter("--tenant chooses among jobs by --name or --label, or all: leave out JOB or --tenant")
    if runs is not None:
        usable, left_out = _of_file(runs)
    else:
        names = Names(loss=loss_metric, tokens=tokens_metric, parameters=parameters_metric)
        usable, left_out = _of_service(jobs or [], name or [], label or [], tenant, names, tail)
    _answer(usable, left_out, question, plot, output.Format.JSON if as_json else output_as)


def _answer(
    usable: list[Run], left_out: list[LeftOut], question: Question, plot: Path | None, output_as: output.Format
) -> None:
    try:
        with _progress(f"resamples of {len(usable)} runs fitted", question.resamples) as told:
            found = study(usable, left_out, question, told)
    except ValueError as error:
        for one in left_out:
            typer.echo(f"left out: {one.name}: {one.reason}", err=True)
        raise CommandError(str(error), exit_code=INVALID) from None
    if plot is not None:
        _write(plot, picture.svg(found))
    if output_as is output.Format.TABLE:
        table.show(found, output.console())
    else:
        output.data(document(found), output_as)


@contextmanager
def _progress(what: str, most: int) -> Iterator[Callable[[int], None]]:
    """Says on stderr how many of `most` are done: all the time on a terminal, elsewhere a line in LINE_EVERY_S."""
    console, said_at = output.console(stderr=True), time.monotonic()
    with console.status(f"0 of {most} {what}") if console.is_terminal else nullcontext() as status:

        def told(done: int) -> None:
            nonlocal said_at
            if status is not None:
                status.update(f"{done} of {most} {what}")
            elif time.monotonic() - said_at >= LINE_EVERY_S:
                said_at = time.monotonic()
                console.print(f"{done} of {most} {what}", soft_wrap=True, markup=False)

        yield told


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}", exit_code=INVALID) from None


def _planned(parameters: float | None, tokens: float | None) -> tuple[float, float] | None:
    if (parameters is None) != (tokens is None):
        raise typer.BadParameter("--parameters and --tokens go together")
    sizes = _over_0("--parameters", parameters), _over_0("--tokens", tokens)
    return None if sizes[0] is None or sizes[1] is None else (sizes[0], sizes[1])


def _over_0(option: str, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{option} is {value:g}: it must be a number over 0")
    return value


# ------------------------------------------------------------------ where runs come from


def _of_file(path: Path) -> Runs:
    try:
        return read_runs(path)
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
    raise CommandError(f"{path}: {problem}", exit_code=INVALID)


def _of_service(
    words: list[str], names: list[str], labels: list[str], tenant: str | None, metrics: Names, tail: float
) -> Runs:
    wanted = _labels(labels)
    with session.connected() as client:
        jobs = {job.id: job for job in _chosen(client, words, names, wanted, tenant)}
        if len(jobs) > MOST_RUNS:
            raise CommandError(f"more than {MOST_RUNS} jobs fit: choose by --name or --label", exit_code=INVALID)
        with _progress("jobs read", len(jobs)) as told:
            return sorted_out(_all_runs(client, list(jobs.values()), metrics, tail, told))


def _chosen(
    client: "Client", words: list[str], names: list[str], labels: dict[str, str], tenant: str | None
) -> "Iterator[Job]":
    for word in words:
        id_ = session.job_or_array_id(client, word)
        if session.is_array(id_):
            yield from client.jobs(array=id_)
        else:
            yield client.job(id_)
    if names or labels or tenant:
        for name in names or [None]:
            yield from islice(client.jobs(name=name, labels=labels, tenant=tenant), MOST_RUNS + 1)


def _labels(given: list[str]) -> dict[str, str]:
    wrong = next((one for one in given if "=" not in one.strip("=")), None)
    if wrong is not None:
        raise typer.BadParameter(f"--label {wrong!r}: expected KEY=VALUE")
    return dict(one.split("=", 1) for one in given)


def _all_runs(
    client: "Client", jobs: "list[Job]", metrics: Names, tail: float, told: Callable[[int], None]
) -> Iterator[Run | LeftOut]:
    for done, job in enumerate(jobs, 1):
        yield _run(client, job, metrics, tail)
        told(done)


def _run(client: "Client", job: "Job", metrics: Names, tail: float) -> Run | LeftOut:
    reported = [] if why_not(job) else client.metrics(job.id, names=metrics.all, max_points=POINTS)
    return run_of(job, reported, metrics, tail=tail)
