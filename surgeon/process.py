"""The process around the commands: exit codes, interrupts, standard output and error.

Exit codes: 0 done; 2 the user's or the model's doing (one message, no traceback); 130 interrupted; 1 a bug of surgeon.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from threading import Timer
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from surgeon.environment import installed_version
from surgeon.errors import SurgeonError, SurgeonWarning

_THE_MACHINES_DOING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""System errors that say something about the user's disk, not about a bug."""

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_signals: list[int] = []
"""Requests to stop that have arrived."""


class _Stop(KeyboardInterrupt):
    """A request to stop.

    A class of its own: where a plain ``KeyboardInterrupt`` leaves source text run by ``exec``, which dataclasses and named
    tuples are made of, ``python -m`` ends by SIGINT instead of its exit code, although the interrupt has been caught.
    """


_NARROWEST = 72
"""Columns below which tables lose words and figures; a terminal with fewer breaks their lines, which loses nothing."""


class Screen(Console):
    """Standard output; a closed pipe is left to the command group instead of ending the process here."""

    def __init__(self, **options: Any) -> None:
        """Args:
        options: of the console.
        """
        super().__init__(**options)
        if self.width < _NARROWEST:
            self.width = _NARROWEST

    def on_broken_pipe(self) -> None:
        """Raise, instead of ending the process."""
        raise BrokenPipeError


class Guarded(TyperGroup):
    """Turns what commands raise on purpose into a line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(_pipe_closed()) from None
        except Exception as error:
            if _signals:  # compiled modules turn an interrupt of their start into errors of their own
                raise _interrupted(error) from None
            said = str(error) if isinstance(error, SurgeonError) else _machines_doing(error)
            if said is None:
                raise
            say("error", said, error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            raise _interrupted(stop) from None


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit.

    Args:
        app: the commands, of the class :class:`Guarded`.
        arguments: what follows the program's name; ``sys.argv`` by default.
    """
    _signals.clear()
    code: Any
    hook, showwarning = sys.unraisablehook, warnings.showwarning
    try:
        for number in _STOPPING:
            signal.signal(number, _interrupt)
        sys.unraisablehook = _unraisable
        warnings.showwarning = _shown_by(showwarning)
        code = _run(app, arguments)
    except KeyboardInterrupt:  # before the command began, or behind it
        code = _interrupted().exit_code
    for number in _STOPPING:  # nothing is left that an interrupt could stop
        signal.signal(number, signal.SIG_IGN)
    sys.unraisablehook, warnings.showwarning = hook, showwarning
    sys.exit(code)


def _shown_by(otherwise: Any) -> Any:
    """What shows warnings: ours are a line like an error, without the place in our code."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, SurgeonWarning):
            say("warning", str(message))
        else:
            otherwise(message, category, *place, **options)

    return show


def _run(app: typer.Typer, arguments: Sequence[str] | None) -> Any:
    """Run the command line; returns the exit code."""
    try:
        app(args=arguments, prog_name="surgeon")
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        said = _machines_doing(error)  # help is written outside of any command
        if said is not None:
            say("error", said)
            code = 2
        else:
            traceback.print_exc()
            say("this is a bug in surgeon", f"{installed_version()}; please report it with the lines above")
            code = 1
    try:
        if sys.stdout is not None:  # a process may be started without it
            sys.stdout.flush()
    except BrokenPipeError:
        code = _pipe_closed()
    return code


def _machines_doing(error: Exception) -> str | None:
    """What an error says about the user's disk; None where it says nothing about it."""
    if isinstance(error, OSError) and error.errno in _THE_MACHINES_DOING:
        return f"{error.filename or 'a file'}: {error.strerror}"
    full = os.strerror(errno.ENOSPC)
    return str(error) if full in str(error) else None  # compiled libraries have errors of their own


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite kill cleans up as Ctrl-C does; repeating it does not cut the cleaning short.

    While a module is imported it waits: compiled modules turn what is raised in their start into errors of their own, or
    end the process.
    """
    if _importing(frame):
        _again(number)
        return
    for other in _STOPPING:
        signal.signal(other, signal.SIG_IGN)
    _signals.append(number)
    raise _Stop


def _unraisable(lost: Any) -> None:
    """A request to stop that arrives in a finaliser, where Python drops what is raised, is made again."""
    if isinstance(lost.exc_value, _Stop):
        signal.signal(_signals[-1], _interrupt)
        _again(_signals[-1])  # when this function, which drops it too, has returned
    else:
        sys.__unraisablehook__(lost)


def _importing(frame: FrameType | None) -> bool:
    """Whether the import of a module is among the calls."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _again(number: int) -> None:
    """Ask a moment later."""
    timer = Timer(0.05, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _interrupted(stop: BaseException | None = None) -> typer.Exit:
    say("interrupted", "", stop)
    return typer.Exit(130)


def _pipe_closed() -> int:
    """The reader of our output has left (``surgeon passes | head -1``): stop as a process ended by SIGPIPE does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
    return 128 + signal.SIGPIPE


def say(what: str, message: str, error: BaseException | None = None) -> None:
    """Print a line on standard error, and one for each note of an error, such as how to go on."""
    line = Text(what, style="bold red")
    if message:
        line.append(": ").append(Text(message, style="default not bold"))
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(line)
    for note in getattr(error, "__notes__", ()):
        console.print(Text(note))
