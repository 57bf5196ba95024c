"""The commands and their options. What a command needs is imported when it runs: help comes at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from post_training import __version__
from post_training.cli.exits import ExitCode, exit_code_of, lines_of, object_of
from post_training.errors import PostTrainingError

EPILOG = (
    "Exit codes: 0 done; 1 the job failed or was cancelled, or a check failed; 2 usage, or a request that"
    " breaks a rule; 3 no such job; 4 a conflict; 5 a service does not answer; 6 not allowed;"
    " 130 interrupted."
)


AS_JSON = "post_training.as_json"
"""Key of what a command's ``--json`` was, in the data that all contexts of a call share."""


class Commands(TyperGroup):
    """The commands, whose errors end with the exit codes of ``exits``, with ``--json`` as JSON."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        :raises typer.Exit: with the code of its error.
        """
        try:
            return super().invoke(ctx)
        except PostTrainingError as error:
            _tell(error, as_json=ctx.meta.get(AS_JSON, False))
            raise typer.Exit(exit_code_of(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:  # typer's own way to end it, which is silent
            raise
        except OSError as error:
            _tell(error, as_json=ctx.meta.get(AS_JSON, False))
            raise typer.Exit(ExitCode.FAILED) from None


def _tell(error: Exception, *, as_json: bool) -> None:
    for line in [json.dumps(object_of(error))] if as_json else lines_of(error):
        typer.echo(line, err=True)


def _remember_json(ctx: typer.Context, given: bool) -> bool:
    ctx.meta[AS_JSON] = given
    return given


app = typer.Typer(
    name="post-training",
    cls=Commands,
    help="Fine-tune language models: on a deployment of Airflow and MLflow, or in this terminal.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
RequestArgument = Annotated[
    Path,
    typer.Argument(
        metavar="REQUEST", help="YAML file: the body of supervised-fine-tune or preference-optimize."
    ),
]
JobUuidOption = Annotated[str | None, typer.Option("--job-uuid", help="The job's id, instead of the file's.")]
JsonOption = Annotated[
    bool, typer.Option("--json", callback=_remember_json, help="Print JSON, of errors too.")
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="POST_TRAINING_URL",
        help="Base URL of the API; by default that of the servers that `up` or `make demo` started here.",
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="POST_TRAINING_TOKEN",
        help="Airflow's token; else POST_TRAINING_USER and POST_TRAINING_PASSWORD of the environment log in.",
    ),
]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="POST_TRAINING_HOME",
        help="Folder of the servers that `up` started; by default .post-training or .demo, here or above.",
    ),
]
OffsetOption = Annotated[int, typer.Option("--offset", min=0, help="Lines to leave out at the beginning.")]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")
]
PortOption = Annotated[
    int | None, typer.Option(min=1, max=65535, help="By default the usual one, or a free one.")
]


@app.callback(invoke_without_command=False)
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda given: _version(given))
    ] = False,
) -> None:
    """Fine-tune language models: on a deployment of Airflow and MLflow, or in this terminal."""


def _version(given: bool) -> None:
    if given:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def up(
    home: HomeOption = None,
    allowed_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder from which requests may read, again for more; by default the current one."),
    ] = None,
    airflow_port: PortOption = None,
    mlflow_port: PortOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave them running; `down` ends them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start Airflow and MLflow on this machine."""
    from post_training.cli.deployment import HOME
    from post_training.cli.servers import up

    up(
        home or Path(HOME),
        allowed_roots=allowed_root or [Path.cwd()],
        airflow_port=airflow_port,
        mlflow_port=mlflow_port,
        detach=detach,
        as_json=as_json,
    )


@app.command()
def down(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """End the servers that `up` left running."""
    from post_training.cli.servers import down

    down(home, as_json=as_json)


@app.command()
def run(
    request: RequestArgument,
    job_uuid: JobUuidOption = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="The job's folder, from which the same command goes on. By default post_training_runs/JOB."
        ),
    ] = None,
    tracking_uri: TrackingOption = None,
    experiment: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_EXPERIMENT_NAME", help="MLflow experiment, where the request names none."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train in this terminal, without Airflow; again, it goes on where it was."""
    from post_training.cli.training import run

    raise typer.Exit(
        run(
            request,
            job_uuid=job_uuid,
            work_dir=work_dir,
            tracking_uri=tracking_uri,
            experiment=experiment,
            as_json=as_json,
        )
    )


@app.command()
def submit(
    request: RequestArgument,
    job_uuid: JobUuidOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a job on the deployment; print its id."""
    from post_training.cli import jobs

    jobs.submit(_api(url, token, home), request, job_uuid=job_uuid, as_json=as_json)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many, the newest; 0 is all.")] = 50,
    status: Annotated[bool, typer.Option("--status", help="Ask for each one's status, too.")] = False,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the jobs, newest first."""
    from post_training.cli import jobs

    jobs.list_jobs(_api(url, token, home), limit=limit, with_status=status, as_json=as_json)


@app.command()
def status(
    job: JobArgument,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a job's status, times, resources and checkpoints."""
    from post_training.cli import jobs

    jobs.status(_api(url, token, home), job, as_json=as_json)


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Wait for more, until the job has ended; it fails if the job did."
        ),
    ] = False,
    offset: OffsetOption = 0,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a job's log, of all its attempts."""
    from post_training.cli import jobs

    api = _api(url, token, home)
    if follow:
        raise typer.Exit(jobs.follow_logs(api, job, offset=offset, as_json=as_json))
    jobs.logs(api, job, offset=offset, as_json=as_json)


@app.command()
def cancel(
    job: JobArgument,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a job; its checkpoints so far are kept."""
    from post_training.cli import jobs

    jobs.cancel(_api(url, token, home), job, as_json=as_json)


@app.command()
def artifacts(
    job: JobArgument,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a job's checkpoints with their metrics."""
    from post_training.cli import jobs

    jobs.artifacts(_api(url, token, home), job, as_json=as_json)


@app.command()
def doctor(
    tracking_uri: TrackingOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look whether this machine and the deployment can train, and say what to mend."""
    from post_training.cli.deployment import Options
    from post_training.cli.doctor import doctor

    raise typer.Exit(doctor(Options(url, token, home), tracking_uri=tracking_uri, as_json=as_json))


def _api(url: str | None, token: str | None, home: Path | None) -> Any:
    """Return a client of the deployment."""
    from post_training.cli.deployment import Options, connect

    return connect(Options(url, token, home))


if __name__ == "__main__":
    sys.exit(app())
