"""One exception type for everything a user can cause or must know about; its code decides the process's exit code."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Exit codes of the process. `run_status.json` carries the same number, because launchers swallow it.
DONE, BUG, USAGE, DATA, MODEL, CHECKPOINT, STORAGE, NUMERICS, MEMORY, DISTRIBUTED = range(10)
STOPPED_SAVED, STOPPED_UNSAVED = 75, 76

_LONG_WORD = re.compile(r"(\S{60})\S{80,}(\S{20})")  # longer than a hash or a name, and than most paths
REDACTED = "[redacted]"
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # user:password of a URL
    re.compile(r"(?i)(?<=[?&])((?:access_|auth_|api_)?(?:token|key)|apikey|password|secret)=[^&\s'\"]+"),
    re.compile(r"(?i)\b(authorization|bearer)(\s*[:=]\s*|\s+)(bearer\s+)?[A-Za-z0-9._~+/-]{8,}=*"),
)


def redact(text: str) -> str:
    """`text` without tokens and passwords: what is fit for logs, dumps and error messages."""
    for pattern in _SECRETS:
        text = pattern.sub(REDACTED, text)
    return text


# What a failure of each kind leaves alone, where the place that raises it does not say it more exactly.
_SAFE = {
    USAGE: "nothing was started",
    DATA: "nothing was started",
    MODEL: "nothing was loaded",
    CHECKPOINT: "nothing was changed",
}
_SAFE |= dict.fromkeys((BUG, STORAGE, NUMERICS, MEMORY, DISTRIBUTED), "checkpoints are untouched")


def printable(text: str) -> str:
    """`text` as a terminal may show it: files can hold escape sequences, and half characters that no encoding has."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


class EngineError(Exception):
    """A failure with a one-line explanation: what happened, where, what is safe, what to do next.

    `code` is "E<exit code>.<detail>", for example "E3.2": the digits before the dot are the exit code, and a code has one
    meaning wherever it is raised. `safe` is known by the code unless it is given. A failure with several causes at once (a
    recipe with three wrong keys) lists them in `problems` and prints one line for each.
    `owner` is the rank that had it, once the ranks have exchanged it: that rank prints it.
    """

    owner: int | None = None

    def __init__(
        self,
        code: str,
        what: str,
        where: str = "",
        next: str = "",
        *,
        safe: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.code, self.what, self.where, self.next = code, what, where, next
        self.safe = _SAFE.get(self.exit_code, "") if safe is None else safe
        self.problems = tuple(problems)
        super().__init__(str(self))

    @property
    def exit_code(self) -> int:
        return int(self.code[1:].split(".")[0])

    def __str__(self) -> str:
        what = _LONG_WORD.sub(r"\1...\2", self.what)  # a value of 10,000 letters, quoted from somebody's file
        parts = " | ".join(part for part in (what, self.where, self.safe, self.next) if part)
        lines = [" ".join(redact(line).split()) for line in self.problems or (parts,)]
        return "\n".join(f"error {self.code}: {printable(line)}" for line in lines)

    def __reduce__(self):  # exceptions cross process boundaries in tests and in rank reports
        return _rebuilt, (type(self), self.code, self.what, self.where, self.next, self.safe, self.problems)


def _rebuilt(
    kind: type[EngineError], code: str, what: str, where: str, next: str, safe: str, problems: tuple
) -> EngineError:
    return kind(code, what, where, next, safe=safe, problems=problems)
