"""From the command line to one dataclass of options and back to one line and an exit code.

    @dataclass(frozen=True)
    class Options(cli.Options):
        \"\"\"Generate text.\"\"\"                                # the first line of --help

        top_k: int | None = option(None, "sample only from this many tokens; default: no cut", least=1)

    def main(options: Options) -> None: ...

    if __name__ == "__main__":
        cli.run(main)      # or a dictionary of such functions: commands, as in `compress.py quantize --bits=8`

An option is said once: its field gives the flag, its type, its default, its help and the values that it may have.
python-fire reads the command line and writes `--help`. Flags are checked first: fire itself would guess types from
values (`--prompt 1,2` becomes a tuple) and complain of an unknown flag only after the work is done. A class whose
defaults depend on what was typed (presets, --resume) overrides `Options.resolve`, which gets the typed flags alone.

The library names a parameter as Python writes it, `dtype=float32`; a message that leaves here has `--dtype=float32`. A
name with an underscore is no word of English: `raise max_seq_len` becomes `raise --max_seq_len` without a value, too.
Exit codes: 0 done, 2 bad input, 3 the environment (device, memory, disk), 4 not finite, 1 a bug, 130 interrupted, 143
terminated, 129 hung up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import math
import os
import re
import signal
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Self

import fire
import torch

from llama import processes
from llama.errors import EnvironmentFailure, InputError, InternalError, NonFinite, Notice, Stopped

LINE = 2000  # characters of an error
COLUMN = 38  # two of them and a rule fit a terminal of 80
# The help of options that several scripts have.
CKPT_DIR = (
    "checkpoint: a directory in Meta's or Hugging Face's layout, a file in it, or a GGUF file; without it, the small "
    "embedded model"
)
TOKENIZER_PATH = "tokenizer.json, tokenizer.model or a GGUF file; default: the one of ckpt_dir"
ADAPTER = "directory of a LoRA adapter for the model, from finetuning.py or PEFT; of several, one,two, the sum"
ANY_BASE = (
    "take an adapter for a model that it was not trained on, such as the original of its quantized base; names and "
    "shapes must fit all the same"
)
DEVICE = "auto, cpu, cuda or cuda:N"
DTYPE = "auto, float32, bfloat16 or float16; auto is float32 on a CPU, else the GPU's native 16-bit type"
SEEDS = {"least": 0, "below": 1 << 63}  # that torch and random take alike
EXIT_CODES = {InputError: 2, EnvironmentFailure: 3, NonFinite: 4, InternalError: 1}
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] | None = None,
    several: bool = False,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of `Options`.

    choices: what it may be, or with `several` what its comma-separated words may be, each once. least, above, below:
    bounds of a number, which is then finite, too. None passes where it is the default.
    """
    rules = {"choices": choices and tuple(choices), "several": several, "least": least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, **rules})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the options of a script. Raises InputError naming flag, value and what was expected."""

    ON_SEVERAL: typing.ClassVar[bool] = False  # whether torchrun may start the script

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (expected := _violated(value, **field.metadata)):
                raise InputError(f"--{field.name}={value}: expected {expected}")

    @classmethod
    def resolve(cls, typed: dict[str, Any]) -> Self:
        """The options for what was typed."""
        return cls(**typed)


def _violated(
    value: Any,
    help: str,
    choices: tuple[Any, ...] | None,
    several: bool,
    least: float | None,
    above: float | None,
    below: float | None,
) -> str | None:
    """The rule of a field that a value breaks, in words."""
    if choices is not None:
        words = value.split(",") if several else [value]
        if set(words) - set(choices) or len(set(words)) < len(words):
            return (
                f"a choice of {','.join(choices)}, each once" if several else f"one of {', '.join(map(str, choices))}"
            )
    if least is not None and not least <= value < math.inf:
        return f"at least {least:g}"
    if above is not None and not above < value < math.inf:
        return f"more than {above:g}"
    if below is not None and not -math.inf < value < below:
        return f"less than {below:g}"
    return None


def run(main: Callable[..., None] | dict[str, Callable[..., None]]) -> None:
    """Call `main` with the options of this process, and end the process with its exit code.

    A script with several commands gives a function for each by name; the first argument says which.
    """
    argv = sys.argv[1:]
    if sys.stderr is None:  # closed by the caller; progress and errors have nowhere to go, which stops nothing
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character: no reason to abort
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the command line: the tokenizer refuses what is no text
    debug = "--debug" in argv
    warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
    try:
        if sys.stdout is None:
            raise EnvironmentFailure("standard output is closed; there is nowhere to write to")
        if processes.world().size == 1:  # others have processes.when_terminated
            _clean_up_when_terminated()
        flags = [arg for arg in argv if arg != "--debug"]
        call_command(main, flags) if isinstance(main, dict) else call(main, flags)
        sys.stdout.flush()
        processes.leave()
        code = 0
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            raise
        code = _report(*explain(error))
    if code:
        processes.abandon(code)
    sys.exit(code)


def _clean_up_when_terminated() -> None:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, end the process by an exception, as Ctrl-C does.

    What is half written is removed on the way. Further signals change nothing meanwhile: `timeout` sends two. One that
    the caller ignores, as `nohup` does, stays ignored.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has one

    def leave(number: int, _: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)


def call_command(commands: dict[str, Callable[..., None]], argv: list[str]) -> None:
    """Call the command that the first argument names. Raises InputError where it names none."""
    script = os.path.basename(sys.argv[0])
    if argv and argv[0] in commands:
        call(commands[argv[0]], argv[1:], f"{script} {argv[0]}")
    elif argv and argv[0] in ("-h", "--help"):
        _show_help({name: _front(command)[0] for name, command in commands.items()}, script)
    else:
        raise InputError(f"expected a command: {', '.join(f'{script} {name}' for name in commands)}; see --help")


def call(main: Callable[..., None], argv: list[str], script: str | None = None) -> None:
    """Check and convert flags, then call. Raises InputError for an unknown flag, a missing or an impossible value."""
    script = script or os.path.basename(sys.argv[0])
    front, types_of = _front(main)
    if any(arg in ("-h", "--help") for arg in argv):
        _show_help(front, script)
        return
    parsers = {name: functools.partial(_convert, name, kind) for name, kind in types_of.items()}
    try:
        fire.Fire(fire.decorators.SetParseFns(**parsers)(front), command=_normalise(argv, types_of), name=script)
    except (InputError, EnvironmentFailure, NonFinite, Stopped) as error:
        any_name, long_name = "|".join(types_of), "|".join(name for name in types_of if "_" in name)
        parameter = rf"(?<![\w/.:'-])(?:(?:{any_name})(?==)|(?:{long_name or '(?!)'})(?![\w/.:'-]))"
        error.args = (re.sub(parameter, r"--\g<0>", str(error)), *error.args[1:])
        raise


def _front(main: Callable[..., None]) -> tuple[Callable[..., None], dict[str, type]]:
    """What fire calls: a function with a parameter for each option, and their types by name."""
    kind = typing.get_type_hints(main)["options"]
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    types_of = {field.name: _plain_type(hints[field.name]) for field in fields}

    def front(**typed: Any) -> None:
        options = kind.resolve(typed)
        if processes.world().size > 1:
            if not kind.ON_SEVERAL:
                raise InputError("this script runs in one process; start it with python, without torchrun")
            processes.start()
            processes.hush()
            line = "terminated; torchrun ends all processes when one has ended"
            processes.when_terminated(lambda: _report(line, 128 + signal.SIGTERM))
            processes.require_same("flags", repr(options).encode())
        main(options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(f.name, keyword, default=f.default, annotation=types_of[f.name]) for f in fields]
    front.__signature__ = inspect.Signature(parameters)
    front.__annotations__ = types_of
    lines = [f"    {field.name}: {field.metadata['help']}" for field in fields]
    front.__doc__ = "\n".join([inspect.getdoc(kind) or "", "", "Args:", *lines])
    return front, types_of


def _show_help(component: Any, script: str) -> None:
    """What fire writes for --help, but on stdout, where it can be searched, and without the line that says so."""
    with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.suppress(SystemExit):
        fire.Fire(component, command=["--help"], name=script)
    print(text.getvalue().partition("\n\n")[2] if text.getvalue().startswith("INFO:") else text.getvalue(), end="")


def explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an exception.

    A line may quote a file that somebody made: it stays one, of a length to read, and a terminal obeys nothing in it.
    """
    text, code = _reason(error)
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(text.split())
    )
    return (line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"), code


def _reason(error: Exception) -> tuple[str, int]:
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return str(error), code
    if processes.is_loss(error):
        return "another process of this run has ended", 3
    if isinstance(error, Stopped):
        return str(error), 128 + error.signal
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory; use a 16-bit --dtype, a smaller batch or a shorter sequence", 3
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}", 3
    return f"unexpected {type(error).__name__}: {error}; this is a bug, --debug shows where", 1


def _show_warning(usual: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    if category is Notice:
        print(f"warning: {message}", file=sys.stderr)
    else:
        usual(message, category, *place)


def _report(line: str, code: int) -> int:
    stream = sys.stderr if processes.world().is_first else sys.__stderr__  # hushed in all but the first

    def say() -> None:
        with contextlib.suppress(OSError):  # a log on a full disk: the code says it all the same
            print(f"error: {line}", file=stream or sys.__stderr__, flush=True)

    processes.say_once(say)
    return code


def _normalise(argv: list[str], types_of: dict[str, type]) -> list[str]:
    """Every flag as `--name=value`, each known and given once."""
    flags: dict[str, str] = {}
    rest = iter(argv)
    for arg in rest:
        if arg.strip("-") == "" or not arg.startswith("-"):
            raise InputError(f"unexpected argument {arg!r}; flags are written --name=value")
        name, equals, value = arg.removeprefix("-").removeprefix("-").partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--"):  # a letter that begins one flag only, as --help lists it
            matches = [flag for flag in types_of if flag[0] == name]
            name = matches[0] if len(matches) == 1 else name
        if name not in types_of:
            close = difflib.get_close_matches(name, types_of, n=1)
            typed = arg.partition("=")[0]
            raise InputError(f"unknown flag {typed}; {f'did you mean --{close[0]}?' if close else 'see --help'}")
        if name in flags:
            raise InputError(f"flag --{name} is given twice")
        if not equals:
            value = "True" if types_of[name] is bool else next(rest, None)
            if value is None or value.startswith("--"):
                raise InputError(f"flag --{name} needs a value; one that begins with -- is written --{name}=value")
        flags[name] = value
    return [f"--{name}={value}" for name, value in flags.items()]


def _plain_type(hint: Any) -> type:
    """bool, int, float or str of an annotation like `int | None`."""
    options = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    return options[0] if options else hint


def _convert(name: str, kind: type, text: str) -> Any:
    expected = {bool: "True or False", int: "an integer", float: "a number"}
    if name.endswith(("_dir", "results", "figures", "_prompt")):  # files: the shell expands ~ in `--out_dir ~/x` alone
        return os.path.expanduser(text)
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise InputError(f"--{name}={text}: expected {expected[kind]}") from None


def side_by_side(left: str, right: str) -> str:
    """Two texts in two columns."""
    columns = [
        [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMN) or [""]] for text in (left, right)
    ]
    return "\n".join(f"{a:<{COLUMN}} | {b}".rstrip() for a, b in itertools.zip_longest(*columns, fillvalue=""))
