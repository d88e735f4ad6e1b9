"""A failure is a value: one shape from the syscall's neighbourhood to the Kubernetes event (docs/errors.md lists the codes)."""

from __future__ import annotations

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, ClassVar

EVIDENCE_LINES = 20
_registry: dict[str, type[Failure]] = {}


class Failure(Exception):
    """What a user meets; the same text in the runtime's log, the CRI status and the Kubernetes event.

    Subclasses set `code`, which is their name on the wire; a class whose code is taken cannot be defined.
    """

    code: ClassVar[str] = "Failure"  # stable: reason of the event, key on the wire

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = cls.__dict__.get("code", cls.__name__)
        if _registry.setdefault(cls.code, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"failure code {cls.code} is defined twice")
        _registry[cls.code] = cls

    def __init__(self, *, what: str, cause: str, evidence: Iterable[str] = (), remedy: str = "") -> None:
        super().__init__()
        self.what = what  # the act and its object, "start container web/0"; no function names
        self.cause = cause  # call, object, errno; or the key and value of a setting
        self.evidence = tuple(evidence)[-EVIDENCE_LINES:]  # oldest first: guest console, OOM record
        self.remedy = remedy  # one command or one edit; empty when none is known

    def __str__(self) -> str:
        return f"{self.what}: {self.cause}"

    def sentence(self) -> str:
        """What, cause and remedy in one line, for places that hold nothing else (gRPC details, events)."""
        return f"{self}. {self.remedy}" if self.remedy else str(self)


class Unsupported(Failure):
    """Asked for something nacre does not do; raised before the host is touched."""


class Invalid(Failure):
    """A document from outside breaks its standard; `cause` names the path of the element."""


class NotFound(Failure):
    """The object named in `what` does not exist."""


class AlreadyExists(Failure):
    """A name is taken; `cause` names the holder."""


class WrongStatus(Failure):
    """The act does not fit the object's status."""


def encode(failure: Failure) -> dict[str, Any]:
    """JSON-ready form, for pipes, frames, gRPC metadata and the recorder."""
    return {
        "code": failure.code,
        "what": failure.what,
        "cause": failure.cause,
        "evidence": list(failure.evidence),
        "remedy": failure.remedy,
    }


def decode(document: dict[str, Any]) -> Failure:
    """The failure that `encode` wrote; a code this process does not know stays readable as a plain Failure with that code."""
    code = str(document.get("code", Failure.code))
    failure = _registry.get(code, Failure)(
        what=str(document.get("what", "")),
        cause=str(document.get("cause", "")),
        evidence=tuple(str(line) for line in document.get("evidence", ())),
        remedy=str(document.get("remedy", "")),
    )
    if failure.code != code:
        failure.code = code  # type: ignore[misc]  # an instance's own value hides the class's
    return failure


def from_exception(what: str, error: BaseException) -> Failure:
    """`error` itself if it is a Failure, else a plain Failure naming what was being done and what the system said."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return Failure(what=what, cause=f"{getattr(error, 'call', 'system call')}{place}: {error.strerror} (errno {error.errno})")
    return Failure(what=what, cause=f"{type(error).__name__}: {error}")
