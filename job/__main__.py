"""The process edge: subcommand, signals, exit code, termination message. The only place that ends the process."""

from job.runtime import hardening  # no import from __future__: it could be a file of the working directory

hardening.protect()

from job.runtime import signals, streams  # noqa: E402

streams.open_missing()
signals.install()

import argparse  # noqa: E402 - the handlers come before everything that takes time
import contextlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NoReturn  # noqa: E402

import structlog  # noqa: E402

from job.commands import variables  # noqa: E402
from job.config import environment  # noqa: E402
from job.observability import logs, termination  # noqa: E402
from job.observability.redaction import secret_values  # noqa: E402
from job.runtime import errors, process  # noqa: E402
from job.runtime.errors import ConfigError, InterruptedError, JobError, StopRequested  # noqa: A004, E402


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", remedy=self.format_usage().strip())


def main(arguments: list[str]) -> int:
    """Run a subcommand; the return value is the process's exit code (README, "Exit codes")."""
    signals.last_words(_say_interrupted)
    try:
        signals.enable()
        return _execute(_parse(arguments))
    except SystemExit as asked:  # argparse's --help
        return asked.code if isinstance(asked.code, int) else 0
    except BaseException as error:  # noqa: BLE001 - every end of the process is reported here
        signals.acknowledge()
        with contextlib.suppress(Exception):
            _configure_logs()
        return _report(error)


def _execute(chosen: argparse.Namespace) -> int:
    """Each command imports what it needs, so that a mistake is reported before anything heavy is imported."""
    process.expand_no_proxy()
    if chosen.command == "variables":
        return _show(variables.render(chosen.form))
    if chosen.command == "env":
        from job.commands import env  # noqa: PLC0415

        return _show(env.render(as_json=chosen.json))
    if chosen.command == "demo":
        from job.commands.demo import demo  # noqa: PLC0415

        return demo.demo()
    if chosen.command == "check":
        from job.commands import check  # noqa: PLC0415

        return check.command(as_json=chosen.json, report=chosen.report)
    _configure_logs()
    config = environment.load()
    if chosen.command == "preflight":
        from job.stages import preflight  # noqa: PLC0415

        preflight.everything(config)
    else:
        logs.set_level(config.log_level)
        from job import run  # noqa: PLC0415

        run.run(config)
    return 0


def _show(result: str) -> int:
    with streams.result(streams.to_stderr()) as stdout:
        stdout.write(result)
    return 0


def _configure_logs() -> None:
    logs.configure(form=environment.asked_log_format(), level="info", secrets=secret_values(process.variables()))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m job", description="Fine-tune a language model, configured by TUNE_* variables.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("train", help="pull, train, publish (the default)")
    commands.add_parser("preflight", help="check this machine and the credentials for the output; train nothing")
    look = commands.add_parser(
        "check", help="check settings, credentials, model and data; needs no GPU, trains nothing"
    )
    look.add_argument("--json", action="store_true", help="one JSON object instead of words")
    look.add_argument("--report", type=Path, metavar="FILE", help="write what a run would learn as an HTML page")
    machine = commands.add_parser("env", help="show versions, machine and variables, as a bug report needs them")
    machine.add_argument("--json", action="store_true", help="one JSON object instead of words")
    table = commands.add_parser("variables", help="list the variables")
    form = table.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", default="text", help="as JSON")
    form.add_argument(
        "--markdown", dest="form", action="store_const", const="markdown", help="as docs/configuration.md shows them"
    )
    commands.add_parser("demo", help="train a small model on a small dataset against a local S3 server")
    return parser.parse_args(arguments)


def _report(error: BaseException) -> int:
    """Write the termination message, log how the run ended, and choose the exit code."""
    log = structlog.get_logger()
    if isinstance(error, StopRequested):
        ended: JobError = InterruptedError(f"{error.signal_name} asked the run to stop.", remedy="Start it again.")
    else:
        ended = errors.as_job_error(error)
    termination.write(ended)  # first: nobody may be reading the log
    if isinstance(error, StopRequested):
        log.warning("interrupted", signal=error.signal_name, exit_code=ended.exit_code)
    elif isinstance(error, JobError):
        problems = {"problems": list(error.problems)} if isinstance(error, ConfigError) and error.problems else {}
        log.error("run_failed", **termination.facts(error), **problems)
    else:
        log.error("run_failed", **termination.facts(ended), exc_info=error)
    return ended.exit_code


def _say_interrupted() -> None:
    """The grace is over, or a second signal came: the main thread may be anywhere, so do as little as possible."""
    ended = InterruptedError(f"{signals.asked()} asked the run to stop.", remedy="Start it again.")
    termination.write(ended)
    structlog.get_logger().warning("interrupted", signal=signals.asked(), exit_code=ended.exit_code, at_once=True)


def _end_children() -> None:
    """Kill the processes that libraries started and did not end."""
    import psutil  # noqa: PLC0415 - not needed to report a bad environment

    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in logs.processes()]
    for child in left:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(left, timeout=1.0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        signals.acknowledge()  # the exit code is decided: a signal cannot change it any more
        _end_children()
        logs.close()
        sys.stdout.flush()
    finally:
        # Not sys.exit: a thread or an exit handler of a library could keep the pod running forever.
        os._exit(code)
