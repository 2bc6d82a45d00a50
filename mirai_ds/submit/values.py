"""What a value may be before it reaches a job script: the patterns of `#SBATCH` lines, and text without line breaks."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from mirai_ds.config.errors import ConfigError


def _matches(pattern: str, problem: str) -> AfterValidator:
    """A value on a `#SBATCH` line: the whole of it matches, or a `ConfigError` says how to write it."""

    def check(value: str, info: ValidationInfo) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ConfigError(str(info.field_name), value, problem)
        return value

    return AfterValidator(check)


def one_line(value: str, field: str) -> str:
    """`value` when it is text that can stand in one line of a script; raises ConfigError.

    Refused: control characters (line breaks, escape sequences), Unicode's line separators, bytes that are no UTF-8.
    """
    for character in value:
        if unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs"):
            raise ConfigError(field, value, f"holds the character U+{ord(character):04X}; remove it")
    return value


def _plain(value: str, info: ValidationInfo) -> str:
    return one_line(value, str(info.field_name))


def _log_folder(value: str, info: ValidationInfo) -> str:
    """Slurm replaces % and drops \\ in the path of a log."""
    for character in "%\\":
        if character in value:
            raise ConfigError(str(info.field_name), value, f"Slurm's log path cannot hold {character}; choose another")
    return value


Plain = Annotated[str, AfterValidator(_plain)]
RunFolder = Annotated[str, AfterValidator(_plain), AfterValidator(_log_folder)]
JobName = Annotated[
    str,
    _matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
             "may hold letters, digits, '.', '_' and '-', begins with one of the first two, 100 at most"),
]  # fmt: skip
SiteName = Annotated[str, _matches(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "may hold letters, digits, '.', '_' and '-'")]
SiteNames = Annotated[
    str, _matches(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(,[A-Za-z0-9_][A-Za-z0-9_.-]*)*", "give a name, or several with commas")
]
Constraint = Annotated[
    str, _matches(r"[A-Za-z0-9_(\[][A-Za-z0-9_.()\[\]&|*-]*", "write it as Slurm does, such as a100&nvlink")
]
Memory = Annotated[str, _matches(r"[1-9][0-9]*[KMGT]", "write it as 500G")]
Time = Annotated[
    str,
    _matches(r"([0-9]{1,3}-[0-9]{1,2}|[0-9]{1,4}):[0-5][0-9]:[0-5][0-9]",
             "write hours:minutes:seconds or days-hours:minutes:seconds (24:00 would be 24 minutes to Slurm)"),
]  # fmt: skip
_KIND = r"(after|afterany|afterok|afternotok|aftercorr)(:[0-9]+(_[0-9]+)?)+"
Dependency = Annotated[
    str,
    _matches(rf"({_KIND}|singleton)(,({_KIND}|singleton))*", "write it as afterok:JOB_ID, afterany:ID:ID or singleton"),
]
VariableName = Annotated[str, _matches(r"[A-Za-z_][A-Za-z0-9_]*", "is no name of a variable")]
Interface = Annotated[str, _matches(r"[A-Za-z0-9^=][A-Za-z0-9_.,:=-]*", "is no network interface, such as ib0")]


def seconds(time: Any) -> int:
    """Seconds of a checked `Time`."""
    days, _, clock = str(time).rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
