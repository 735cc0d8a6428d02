# SPDX-License-Identifier: Apache-2.0
"""The command line. Every command imports what it needs when it runs: `tierd run` must serve faults soon and stay
small, `tierd status` must answer at once.

An error is one line on standard error that says what to do, and an exit status (see --help).
"""

from __future__ import annotations

import contextlib
import importlib
import json as json_module
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from tierd import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from tierd.check import Finding
    from tierd.client import Client

DEFAULT_CONFIG = Path("/etc/tierd/tierd.yaml")
DEFAULT_RUNTIME_DIR = Path("/run/tierd")
DEFAULT_SOCKET = DEFAULT_RUNTIME_DIR / "tierd.sock"

FAILED, USAGE, UNREACHABLE, NO_GUEST, CONFIG_WRONG, INTERRUPTED = 1, 2, 3, 4, 78, 130
EPILOG = """\b
Exit status:
   0  done; for check: tierd can work here
   1  failed or refused; for check: it cannot
   2  wrong usage
   3  the daemon cannot be reached
   4  there is no such guest, or the name means several
  78  the configuration is wrong
 130  interrupted"""


class Failure(Exception):
    """Ends the command: one line for the operator, and the exit status."""

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Options:
    """What stands before the command."""

    config: Path
    socket: Path | None
    debug: bool = False

    def socket_path(self) -> Path:
        """--socket, or that of the configuration, which is not validated here."""
        if self.socket is not None:
            return self.socket
        if not self.config.exists():
            return DEFAULT_SOCKET
        try:
            api = _raw(self.config).get("api")
            return Path(api.get("socket", DEFAULT_SOCKET)) if isinstance(api, dict) else DEFAULT_SOCKET
        except (OSError, ValueError, TypeError) as error:
            raise Failure(
                f"cannot read {self.config} for the socket's path ({_one_line(error)}); give --socket, or see "
                f"`tierd --config {self.config} config check`",
                CONFIG_WRONG,
            ) from error


def _raw(path: Path) -> dict[str, Any]:
    """The configuration's main file, not validated. OSError, ValueError."""
    import yaml

    try:
        raw = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return raw if isinstance(raw, dict) else {}


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _daemon(options: Options) -> Iterator[Client]:
    from tierd.client import Client, Declined, Unreachable

    try:
        with Client(options.socket_path()) as client:
            yield client
    except Unreachable as error:
        raise Failure(str(error), UNREACHABLE) from error
    except Declined as error:
        ambiguous = error.status == 409 and "may be any of" in str(error)
        raise Failure(str(error), NO_GUEST if error.status == 404 or ambiguous else FAILED) from error


def _console() -> Console:
    """Standard output: as wide as the terminal, or wide enough that a pipe gets whole lines."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=240)


def _print_json(value: Any) -> None:
    click.echo(json_module.dumps(value, indent=2))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The configuration file.",
)
@click.option(
    "--socket", type=click.Path(path_type=Path), help="The daemon's socket. Default: api.socket of the configuration."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, message="tierd %(version)s")
@click.pass_context
def cli(context: click.Context, config: Path, socket: Path | None, debug: bool) -> None:
    """Memory tiering for virtual machines: moves what a guest does not touch to a cheaper place, and back again."""
    context.obj = Options(config, socket, debug)


# --- the daemon -------------------------------------------------------------------------------------------------------


def _own_config(options: Options, config: Path | None) -> Path:
    return config if config is not None else options.config


config_option = click.option("--config", type=click.Path(path_type=Path), help="As before the command.")


@cli.command()
@config_option
@click.pass_obj
def run(options: Options, config: Path | None) -> NoReturn:
    """Run the daemon in the foreground.

    SIGTERM and SIGINT bring every page back first (on_stop: restore), a second one stops at once; SIGHUP reloads.
    SIGUSR1 stops for a tierd that is started next and adopts the guests (on_restart: keep).
    """
    from tierd.resume import resume

    path = _own_config(options, config)
    resumed = resume(_runtime_dir(path))  # before anything else is imported: guests may be waiting
    _import_structlog()
    from tierd.daemon import main as run_daemon

    with _config_errors():
        sys.exit(run_daemon(path, resumed))


def _runtime_dir(config: Path) -> Path:
    """As the configuration says, which is not validated here: the daemon does that, and says what is wrong."""
    try:
        return Path(_raw(config).get("runtime_dir", DEFAULT_RUNTIME_DIR))
    except (OSError, ValueError, TypeError):
        return DEFAULT_RUNTIME_DIR


def _import_structlog() -> None:
    """Without rich, which structlog imports if it can, for coloured tracebacks: 6 MiB that a daemon would keep."""
    if "rich" in sys.modules:
        return
    blocked: dict[str, Any] = sys.modules
    blocked["rich"] = None  # makes an import fail
    try:
        importlib.import_module("structlog")
    finally:
        del blocked["rich"]


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    """All that is wrong with a configuration, one line each."""
    from tierd.document import ConfigErrors

    try:
        yield
    except ConfigErrors as errors:
        for error in errors.errors[:-1]:
            click.echo(f"tierd: {error}", err=True)
        raise Failure(str(errors.errors[-1]), CONFIG_WRONG) from errors


@cli.group()
def config() -> None:
    """The configuration."""


@config.command("check")
@config_option
@click.option("--probe", is_flag=True, help="Try the stores, too: as the user that tierd runs as.")
@json_option
@click.pass_obj
def config_check(options: Options, config: Path | None, probe: bool, as_json: bool) -> None:
    """Say everything that is wrong with the configuration, or that nothing is."""
    from tierd.document import ConfigErrors

    path = _own_config(options, config)
    if as_json:
        try:
            _load_whole(path, probe)
            wrong = []
        except ConfigErrors as errors:
            wrong = [{**vars(error), "file": str(error.file)} for error in errors.errors]
        _print_json({"config": str(path), "errors": wrong})
        if wrong:
            sys.exit(CONFIG_WRONG)
        return
    with _config_errors():
        rules = _load_whole(path, probe)
    click.echo(f"{path}: all right, {rules} guest rule{'' if rules == 1 else 's'}")


def _load_whole(path: Path, probe: bool) -> int:
    """With what stores say of their keys; how many guest rules there are. ConfigErrors."""
    from tierd.config import named_stores
    from tierd.document import ConfigErrors
    from tierd.load import load

    config = load(path)
    if probe or named_stores(config) & config.asked.keys():
        from tierd.stores import errors_of_stores  # it imports what they need

        if errors := errors_of_stores(config, path, probe=probe):
            raise ConfigErrors(errors)
    return len(config.guests)


@cli.command()
@click.argument("pid", type=click.IntRange(1), required=False)
@json_option
@click.pass_obj
def check(options: Options, pid: int | None, as_json: bool) -> None:
    """Say what this kernel and host can do; with PID, whether that VMM's guest can be tiered."""
    findings = _check_guest(options, pid) if pid is not None else _check_host()
    show_findings(findings, as_json)


def _check_host() -> list[Finding]:
    from tierd.check import engine_findings, host_findings, kernel_findings
    from tierd.native import probe

    try:
        found = probe()
        return engine_findings(found) + kernel_findings(found) + host_findings(found)
    except OSError as error:
        raise Failure(f"the trial pages could not be made ({_one_line(error)}); run this as root") from error


def _check_guest(options: Options, pid: int) -> list[Finding]:
    from tierd.attach import Refused
    from tierd.attach.holders import HolderScan
    from tierd.attach.preflight import findings
    from tierd.attach.procfs import read_spec
    from tierd.check import guest_findings
    from tierd.config import Policy
    from tierd.engine import EngineUnavailable, choose, fitting
    from tierd.load import load

    try:
        spec = read_spec(pid)
        policy, wanted = Policy(), "auto"
        if options.config.exists():
            with _config_errors():
                config = load(options.config)
            policy = config.match(spec.name, pid, " ".join(spec.cmdline)) or policy
            wanted = config.engine
        return guest_findings(findings(spec, policy, HolderScan(), fitting(choose(wanted), spec.anonymous)))
    except EngineUnavailable as error:
        raise Failure(str(error)) from error
    except Refused as refused:
        return guest_findings([(refused.check, refused)])
    except ProcessLookupError as error:
        raise Failure(f"there is no process {pid}; `pgrep -a qemu` lists VMMs", NO_GUEST) from error
    except OSError as error:
        raise Failure(f"process {pid} cannot be looked at ({_one_line(error)}); run this as root") from error


def show_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """Print them; exit status 1 if one that is needed fails."""
    from tierd.check import passed
    from tierd.show import check_table

    good = passed(findings)
    if as_json:
        _print_json({"passed": good, "findings": [vars(finding) for finding in findings]})
    else:
        _console().print(check_table(findings))
    if not good:
        sys.exit(FAILED)


def _size(context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    from tierd.quantities import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


@cli.command()
@json_option
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/vm"),
    show_default=True,
    help="For the guest's files and the store; not on a tmpfs.",
)
@click.option(
    "--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True, help="QEMU's accelerator."
)
@click.option(
    "--memory",
    "memory_bytes",
    callback=_size,
    metavar="SIZE",
    default="512MiB",
    show_default=True,
    help="Of the virtual machine; 128MiB at least.",
)
@click.option(
    "--tiers",
    default="memory,file",
    show_default=True,
    metavar="NAMES",
    help="Where the guest's cold pages go, in the order in which they sink.",
)
@click.option(
    "--backing",
    type=click.Choice(["memfd", "anonymous"]),
    default="memfd",
    show_default=True,
    help="Of its memory: shared, or private and anonymous, which is what QEMU makes when nobody says anything.",
)
@click.pass_obj
def demo(
    options: Options,
    as_json: bool,
    directory: Path,
    accel: str,
    memory_bytes: int,
    backing: Literal["memfd", "anonymous"],
    tiers: str,
) -> NoReturn:
    """Boot a virtual machine, tier it, and let it verify every byte: two minutes at most, as root.

    Exit status 0 if every byte was right and at least 40 % of the memory was given back. With --json the last line of
    the output is the result. TIERD_SLOWNESS=N in the environment: N times as long, for an emulated machine.
    """
    from tierd.demo import DemoError, GuestError, run_demo

    config = options.config if options.config.exists() else None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sys.exit(run_demo(as_json, directory, config, accel, memory_bytes, backing, tiers.split(",")))
    except (DemoError, GuestError) as error:
        raise Failure(str(error)) from error


# --- looking ----------------------------------------------------------------------------------------------------------


@cli.command()
@json_option
@click.pass_obj
def status(options: Options, as_json: bool) -> None:
    """A table of all guests."""
    with _daemon(options) as client:
        answer = client.get("/status")
    if as_json:
        _print_json(answer)
        return
    from tierd.show import status_table, summary_text, tiers_table

    console = _console()
    if answer["guests"]:
        console.print(status_table(answer))
    if (tiers := tiers_table(answer)) is not None:
        console.print(tiers)
    console.print(summary_text(answer), markup=False)


@cli.command()
@click.option("--once", is_flag=True, help="Print one table, over one interval, and end.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between two samples."
)
@json_option
@click.pass_obj
def top(options: Options, once: bool, interval: float, as_json: bool) -> None:
    """All guests, live: resident and stored memory, faults, latency. With --json, one line of JSON a sample."""
    from tierd.show import Row, Top, row_json, top_table

    with _daemon(options) as client:
        state = Top()

        def sample() -> list[Row]:
            return state.rows(time.monotonic(), client.get("/guests")["guests"])

        rows = sample()
        if once or as_json:
            while True:
                time.sleep(interval)
                rows = sample()
                if as_json:
                    click.echo(json_module.dumps({"guests": [row_json(row) for row in rows]}))
                else:
                    _console().print(top_table(rows))
                if once:
                    return
        from rich.live import Live

        live = Live(top_table(rows), console=_console(), screen=True, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), live:
            while True:
                time.sleep(interval)
                live.update(top_table(sample()), refresh=True)


# --- orders -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done_bytes, total_bytes: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(escape(what), total=None)
        yield lambda done_bytes, total_bytes: bars.update(task, completed=done_bytes, total=total_bytes or None)


def _order(options: Options, method: str, path: str, body: Any, what: str, as_json: bool) -> Any:
    """Give an order that takes time, and follow it."""
    with _daemon(options) as client, _progress(what, as_json) as progress:
        try:
            result = client.run(method, path, body, progress)
        except KeyboardInterrupt:
            raise Failure(f"{what} goes on in the daemon; `tierd status` shows how far it is", INTERRUPTED) from None
    if as_json:
        _print_json(result)
    return result


guest_argument = click.argument("guest")


def _guest_path(guest: str, verb: str = "") -> str:
    from tierd.client import guest_path

    return guest_path(guest) + (f"/{verb}" if verb else "")


def _shown(guest: str) -> str:
    from tierd.show import safe_text

    return safe_text(guest)


@cli.command()
@click.argument("pid", type=click.IntRange(1))
@click.option("--name", help="What to call the guest. Default: QEMU's -name.")
@json_option
@click.pass_obj
def attach(options: Options, pid: int, name: str | None, as_json: bool) -> None:
    """Tier the guest of the VMM with process id PID, whatever the rules say about its name."""
    body = {"pid": pid} if name is None else {"pid": pid, "name": name}
    guest = _order(options, "POST", "/guests", body, f"attach of process {pid}", as_json)
    if not as_json:
        click.echo(f"attached {_shown(guest['name'])} ({guest['key']})")


@cli.command()
@click.argument("guest", required=False)
@click.option("--pid", type=click.IntRange(1), help="Without a daemon: the VMM of a guest that the last one left.")
@json_option
@click.pass_obj
def detach(options: Options, guest: str | None, pid: int | None, as_json: bool) -> None:
    """Bring every page of GUEST (its name, pid or key) back and leave its VMM as if tierd had never been there."""
    if (guest is None) == (pid is None):
        raise click.UsageError("Say which GUEST; or, where no tierd runs any more, --pid of its VMM.")
    if guest is None:
        assert pid is not None
        _put_right(options, pid, as_json)
        return
    _order(options, "DELETE", _guest_path(guest), None, f"detach of {guest}", as_json)
    if not as_json:
        click.echo(f"detached {_shown(guest)}; `tierd attach` takes it up again")


def _put_right(options: Options, pid: int, as_json: bool) -> None:
    import structlog

    from tierd.engine import EngineUnavailable
    from tierd.salvage import put_right
    from tierd.serve import AlreadyRunning, Stale, StateError
    from tierd.show import size_text
    from tierd.store import StoreError

    structlog.configure(logger_factory=structlog.WriteLoggerFactory(sys.stderr))
    try:
        with _config_errors(), _progress(f"detach of process {pid}", as_json) as progress:
            restored = put_right(options.config, _runtime_dir(options.config), pid, progress)
    except AlreadyRunning as error:
        raise Failure(f"{error}, or `tierd detach {pid}`, which asks it") from error
    except (Stale, StateError, StoreError, EngineUnavailable, OSError) as error:
        raise Failure(str(error)) from error
    if as_json:
        _print_json({"restored_bytes": restored})
    else:
        click.echo(f"{size_text(restored)} brought back; process {pid} is as if tierd had never been there")


@cli.command()
@guest_argument
@json_option
@click.pass_obj
def restore(options: Options, guest: str, as_json: bool) -> None:
    """Bring every page of GUEST back, and pause it."""
    from tierd.show import size_text

    result = _order(options, "POST", _guest_path(guest, "restore"), None, f"restore of {guest}", as_json)
    if not as_json:
        click.echo(f"restored {size_text(result['restored_bytes'])} of {_shown(guest)}; it is paused (`tierd resume`)")


@cli.command()
@guest_argument
@json_option
@click.pass_obj
def retry(options: Options, guest: str, as_json: bool) -> None:
    """Read the lost pages of GUEST again, after its store was repaired."""
    from tierd.show import size_text

    result = _order(options, "POST", _guest_path(guest, "retry"), None, f"retry of {guest}", as_json)
    if not as_json:
        recovered, lost = size_text(result["recovered_bytes"]), size_text(result["lost_bytes"])
        click.echo(f"{recovered} of {_shown(guest)} can be had again, {lost} are still lost")


def _time(context: click.Context, param: click.Parameter, value: str | None) -> float | None:
    from tierd.quantities import parse_time

    try:
        return None if value is None else parse_time(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


@cli.command()
@guest_argument
@click.option(
    "--max",
    "max_bytes",
    callback=_size,
    metavar="SIZE",
    help="At most so much, 512MiB for example. Default: all that is idle.",
)
@click.option(
    "--min-idle",
    "min_idle_s",
    callback=_time,
    metavar="TIME",
    help="Only what is idle for so long, 5min for example. Never less than the policy's min_idle_s, the default.",
)
@json_option
@click.pass_obj
def evict(options: Options, guest: str, max_bytes: int | None, min_idle_s: float | None, as_json: bool) -> None:
    """Move idle memory of GUEST out now."""
    from tierd.show import size_text

    body = {key: value for key, value in (("max_bytes", max_bytes), ("min_idle_s", min_idle_s)) if value is not None}
    result = _order(options, "POST", _guest_path(guest, "evict"), body, f"eviction of {guest}", as_json)
    if not as_json:
        click.echo(f"evicted {size_text(result['evicted_bytes'])} of {_shown(guest)}")


def _switch(options: Options, guest: str, verb: str, as_json: bool) -> None:
    with _daemon(options) as client:
        now = client.post(_guest_path(guest, verb))
    if as_json:
        _print_json(now)
    else:
        click.echo(f"{_shown(now['name'])} is {now['state']}")


@cli.command()
@guest_argument
@json_option
@click.pass_obj
def pause(options: Options, guest: str, as_json: bool) -> None:
    """Evict nothing more of GUEST; its faults are served."""
    _switch(options, guest, "pause", as_json)


@cli.command()
@guest_argument
@json_option
@click.pass_obj
def resume(options: Options, guest: str, as_json: bool) -> None:
    """Go on with GUEST after pause or restore."""
    _switch(options, guest, "resume", as_json)


# --- errors -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program. Ends the process."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        cli.main(list(arguments), prog_name="tierd", standalone_mode=False)
        sys.exit(0)
    except Exception as error:
        if "--debug" in arguments:
            raise
        text, status = _last_words(error)
        click.echo(f"tierd: {_shown(text)}", err=True)
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _last_words(error: Exception) -> tuple[str, int]:
    if isinstance(error, Failure):
        return str(error), error.status
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return "which command?", USAGE
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "tierd"
        return f"{_one_line(error.format_message())} See `{path} --help`.", USAGE
    if isinstance(error, click.Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, click.ClickException):
        return _one_line(error.format_message()), FAILED
    if isinstance(error, BrokenPipeError):
        return "standard output was closed", FAILED
    return f"{type(error).__name__}: {_one_line(error)}; this is a bug, `tierd --debug ...` shows where", FAILED
