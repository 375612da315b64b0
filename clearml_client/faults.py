"""What goes wrong, in one line, with its cure and without a secret; and a bound on what may never return."""

import json
import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Queue
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

Result = TypeVar("Result")
SECRET = re.compile("(?i)secret|password|token|account_key|credentials_json$")
ACCESS_KEY = re.compile("(?i)access_key|^key$")
SECRET_IN_TEXT = re.compile(
    r"""(?ix) ( (?: secret | password | token | account_key ) \w* ["']? \s* [:=] \s* ["']? ) [^\s"',}]+"""
)
hidden: dict[str, str] = {}  # what to put in place of each secret that is known


class RunError(Exception):
    """A failure that the user can mend: what failed and on what, the cure, and where the value at fault came from."""

    code = 1  # of the process that ends by it

    def __init__(self, what: str, cure: str = "", source: str = "") -> None:
        super().__init__(what)
        self.cure, self.source = cure, source

    def whole(self) -> str:
        """What failed, the cure and the origin, each once."""
        text = f"{self}; {self.cure}" if self.cure and self.cure not in str(self) else str(self)
        known = self.source in ("", "default") or os.path.expanduser(self.source) in text or self.source in text
        return text if known else f"{text} [{self.source}]"


class Trouble(NamedTuple):
    words: str
    signs: str  # a regular expression for the error's text; the first trouble that fits is the one
    cure: str


PLAIN_PORT, TLS_PORT = "TLS spoken to a plain port", "plain HTTP spoken to a TLS port"
DENIED = "access denied"
CA = (
    'name its authority in verify: "/path/ca.pem" (sdk.aws.s3.credentials), AWS_CA_BUNDLE, '
    "or api.verify_certificate for the server"
)
CHECKSUM = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: the store does not know boto3's newer uploads"
TROUBLES = [
    Trouble("name not resolved", "gaierror|NameResolution|getaddrinfo", "correct the host name, or mend DNS or VPN"),
    Trouble(PLAIN_PORT, "(?i)wrong.version.number|record layer failure", "use http:// (secure: false)"),
    Trouble("certificate file missing", "invalid path|SSL validation.*No such file|TLS CA certificate bundle", CA),
    Trouble("certificate not trusted", "(?i)certificate.verify.failed", CA),
    Trouble("unknown profile", "ProfileNotFound", "correct AWS_PROFILE, or add it to ~/.aws/credentials"),
    Trouble("expired key", "ExpiredToken|TokenRefreshRequired", "get new temporary keys, with their session token"),
    Trouble(
        "session token not accepted", "InvalidToken", "set AWS_SESSION_TOKEN to the token of these keys, or unset it"
    ),
    Trouble("no keys", "NoCredentials|Unable to locate credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    Trouble("unknown key", "InvalidAccessKeyId", "correct the access key: the store does not know it"),
    Trouble("signature mismatch", "SignatureDoesNotMatch", "correct the secret key: it is not the access key's"),
    Trouble(
        "wrong region",
        "AuthorizationHeaderMalformed|PermanentRedirect|InvalidRegion|IllegalLocationConstraint",
        "set AWS_DEFAULT_REGION (or region:) to the bucket's own",
    ),
    Trouble("no valid host name", "(?i)InvalidEndpoint|not a valid hostname|Invalid endpoint", "use a name without _"),
    Trouble("clock skew", "RequestTimeTooSkewed", "set this machine's clock (NTP)"),
    Trouble("no such bucket", "NoSuchBucket|bucket does not exist", "make the bucket, or correct its name in the URI"),
    Trouble("quota", "Quota|No space left|File too large|StorageFull|Insufficient", "free space, or raise the quota"),
    Trouble("too many requests", r"SlowDown|TooManyRequests|\b429\b", "try again later, or ask for a higher limit"),
    Trouble(
        "checksum not understood",
        r"MissingContentLength|ContentSHA256Mismatch|aws-chunked|(?i:trailer)|NotImplemented|\b501\b",
        CHECKSUM,
    ),
    Trouble(DENIED, r"[Dd]enied|Forbidden|\b403\b|Read-only|does not have", "permit read, write and delete there"),
    Trouble("a line break or blank in a key", "(?i)invalid header|Invalid leading whitespace", "enter the key again"),
    Trouble("time-out", "(?i)time-?out|timed out", "check host, port and firewall, and the server: nothing answers"),
    Trouble("refused", "(?i)refused", "start the server, or correct the port: nothing listens there"),
    Trouble("connection closed", "Disconnected|Connection.*closed|by peer|EOF", "check the port, and http or https"),
    Trouble(
        "store's own error, perhaps its disk or quota", r"InternalError|Unavailable|\b50[0-9]\b", "see the store's log"
    ),
    Trouble("unclear", "", "read the error; github.com/clearml/clearml/issues may know it"),
]


def diagnose(error: object) -> Trouble:
    """The trouble that this error, or one that caused it, is a sign of."""
    text = ""
    while error:
        text += f"{type(error).__name__}: {error}\n"
        error = getattr(error, "__cause__", None) or getattr(error, "__context__", None)
    return next(trouble for trouble in TROUBLES if re.search(trouble.signs, text))


def last4(key: str) -> str:
    return f"...{key[-4:]}" if len(key) > 12 else "..."


def conceal(name: str, value: Any) -> None:
    """Hide this value from now on, and everything secret in it, in each spelling that an error may have of it."""
    if isinstance(value, dict):
        for key, item in value.items():
            conceal(key, item)
    elif isinstance(value, list):
        for item in value:
            conceal(name, item)
    elif isinstance(value, str) and len(value) > 3 and (SECRET.search(name) or ACCESS_KEY.search(name)):
        shown = "***" if SECRET.search(name) else last4(value)
        for text in (value, value.strip()):
            for spelling in (text, repr(text)[1:-1], json.dumps(text)[1:-1], quote(text, safe="")):
                hidden[spelling] = shown


def hide(text: object) -> str:
    """Without secrets, whatever message they stand in; access keys by their end."""
    for name, value in os.environ.items():
        if re.match("AWS|AZURE|CLEARML|GOOGLE|TRAINS", name):
            conceal(name, value)
    shown = str(text)
    for secret in sorted(hidden, key=len, reverse=True):
        shown = shown.replace(secret, hidden[secret])
    return SECRET_IN_TEXT.sub(r"\1***", re.sub(r"://[^/\s]*@", "://***@", shown))


def line(text: object, most: int = 300) -> str:
    """On one line, without secrets, and not too long."""
    return " ".join(hide(text).split())[:most]


def print_any_letter(**more: Any) -> None:
    """What an output cannot encode is spelt out there. `more` goes to reconfigure(), too."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # of a notebook, or closed
            stream.reconfigure(errors="backslashreplace", **more)  # type: ignore[union-attr]


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def bounded(seconds: float, what: str, function: Callable[[], Result]) -> Result:
    """The function's result, or TimeoutError after so many seconds: not everything in the libraries has a time-out."""
    answers: Queue[tuple[Any, BaseException | None]] = Queue()

    def work() -> None:
        try:
            answers.put((function(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True, name="bounded").start()
    try:
        result, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"{what}: no answer for {seconds:g} s") from None
    if error:
        raise error
    return result  # type: ignore[no-any-return]
