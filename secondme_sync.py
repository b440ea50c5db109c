"""Send pending SecondMe telemetry. One file, standard library, Python 3.6 or newer.

SecondMe skills log usage and feedback events on this machine, one JSON object a line.
If the user has agreed to it, this program sends the pending events to the SecondMe
backend, and records how far it got. Without consent, it sends nothing. What was logged
before the user agreed is sent, too, unless --skip-pending was run first.

Usage:
    secondme_sync.py                    send what is pending; print nothing
    secondme_sync.py --background       the same in a new process; return at once
    secondme_sync.py --dry-run [MODE]   print what would be sent; send nothing
    secondme_sync.py --status           print how things stand
    secondme_sync.py --pending          print yes if there is something to do, else no
    secondme_sync.py --skip-pending     mark what is logged as never to be sent
    secondme_sync.py --help             list these and the other flags

Exit code: 0, even if nothing could be sent; 2 for wrong flags; 1 if --skip-pending
failed, or if a run hung so badly that it had to be killed a second after --max-time.

Reads, all in ~/.secondme (or --dir):
    config                     the mode agreed to ("community", "anonymous" or "off"),
                               and perhaps the server
    credentials                the token; goes with each request, in every mode
    .device-id                 sent in community mode only
    analytics/usage.jsonl      a log; never changed
    analytics/feedback.jsonl   a log; never changed
    analytics/.sync-offsets    how much of each log is done
Writes analytics/.sync-offsets and nothing else.

Sends to https://app.mindos.com/gate/lab/api/secondme/telemetry/events/batch, or to the
server that config or --base-url names, by https, or by http to this machine. The fields
of an event that each mode sends are in ANONYMOUS_FIELDS and COMMUNITY_FIELDS below.
Anonymous means fewer fields and no device id. The token goes along all the same, so the
server can tell whose events they are.

Events go in the mode that is set when they are sent. There are two exceptions, which
.sync-offsets keeps in mind. Even in community mode, these go as anonymous:
    - events that were pending when a run in anonymous mode began
    - events in a log that seems to be replaced or edited, for they may be old ones

Environment: some variables can lower the mode or switch telemetry off; see
read_environment.
Proxies and certificates are used as Python's urllib uses them. But http to this
machine, and https://localhost, never use a proxy.

Words that this file uses:
    run      one execution of this program that is meant to send
    batch    up to 100 events, sent in one request
    mark     three numbers for each log:
             offset           everything before it is done
             anonymous_until  lines that begin before it go as anonymous, for one of the
                              two reasons above
             fingerprint      a checksum of the log's beginning, which tells whether the
                              log was replaced
    record   the 512 bytes of .sync-offsets, which hold a mark for each log
    Stop     the exception that ends a run early, with a reason

Modules for the network are imported by the functions that use them: most starts have
nothing to send, and should cost little.

The contract that comments below refer to is references/telemetry-sync.md of
mindverse/second-me-skills. It holds a script that did the same before this one did.
Comments call it the older script: it may be in use on the same machine.
"""
import os
import sys

if __name__ == "__main__":
    # Piped into "python3 -", a script imports modules from the working directory, which
    # sys.path calls "". That folder may be anybody's. os and sys may come before this,
    # for Python has loaded them already. (python3 -I guards against PYTHONPATH, too.)
    sys.path = [path for path in sys.path if path]

    # Ctrl-C ends the program at once and without a traceback. (If the parent process
    # ignores Ctrl-C, so does this one.) There is nothing to tidy up, even after a kill:
    # the next run goes on, and sends at most one batch again. After a power cut, the
    # next run may send again everything that the interrupted run had sent, for only the
    # first and the last record of a run are flushed to the disk.
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import errno
import io
import json
import time
import zlib
from collections import namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain

# Type checkers treat this name as True. To import typing would take 4 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from http.client import HTTPConnection, HTTPResponse
    from socket import socket
    from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Mapping
    from typing import Optional, TextIO, Tuple, TypeVar
    from urllib.parse import SplitResult

    T = TypeVar("T")

VERSION = "1.2.0"
BASE_URL = "https://app.mindos.com/gate/lab"
EVENTS_PATH = "/api/secondme/telemetry/events/batch"

BATCH_EVENTS = 100
# Bytes of log lines in a batch. A longer line goes alone.
BATCH_BYTES = 128 * 1024
# Longer lines are passed over.
MAX_LINE_BYTES = 1024 * 1024
# The most that is read of a file other than a log, or of a response.
MAX_SMALL_BYTES = 64 * 1024
# The size of one read of a file.
BUFFER_BYTES = 32 * 1024
# The beginning of a log, which tells whether it was replaced.
FINGERPRINT_BYTES = 256
# One disk sector.
RECORD_BYTES = 512

# The result of a run that is not finished. It is recorded before the first request, and
# stands if the run is cut short. The contract has no word for that, so the word for a
# network error means this, too: after both, the next run goes on.
UNFINISHED = "network_error"

# What --status adds to some results.
RESULT_HINTS = {
    "skipped": " (--skip-pending was used)",
    "auth_failed": " (the server does not accept the token: log in again)",
    "server_error": " (what the server did not accept stays pending)",
    UNFINISHED: (
        " (not finished, for one of these reasons: it is still at work; it ended early;"
        " config, token or device id changed; no usable answer came; the base URL is"
        " refused)"
    ),
}

RUN_SECONDS = 30  # see --max-time
MAX_RUN_SECONDS = 24 * 60 * 60
CONNECT_SECONDS = 3  # for each address
IDLE_SECONDS = 10  # without progress
MAX_DELAY_SECONDS = 10  # before a retry
# Seconds to wait before the one retry, by status. After 429, a valid Retry-After is
# used instead, up to MAX_DELAY_SECONDS.
RETRY_SECONDS = {429: 5, 502: 2, 503: 2, 504: 2}

# The fields of an event that are sent, by log. All others stay at home. The fields of
# anonymous mode are meant for categories and numbers, but values are not checked: they
# are sent as they were logged. Contract: Anonymous Mode Stripping.
COMMON_FIELDS = ("skill", "ts", "version", "os", "arch", "outcome", "phases_used")
ANONYMOUS_FIELDS = {
    "usage": COMMON_FIELDS + ("event", "duration_s", "error_class"),
    "feedback": COMMON_FIELDS + ("references_loaded", "rating", "issues"),
}  # type: Dict[str, Tuple[str, ...]]
COMMUNITY_FIELDS = {
    "usage": ANONYMOUS_FIELDS["usage"] + ("session", "user_intent", "error_message"),
    "feedback": ANONYMOUS_FIELDS["feedback"]
    + ("session", "user_intent", "actions_summary", "error_summary", "comment"),
}
FIELDS = {"anonymous": ANONYMOUS_FIELDS, "community": COMMUNITY_FIELDS}
# Sent for a field that is absent, as the older script does. A field that is null
# is left out.
DEFAULTS = {
    "skill": "secondme", "ts": "",
    "phases_used": [], "references_loaded": [], "issues": [],
}  # type: Dict[str, Any]
LOGS = ("usage", "feedback")  # analytics/<name>.jsonl

# A message of -v, --status, --dry-run and --skip-pending.
PASSED_OVER = "lines that hold no event and are ignored: {}"

# In words for people, the exceptions that end a request. They are given by name, so
# that socket and ssl need no import here. (Before Python 3.10, socket.timeout had a
# name of its own.)
FAILURES = {
    "ConnectionRefusedError": "the connection was refused",
    "timeout": "no progress for too long",
    "TimeoutError": "no progress for too long",
    "SSLError": "TLS failed",
    "BadStatusLine": "the answer is not HTTP",
}

# What a base URL must be; for re.VERBOSE, ignoring case. There is no place in it for a
# user and a password, which would stand before the host. "?" and "#" would count as
# part of the path, so parse_endpoint() looks for them.
URL_PATTERN = r"""
    (   https:// ( [a-z0-9._-]+ | \[[0-9a-f:.]+\] )  # any host
    |   http:// ( localhost | \[::1\] | 127 (\.BYTE){3} )  # this machine
    )
    ( :[0-9]+ )?  # a port
    ( /[!-~]* )?  # a path of printable ASCII
""".replace("BYTE", "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])")

DECODER = json.JSONDecoder()
ENCODER = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
)


class Stop(Exception):
    """Ends a run early. The message is for people and never holds the token."""


# Small files and JSON. What is broken or of another type counts as missing. (Only a
# baseUrl of another type does not: it ends the run.)


def open_regular(path: str) -> "BinaryIO":
    """Open a file to read; raise OSError if there is none, or no regular one."""
    # To open a FIFO would block.
    if os.path.exists(path) and not os.path.isfile(path):
        # Callers show strerror, which OSError(text) alone would not have. No error
        # number fits, hence 0.
        raise OSError(0, "not a regular file")
    return open(path, "rb", BUFFER_BYTES)


def read_small(path: str) -> bytes:
    """Return the first 64 KiB of a file, b"" if it cannot be read."""
    with suppress(OSError), open_regular(path) as file:
        return file.read(MAX_SMALL_BYTES)
    return b""


def find_problem(path: str) -> str:
    """Say that a file cannot be read, and why; "" if it can be, or does not exist."""
    try:
        with open_regular(path) as file:
            # Some files can be opened, but not be read.
            file.read(1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return ""


def decode(data: bytes, errors: str = "strict") -> str:
    """Return the text in UTF-8 data, "" if the data is not UTF-8.

    Blanks, a byte order mark, and the NULs that a power cut may leave are stripped. If
    errors is "replace", U+FFFD stands for what is not UTF-8.
    """
    try:
        return data.decode("utf-8", errors).strip("\ufeff\0 \t\r\n")
    except UnicodeDecodeError:
        return ""


def parse_object(text: str) -> "Optional[Dict[str, Any]]":
    """Return the JSON object that a text consists of, None if it is anything else."""
    try:
        # As json.loads() does, but in half the time. The text must be stripped.
        value, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and end == len(text) else None


def get(container: "Mapping[str, Any]", key: str, default: "T") -> "T":
    """Return the value under a key; default if it is missing or of another type."""
    value = container.get(key)
    # The type of default is the type asked for. isinstance would take True for a
    # number.
    return value if type(value) is type(default) else default


def get_count(container: "Mapping[str, Any]", key: str) -> int:
    """Return the whole number of at most 63 bits under a key, 0 if there is none.

    More bits could be neither the offset of a file nor a checksum.
    """
    value = get(container, key, 0)
    return value if 0 <= value < 1 << 63 else 0


# Gate: consent, token, endpoint. Contract: Prerequisites.

# mode: "community", "anonymous" or "off". reason: in words, what decided that.
Consent = namedtuple("Consent", "mode reason")
# What a run was begun with, and must not change: the content of config, the token, the
# device id.
Agreement = namedtuple("Agreement", "config token device_id")


def read_environment() -> "Dict[str, str]":
    """Return the variables that can lower the mode, "" for one that is not set.

    SM_TEL names a mode. Each of the others switches telemetry off, unless it is empty,
    "0" or "false". This file reads no other variable but HOME. (Python and OpenSSL read
    some, for the home directory, proxies and certificates.)
    """
    nonessential = os.environ.get("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "")
    return {
        "SM_TEL": os.environ.get("SM_TEL", ""),
        "DO_NOT_TRACK": os.environ.get("DO_NOT_TRACK", ""),
        "DISABLE_TELEMETRY": os.environ.get("DISABLE_TELEMETRY", ""),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": nonessential,
    }


def decide_consent(config: bytes, environment: "Mapping[str, str]") -> Consent:
    """Return the mode, "community", "anonymous" or "off", and what decided it.

    config is the content of the file. The environment (see read_environment) can only
    lower what it allows.
    """
    if not config:
        return Consent("off", "config is missing or empty")
    settings = parse_object(decode(config))
    if settings is None:
        return Consent("off", "config is not a valid JSON object")
    if "telemetry" not in settings:
        return Consent("off", "config names no mode")
    mode = settings["telemetry"]
    reason = "config says " + json.dumps(mode)
    if mode == "off":
        return Consent("off", reason)
    if mode not in ("anonymous", "community"):
        return Consent("off", reason + ", which is no mode")

    for name, value in environment.items():
        if name != "SM_TEL" and value not in ("", "0", "false"):
            return Consent("off", f"{name} is {json.dumps(value)}; {reason}")
    limit = environment.get("SM_TEL", "")
    if limit not in ("", "anonymous", "community"):
        words = "" if limit == "off" else ", which is no mode"
        return Consent("off", f"SM_TEL is {json.dumps(limit)}{words}; {reason}")
    if limit == "anonymous" and mode == "community":
        return Consent("anonymous", 'SM_TEL is "anonymous"; ' + reason)
    return Consent(mode, reason)


def read_token(directory: str) -> str:
    """Return the token in credentials, "" unless there is one that fits a header."""
    credentials = decode(read_small(os.path.join(directory, "credentials")))
    token = get(parse_object(credentials) or {}, "accessToken", "")
    return token if all("!" <= char <= "~" for char in token) else ""


def find_login_problem(directory: str) -> str:
    """Say why there is no token to send; "" if there is one."""
    if read_token(directory):
        return ""
    path = os.path.join(directory, "credentials")
    problem = find_problem(path)
    if problem:
        return problem
    if not os.path.exists(path):
        return path + " does not exist"
    if parse_object(decode(read_small(path))) is None:
        return path + " is not a valid JSON object"
    return path + " holds no accessToken, or one with blanks or characters beyond ASCII"


def read_device_id(directory: str, mode: str) -> str:
    """Return the device id to send in a mode, "" for none. Only community has one."""
    if mode != "community":
        return ""
    device_id = decode(read_small(os.path.join(directory, ".device-id")))
    return device_id if device_id.isprintable() else ""


def parse_endpoint(base_url: object, origin: str) -> "SplitResult":
    """Return the split URL to post to; raise Stop if base_url must not be contacted.

    origin: in words, where base_url comes from.
    """
    import re
    import urllib.parse

    flags = re.ASCII | re.IGNORECASE | re.VERBOSE
    text = base_url if isinstance(base_url, str) else ""
    if re.fullmatch(URL_PATTERN, text, flags) and "?" not in text and "#" not in text:
        # For some hosts and ports that match the pattern but are invalid, urlsplit() or
        # port raises ValueError.
        with suppress(ValueError):
            url = urllib.parse.urlsplit(text.rstrip("/") + EVENTS_PATH)
            if url.port != 0:  # None means the usual port
                return url
    # What stands before an "@" may be a password, and must not be shown.
    shown = json.dumps(base_url)
    if "@" in shown:
        scheme = "https://" if shown.startswith('"https://') else ""
        shown = f'"{scheme}(hidden)@' + shown.rpartition("@")[2]
    raise Stop(
        f"{origin} is refused: {shown[:200]}; it must be https://HOST, or http:// with "
        "localhost, 127.x.x.x or [::1]; a port must be valid; it must have no user, "
        'blanks, "?", "#" and no characters beyond ASCII'
    )


class Run:
    """One execution of this program: where it works, what is agreed to, its time.

    Actions that send nothing have one, too.

    directory  the state directory, an absolute path
    analytics  the directory of the logs and of .sync-offsets
    config     the content of config, on which consent was decided
    settings   the JSON object in it; empty if there is none
    mode       "community", "anonymous" or "off"
    reason     in words, what decided the mode
    base_url   the server, unless config names one
    max_time   seconds that the run may take
    deadline   when max_time is over, by the clock
    say        takes a message for people, which -v prints
    """

    def __init__(
        self,
        directory: str,
        environment: "Mapping[str, str]",
        base_url: str = BASE_URL,
        max_time: float = RUN_SECONDS,
        say: "Callable[[str], None]" = lambda message: None,
        clock: "Callable[[], float]" = time.monotonic,
        sleep: "Callable[[float], None]" = time.sleep,
    ) -> None:
        self.directory = directory
        self.analytics = os.path.join(directory, "analytics")
        config_path = os.path.join(directory, "config")
        self.config = read_small(config_path)
        self.settings = parse_object(decode(self.config)) or {}
        self.mode, self.reason = decide_consent(self.config, environment)
        if not self.config:
            problem = find_problem(config_path)
            self.reason = problem or config_path + " is missing or empty"
        self.base_url = base_url
        self.max_time = max_time
        self.say = say
        self.clock = clock
        self.sleep = sleep
        self.deadline = clock() + max_time

    def has_time(self, delay: float = 0) -> bool:
        """Tell whether another request may begin after a delay.

        None may begin in the last third of a run. This leaves 10 of the usual 30
        seconds to a request that has begun: if the end of the run cut it short, the
        next run would have to send it again. (exchange_once() does not ask before the
        first request of a run.)
        """
        return self.deadline - self.clock() - delay >= self.max_time / 3

    def log_path(self, name: str) -> str:
        return os.path.join(self.analytics, name + ".jsonl")

    def find_log_problem(self) -> str:
        """Say that a log cannot be read, and why; "" if all can be, or do not exist."""
        for name in LOGS:
            problem = find_problem(self.log_path(name))
            if problem:
                return problem
        return ""

    def read_agreement(self) -> Agreement:
        """Return what must not change during a run, as it is now."""
        return Agreement(
            read_small(os.path.join(self.directory, "config")),
            read_token(self.directory),
            read_device_id(self.directory, self.mode),
        )

    def endpoint(self) -> "SplitResult":
        """Return the split URL to post to; raise Stop if it must not be contacted.

        Unlike usual, config comes before the flag: the user writes config, and a skill
        passes the flag. A baseUrl that is no text, such as null, does not count as
        missing; it is refused.
        """
        base_url = self.settings.get("baseUrl", self.base_url)
        return parse_endpoint(base_url, self.endpoint_origin())

    def endpoint_origin(self) -> str:
        """Say where the base URL comes from."""
        if "baseUrl" in self.settings:
            return "baseUrl in config"
        if self.base_url == BASE_URL:
            return "built in; a skill may pass another"
        return "--base-url"


# State: the record in .sync-offsets. Contract: Error Handling (Offsets), Rules.

# How much of a log is done. Lines that begin before anonymous_until are only ever sent
# as anonymous. fingerprint: a checksum of the log's beginning, None if not recorded.
Mark = namedtuple("Mark", "offset anonymous_until fingerprint")


@contextmanager
def stop_on_error(path: str) -> "Iterator[None]":
    """Turn an OSError about .sync-offsets into a Stop.

    What cannot be recorded must not be sent.
    """
    try:
        yield
    except OSError as error:
        raise Stop(
            f"progress cannot be recorded in {path}: {error.strerror}"
        ) from None


def write_all(file: "BinaryIO", data: bytes) -> None:
    """Write data to an unbuffered file; raise OSError if not all of it is taken."""
    if file.write(data) != len(data):
        raise OSError(0, "only a part could be written")


def flush_file(file: "BinaryIO") -> None:
    """Flush a file to the disk (fsync), where the file system knows how."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


class State:
    """What .sync-offsets holds: the record, one JSON object padded to 512 bytes.

        {"usage_bytes": 0, "feedback_bytes": 0,
         "last_sync_ts": "2026-11-22T19:00:47Z", "last_sync_result": "server_error",
         "resume": {
            "usage": {"bytes": 48211, "fingerprint": 1234567, "anonymous": 0},
            "feedback": {"bytes": 0, "fingerprint": 0, "anonymous": 0}}}

    marks      what resume holds, by log. A run starts there. Marks move with every
               batch that is done.
    completed  usage_bytes and feedback_bytes, by log. They are for the older script.
               Only if resume holds no mark for a log, one is made from them. As the
               contract has it, they move only when a run has sent everything (or
               skipped it).

    The record is overwritten in place, by one write. In practice, a disk writes a
    sector whole or not at all, and a kill does not split so small a write. So a kill or
    a power cut leaves the old record or the new one. There are no temporary files.
    """

    def __init__(self, file: "BinaryIO", path: str) -> None:
        self.file = file
        self.path = path
        data = file.read(MAX_SMALL_BYTES)
        # If the first 512 bytes are JSON, they are the record. It is ours, or a short
        # one of the older script. What follows is the rest of a longer file, if a kill
        # came before write() could cut that off. If they are not JSON, try all of the
        # file: it is another program's.
        record = parse_object(decode(data[:RECORD_BYTES]))
        saved = record or parse_object(decode(data)) or {}
        # A broken file counts as empty, but --status names it. A blank one is empty.
        self.is_broken = not saved and decode(data, "replace") != ""
        self.timestamp = get(saved, "last_sync_ts", "")
        self.result = get(saved, "last_sync_result", "")
        self.completed = {name: get_count(saved, name + "_bytes") for name in LOGS}
        self.marks = {}
        resume = get(saved, "resume", {})  # type: Dict[str, Any]
        for name in LOGS:
            mark = get(resume, name, {})  # type: Dict[str, Any]
            if type(mark.get("fingerprint")) is int:
                self.marks[name] = Mark(
                    get_count(mark, "bytes"),
                    get_count(mark, "anonymous"),
                    get_count(mark, "fingerprint"),
                )
            else:
                # There is no record yet, or it is the older script's. Or no run has
                # opened this log so far, and save() wrote null for its fingerprint. In
                # each case, completed is all that is known.
                self.marks[name] = Mark(self.completed[name], 0, None)

    def check(self) -> None:
        """Raise Stop if .sync-offsets cannot be read."""
        problem = find_problem(self.path)
        if problem:
            raise Stop(problem)

    def save(self, logs: "List[Log]", result: str, flush: bool) -> None:
        """Record how much of the logs is done, and a result.

        Only for a State of lock_state(); that of read_state() is a copy. With flush,
        the record outlasts a power cut. Raise Stop if it cannot be written.
        """
        for log in logs:
            self.marks[log.name] = log.mark()
            # After these two results, no event in these logs is pending.
            if result in ("ok", "skipped"):
                self.completed[log.name] = log.offset
        record = {name + "_bytes": self.completed[name] for name in LOGS}  # type: Any
        record["last_sync_ts"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record["last_sync_result"] = result
        record["resume"] = {
            name: {
                "bytes": mark.offset,
                "fingerprint": mark.fingerprint,
                "anonymous": mark.anonymous_until,
            }
            for name, mark in self.marks.items()
        }
        with stop_on_error(self.path):
            self.write(json.dumps(record).encode("ascii"), flush)

    def write(self, record: bytes, flush: bool) -> None:
        if len(record) >= RECORD_BYTES:
            # It never is with two logs, for numbers have 19 digits at most.
            raise OSError(0, "the record is longer than 512 bytes")
        self.file.seek(0)
        write_all(self.file, record.ljust(RECORD_BYTES - 1) + b"\n")
        if flush:
            flush_file(self.file)
        # Cut off the rest of a longer file, of another program, now that our record is
        # on the disk. (Without flush, there is no rest: sync() and skip_pending() flush
        # their first save.)
        self.file.truncate(RECORD_BYTES)


def read_state(folder: str) -> State:
    """Return the State to look at, not to save."""
    path = os.path.join(folder, ".sync-offsets")
    return State(io.BytesIO(read_small(path)), path)


@contextmanager
def lock_state(folder: str) -> "Iterator[State]":
    """Open .sync-offsets and lock it; raise Stop if another run has locked it."""
    path = os.path.join(folder, ".sync-offsets")
    with stop_on_error(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    # Unbuffered, so that a full disk shows when it is written, not in close().
    with open(descriptor, "r+b", buffering=0) as file:
        with stop_on_error(path):
            lock_file(file)
            prepare_file(file, folder)
            state = State(file, path)
        # Outside of stop_on_error: an error of the caller is not about this file.
        yield state


def lock_file(file: "BinaryIO") -> None:
    """Lock a file until it is closed; raise Stop if another process has locked it.

    Some network drives have no locks. There, go on without a lock. On Windows, the two
    cases cannot be told apart, so raise Stop in both.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            # One byte, far from those that other programs read. It need not exist.
            file.seek(1 << 30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_locked = error.errno in (errno.EAGAIN, errno.EACCES)
        if is_locked or sys.platform == "win32":
            raise Stop("another run is at work") from None


def prepare_file(file: "BinaryIO", folder: str) -> None:
    """Prepare .sync-offsets for the first write, and go to its beginning."""
    size = file.seek(0, os.SEEK_END)
    if 0 < size < RECORD_BYTES:
        # A power cut may keep the bytes of a write and lose the new length of the file.
        # Our record would be cut off at the length of the old, short one. So lengthen
        # the file first, with blanks: JSON ignores them, and whatever a power cut does
        # to them, the old record stays whole. (An empty file has no old record.)
        write_all(file, b" " * (RECORD_BYTES - size))
        flush_file(file)
    if size == 0:
        # A new file survives a power cut only if its folder is flushed, too. Some
        # systems cannot open a folder.
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    file.seek(0)


# Read: the logs, line by line.

# A line of a log. begin, end: the offsets of its first byte and of the byte after it.
# mode: what it is sent as. event: the JSON object that it holds, or None. is_blank: it
# is empty, and not to be counted as passed over.
Line = namedtuple("Line", "log begin end mode event is_blank")


class Log:
    """A log as it was when it was opened. Later lines are left to the next run.

    Only one iterator of lines() may be in use at a time, for they share the position in
    the file. (Each call of read_batch() makes a new one and drops it.)

    mode             the mode to send in, "community" or "anonymous"
    size             bytes of the log when it was opened
    head             its first 256 bytes, or fewer if it is shorter
    offset           everything before it is done
    anonymous_until  lines that begin before it are only ever sent as anonymous
    """

    def __init__(self, name: str, file: "BinaryIO", mark: Mark, mode: str) -> None:
        self.name = name
        self.mode = mode
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.head = file.read(FINGERPRINT_BYTES)
        if self.fits(mark):
            # The beginning fits, but the end may have been cut off. Then all that is
            # left is done.
            self.offset = min(mark.offset, self.size)
            self.anonymous_until = min(mark.anonymous_until, self.size)
        else:
            # The log was replaced, or its beginning was edited or cut off. So it is
            # read from its beginning. Some of its lines may have been skipped or sent
            # as anonymous before. Nobody can tell which, so all that it holds now is
            # sent as anonymous.
            self.offset = 0
            self.anonymous_until = self.size
        if mode == "anonymous":
            # Once this is saved, what is pending now stays anonymous, even if this run
            # cannot send it and the user agrees to community mode before the next.
            self.anonymous_until = self.size

    def fits(self, mark: Mark) -> bool:
        """Tell whether a mark was saved for this log, as far as that can be known."""
        if mark.fingerprint is None:
            # No checksum: the mark is the older script's, or there was none. Then the
            # only sign of another log is that it is shorter than the offset. (bool() is
            # for type checkers, to whom fields of a namedtuple are Any.)
            return bool(mark.offset <= self.size)
        checksum = self.checksum(mark.offset, mark.anonymous_until)
        return bool(mark.fingerprint == checksum)

    def checksum(self, offset: int, anonymous_until: int) -> int:
        """Return the checksum for a mark with these two offsets.

        It is that of the first 256 bytes of the log at most, and only of those before
        the larger offset. They were there when the mark was saved, so the checksum of a
        log that has grown is the same, and that of another log differs. If both offsets
        are 0, it is the checksum of nothing, which fits any log.
        """
        return zlib.crc32(self.head[: max(offset, anonymous_until)])

    def mark(self) -> Mark:
        """Return how much of this log is done, to be saved."""
        checksum = self.checksum(self.offset, self.anonymous_until)
        return Mark(self.offset, self.anonymous_until, checksum)

    def read_line(self, limit: int) -> bytes:
        """Return the next line, b"" at the end of the log.

        limit: how many bytes of the log are left.
        A line longer than 1 MiB comes in pieces, one a call. The last of them ends with
        a newline, unless the line is unfinished.
        """
        try:
            # One byte more, for the newline: a line of 1 MiB and its newline fit.
            return self.file.readline(min(MAX_LINE_BYTES + 1, limit))
        except OSError as error:
            raise Stop(f"{self.name}.jsonl cannot be read ({error.strerror})") from None

    def skip_rest(self, end: int) -> "Optional[int]":
        """Read the rest of a line and return its end, None if it is unfinished."""
        while True:
            data = self.read_line(self.size - end)
            if not data:
                return None
            end += len(data)
            if data.endswith(b"\n"):
                return end

    def lines(self, offset: int) -> "Iterator[Line]":
        """Yield the lines from an offset on; event is None if a line holds none.

        The last line needs no newline if it is a whole JSON object of at most 1 MiB.
        Otherwise it is unfinished, and left to the next run.
        """
        end = self.file.seek(offset)
        while end < self.size:
            begin = end
            data = self.read_line(self.size - begin)
            end = begin + len(data)
            has_newline = data.endswith(b"\n")
            event = None  # type: Optional[Dict[str, Any]]
            is_blank = False
            if len(data) > MAX_LINE_BYTES and not has_newline:
                # The line is longer than 1 MiB, and this is its first piece.
                line_end = self.skip_rest(end)
                if line_end is None:
                    return
                end = line_end
            else:
                text = decode(data, errors="replace")
                event = parse_object(text)
                if event is None and not has_newline:
                    # It is unfinished. (Or empty: the log was cut off meanwhile.)
                    return
                is_blank = not text
            # THE decision on privacy: the mode that a line is sent in.
            mode = "anonymous" if begin < self.anonymous_until else self.mode
            yield Line(self, begin, end, mode, event, is_blank)


@contextmanager
def open_logs(run: Run, state: State, mode: str) -> "Iterator[List[Log]]":
    """Open the logs that can be read, each to go on where its mark says.

    mode is that of the run. (Actions that send nothing may choose another.)
    """
    with ExitStack() as stack:
        logs = []
        for name in LOGS:
            # A log that cannot be read is left out, and its mark stays. Callers say so,
            # by find_problem() or find_log_problem().
            with suppress(OSError):
                file = stack.enter_context(open_regular(run.log_path(name)))
                logs.append(Log(name, file, state.marks[name], mode))
        yield logs


def flush_logs(logs: "List[Log]") -> None:
    """Get the logs to the disk; to be called before anything is recorded.

    Otherwise, a power cut might keep a record and lose the lines that it calls done.
    For example, if 500 bytes are done, the log has 300 afterwards, and 200 more are
    logged before the next run, these 200 would count as done.
    """
    for log in logs:
        # Windows flushes only files that are open for writing, which these are not.
        with suppress(OSError):
            os.fsync(log.file.fileno())


# Shape: from lines to the body of a request. Contract: Sync Implementation, Anonymous
# Mode Stripping.

# lines: up to 100 Lines with events, all of one mode; none, if the batch covers only
# lines without an event that can be sent.
# body: what is posted; empty if there are no lines.
# ends: by Log, the offset after the batch. (split_batch() may leave out a Log, which
# then keeps its offset.)
# passed_over: how many lines hold no event that can be sent, blank ones aside.
Batch = namedtuple("Batch", "lines body ends passed_over")


def shape_event(
    mode: str, log_name: str, event: "Mapping[str, Any]"
) -> "Dict[str, Any]":
    """Return what is sent of an event: its type and the fields that a mode allows.

    Fields that are null are left out.
    """
    payload = {"type": log_name}  # type: Dict[str, Any]
    for field in FIELDS[mode][log_name]:
        value = event.get(field, DEFAULTS.get(field))
        if value is not None:
            payload[field] = value
    return payload


def encode_body(lines: "List[Line]", device_id: str) -> bytes:
    """Return the body for lines of one mode, b"" for no lines.

    The body is strict JSON in UTF-8, with "?" for a lone surrogate. If an event cannot
    be written so, raise ValueError (NaN, infinity) or RecursionError (deep nesting).
    """
    if not lines:
        return b""
    mode = lines[0].mode
    events = [shape_event(mode, line.log.name, line.event) for line in lines]
    body = {"telemetryMode": mode, "events": events}
    if mode == "community" and device_id:
        body["deviceId"] = device_id
    return ENCODER.encode(body).encode("utf-8", "replace")


def is_encodable(line: Line) -> bool:
    """Tell whether the event of a line can be sent."""
    try:
        encode_body([line], "")
        return True
    except (ValueError, RecursionError):
        return False


def encode_batch(batch: Batch, device_id: str) -> Batch:
    """Return a batch with its body, and without the events that cannot be encoded."""
    try:
        return batch._replace(body=encode_body(batch.lines, device_id))
    except (ValueError, RecursionError):
        # This is rare. Find the events that are at fault, one by one.
        lines = [line for line in batch.lines if is_encodable(line)]
        passed_over = batch.passed_over + len(batch.lines) - len(lines)
        # This cannot fail: each of the lines has just been tried, and with less of the
        # stack left.
        return Batch(lines, encode_body(lines, device_id), batch.ends, passed_over)


def read_batch(starts: "Dict[Log, int]", device_id: str) -> "Optional[Batch]":
    """Return the next batch, None if nothing follows.

    starts: by Log, the offset to begin at. One log is read after the other. A batch
    ends before a line that makes it too large, or an event that is one too many or of
    another mode. It also covers lines without an event, and may cover only such lines.
    """
    lines = []  # type: List[Line]
    ends = dict(starts)
    taken_bytes = 0
    passed_over = 0
    all_lines = (log.lines(offset) for log, offset in starts.items())
    for line in chain.from_iterable(all_lines):
        line_size = line.end - line.begin
        # The first line is taken even if it is larger.
        if taken_bytes and taken_bytes + line_size > BATCH_BYTES:
            break
        if line.event is not None:
            if len(lines) == BATCH_EVENTS or (lines and line.mode != lines[0].mode):
                break
            lines.append(line)
        elif not line.is_blank:
            passed_over += 1
        taken_bytes += line_size
        ends[line.log] = line.end
    if ends == starts:
        return None
    return encode_batch(Batch(lines, b"", ends, passed_over), device_id)


def read_batches(logs: "List[Log]", device_id: str) -> "Iterator[Batch]":
    """Yield one batch after the other, each as read_batch() returns it."""
    starts = {log: log.offset for log in logs}
    while True:
        batch = read_batch(starts, device_id)
        if batch is None:
            return
        yield batch
        starts = batch.ends


def split_batch(batch: Batch, device_id: str) -> "List[Batch]":
    """Return the two halves of a batch with at least two events."""
    middle = len(batch.lines) // 2
    first = batch.lines[:middle]
    second = batch.lines[middle:]
    # The first half moves each log to the end of its last event there. (In ends, later
    # lines overwrite earlier ones.) The second half moves the logs as the whole batch
    # would, and so covers lines without an event, too. For example, of three events u1
    # and u2 in usage and f1 in feedback, the first half moves usage behind u1.
    ends = {line.log: line.end for line in first}
    return [
        batch._replace(lines=first, body=encode_body(first, device_id), ends=ends),
        batch._replace(lines=second, body=encode_body(second, device_id)),
    ]


# Send: one connection at a time, one retry for some statuses. Contract: Error Handling.

# result: "ok", "auth_failed", "server_error" or "network_error", as it is recorded; or
# "refused" if the server refuses the body, which Delivery deals with.
# words: what happened.
Outcome = namedtuple("Outcome", "result words")
# retry_after: the header, or None.
Response = namedtuple("Response", "status retry_after outcome")
# address: host and port. authorization: the header Proxy-Authorization, or None.
Proxy = namedtuple("Proxy", "address authorization")


def classify(status: int, answer: "Optional[Dict[str, Any]]") -> Outcome:
    """Return what a status means.

    answer: the JSON object that came with a 2xx, or None. Success is a code of 0 in it.
    """
    if status == 401:
        return Outcome("auth_failed", "the token is not accepted")
    if status in (400, 413, 422):
        return Outcome("refused", "the server refuses this body")
    if 300 <= status < 400:
        return Outcome("server_error", "a redirect, which is not followed")
    if not 200 <= status < 300:
        return Outcome("server_error", "not accepted")
    if answer is None:
        # Most likely, this is not from our server, but the login page of a public
        # network.
        return Outcome("network_error", "not a complete JSON object of 64 KiB at most")
    code = answer.get("code")
    if type(code) is not int:
        return Outcome("server_error", "the answer has no whole number as code")
    return Outcome("server_error" if code else "ok", f"code {code}")


def parse_retry_after(text: str, now: float) -> "Optional[float]":
    """Return the seconds that a Retry-After asks for, None if it cannot be read.

    It is a number of seconds, or a date. now is in seconds since 1970.
    """
    import email.utils

    with suppress(ValueError):
        return int(text)
    # The parser raises errors of many kinds for bad dates, even UnboundLocalError.
    with suppress(Exception):
        date = email.utils.parsedate_tz(text)
        return email.utils.mktime_tz(date) - now if date else None
    return None


def retry_delay(response: Response, now: float) -> "Optional[float]":
    """Return the seconds to wait before the one retry, None for no retry."""
    delay = RETRY_SECONDS.get(response.status)
    if response.status != 429:
        return delay
    asked = parse_retry_after(response.retry_after or "", now)
    return delay if asked is None else min(max(asked, 0), MAX_DELAY_SECONDS)


def connect(address: "Tuple[str, int]", *_: object) -> "socket":
    """Return a TCP connection; raise Stop if the host is not found.

    http.client calls this as its create_connection(). It passes a time limit and a
    source address, too, which are not used.
    """
    import socket

    host, port = address
    if host.lower() == "localhost":
        # A name server or hosts file could send this name (of a server or a proxy) to
        # another machine.
        host = "127.0.0.1"
    try:
        sock = socket.create_connection((host, port), CONNECT_SECONDS)
    except socket.gaierror:
        raise Stop(f"network_error: the host {host} was not found") from None
    sock.settimeout(IDLE_SECONDS)
    return sock


def find_proxy(url: "SplitResult") -> "Optional[Proxy]":
    """Return the Proxy for a URL, None if there is none.

    Proxies are those of the environment and the system, as urllib understands them.
    no_proxy, the list of hosts that need none, is obeyed in the same way.
    """
    if url.scheme == "http" or url.hostname == "localhost":
        # This machine. To a proxy, localhost would be the proxy's own machine.
        return None
    import base64
    import urllib.parse
    import urllib.request

    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(url.netloc):
        return None
    if "://" not in proxy and not proxy.startswith("//"):
        # It is only a host and a port.
        proxy = "//" + proxy
    parts = urllib.parse.urlsplit(proxy)
    if not parts.hostname:
        # http.client would connect to this machine. (Sender makes this a Stop.)
        raise ValueError("a proxy without a host")
    login = None
    if parts.username and parts.password:
        words = parts.username + ":" + parts.password
        code = base64.b64encode(urllib.parse.unquote_to_bytes(words))
        login = "Basic " + code.decode("ascii")
    return Proxy(parts.netloc.rpartition("@")[2], login)


def make_connection(url: "SplitResult", proxy: "Optional[Proxy]") -> "HTTPConnection":
    """Return a connection that is not open yet, with TLS unless the URL is plain http.

    http.client verifies the server's certificate and name. With a proxy, TLS runs from
    here to the server through a CONNECT tunnel: the proxy sees neither token nor body.
    """
    import http.client

    if url.scheme == "http":
        connection = http.client.HTTPConnection(url.netloc)
    elif proxy is None:
        connection = http.client.HTTPSConnection(url.netloc)
    else:
        connection = http.client.HTTPSConnection(proxy.address)
        headers = {}
        if proxy.authorization:
            headers["Proxy-Authorization"] = proxy.authorization
        connection.set_tunnel(url.hostname or "", url.port or 443, headers)
    # http.client has one time limit for everything. connect() sets one for connecting
    # and another for each step after that, and knows where localhost is.
    connection._create_connection = connect  # type: ignore[attr-defined]
    return connection


def explain_failure(error: Exception) -> str:
    """Return why there was no answer. The error's own text may hold the token."""
    import re

    # A proxy's refusal is in the text of an OSError and nowhere else.
    refusal = re.match(r"Tunnel connection failed: (\d\d\d)", str(error))
    if refusal:
        return "the proxy refused the tunnel with HTTP " + refusal.group(1)
    # SSLCertVerificationError has OpenSSL's reason.
    reason = getattr(error, "verify_message", "")
    if reason:
        return "the certificate of the server is refused: " + reason
    name = type(error).__name__
    unreachable = (errno.ENETUNREACH, errno.EHOSTUNREACH)
    if isinstance(error, OSError) and error.errno in unreachable:
        return f"the network cannot be reached ({name})"
    return f"{FAILURES.get(name, 'no usable answer')} ({name})"


class Sender:
    """Posts batches over one connection, which is kept while the server accepts them.

    The token goes into a header of these requests and nowhere else: within TLS, or to
    this machine. A redirect is not followed.

    agreement  config as read when consent was decided; token and device id as read
               when this object was made
    server     the URL, and the proxy, for messages
    has_begun  whether a request was begun
    """

    def __init__(self, run: Run) -> None:
        import http.client

        url = run.endpoint()
        self.run = run
        # config as consent was decided on it. If it has changed since then, the first
        # check_agreement() ends the run.
        token = read_token(run.directory)
        device_id = read_device_id(run.directory, run.mode)
        self.agreement = Agreement(run.config, token, device_id)
        self.path = url.path
        self.has_begun = False
        try:
            proxy = find_proxy(url)
            self.connection = make_connection(url, proxy)
        except (OSError, ValueError, http.client.HTTPException) as error:
            name = type(error).__name__
            raise Stop(f"TLS or the proxy cannot be set up ({name})") from None
        self.server = url.geturl()
        if proxy:
            self.server += " through the proxy " + proxy.address

    def close(self) -> None:
        self.connection.close()

    def post(self, batch: Batch) -> str:
        """Post a batch, and once more if the status says so; return the result."""
        response = self.post_once(batch)
        delay = retry_delay(response, time.time())
        if delay is not None and self.run.has_time(delay):
            self.run.say(f"retry in {delay:.0f} s")
            try:
                self.run.sleep(delay)
            except OSError:
                # A sandbox (seccomp) refuses to sleep. Then the first answer counts.
                pass
            else:
                response = self.post_once(batch)
        return str(response.outcome.result)  # str() is for type checkers

    def post_once(self, batch: Batch) -> Response:
        """Post a batch; raise Stop if no answer comes."""
        import http.client

        what = f"batch of {len(batch.lines)} ({batch.lines[0].mode} mode, "
        what += f"{len(batch.body)} bytes) to {self.server}"
        try:
            response = self.exchange(batch.body)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = explain_failure(error)
            raise Stop(f"network_error: {what}: {reason}") from None
        result, words = response.outcome
        self.run.say(f"{what}: HTTP {response.status}, {words} ({result})")
        return response

    def exchange(self, body: bytes) -> Response:
        """Make a request over the kept connection, or else over a new one.

        A server may close a kept connection at any moment, even while it is written to.
        If that happens and no answer has come, the request is made once more, over a
        new connection. (In rare cases, the server has accepted the first one, too.)
        """
        import socket

        if self.is_reusable():
            try:
                return self.exchange_once(body)
            except socket.timeout:
                # The server may be at work on the request.
                raise
            except OSError:
                # Most likely, the server has closed it. (RemoteDisconnected is an
                # OSError, too.) Go on with a new connection.
                pass
        # Without consent, not even a connection is made.
        self.check_agreement()
        self.connection.close()
        self.connection.connect()
        return self.exchange_once(body)

    def exchange_once(self, body: bytes) -> Response:
        """Make a request over the open connection."""
        # Before each request: something may have changed during the one before, or
        # while connecting.
        self.check_agreement()
        # The first request of a run begins in any case. Otherwise, a run that has
        # little time would never send any.
        if self.has_begun and not self.run.has_time():
            raise Stop("too little time is left for a request; the next run goes on")
        self.has_begun = True
        headers = {
            "Authorization": "Bearer " + self.agreement.token,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": "secondme_sync/" + VERSION,
        }
        try:
            # http.client sends a file object in blocks of 8 KiB, each with a time limit
            # of its own. Bytes would go out in one sendall(), with one limit for all of
            # them.
            self.connection.request("POST", self.path, io.BytesIO(body), headers)
        except OSError:
            response = self.read_early_response()
            if response is None:
                raise
            return response
        return self.read_response()

    def read_early_response(self) -> "Optional[Response]":
        """Return an answer that came before the whole body was sent, None for none.

        Many gateways answer early, and close the connection, which ends the sending.
        Their answer counts as any other does. http.client lets us read it, though the
        body was cut off: it takes a request for sent once the headers are.
        """
        import http.client

        try:
            # If there is an answer, it is there already. (But with a limit of 0, TLS
            # might fail and ask to be called again.)
            self.connection.sock.settimeout(0.1)
            return self.read_response()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            self.connection.close()

    def check_agreement(self) -> None:
        """Raise Stop if config, token or device id is no longer what it was."""
        agreement = self.run.read_agreement()
        if not agreement.token:
            raise Stop("the token is missing")
        names = ("config", "the token", "the device id")
        for name, old, new in zip(names, self.agreement, agreement):
            if old != new:
                raise Stop(name + " has changed; what is not accepted stays pending")

    def is_reusable(self) -> bool:
        """Tell whether the connection is open and idle.

        If there is something to read, it is the connection's end, or data that nobody
        asked for and that must not be taken for the answer to the next request.
        """
        import selectors

        sock = self.connection.sock
        if sock is None:
            return False
        # TLS may hold data that has left the socket.
        if hasattr(sock, "pending") and sock.pending():
            return False
        # Not select(), which fails for descriptors above 1023.
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            return not selector.select(timeout=0)

    def read_response(self) -> Response:
        """Read a response; its body only if the status is 2xx."""
        reply = self.connection.getresponse()
        answer = None
        if 200 <= reply.status < 300:
            answer = parse_object(decode(read_body(reply)))
        if answer is None:
            # The body was perhaps not read to its end. What is left of it might be
            # taken for the next response.
            self.connection.close()
        retry_after = reply.getheader("Retry-After")
        return Response(reply.status, retry_after, classify(reply.status, answer))


def read_body(reply: "HTTPResponse") -> bytes:
    """Return the body of a response, b"" unless it is complete and at most 64 KiB."""
    import http.client

    with suppress(OSError, http.client.HTTPException):
        # readinto() fills this, unless the body ends before. (Not read(), which would
        # take all memory in Python 3.10 if a chunk claims to have -1 bytes.)
        data = bytearray(MAX_SMALL_BYTES + 1)
        size = reply.readinto(data)
        # If the connection breaks, readinto() raises for a chunked body. For others it
        # does not, but length is the number of announced bytes that have not come. (It
        # is None if the server has announced none.)
        is_cut_off = bool(reply.length)
        if size <= MAX_SMALL_BYTES and not is_cut_off:
            return bytes(data[:size])
    return b""


# The run, and the other things that the command line offers.


def check_prerequisites(run: Run) -> None:
    """Raise Stop unless there is consent, a token, and something to send or record.

    Contract: Prerequisites.
    """
    if run.mode == "off":
        raise Stop("telemetry is off: " + run.reason)
    login_problem = find_login_problem(run.directory)
    if login_problem:
        raise Stop("not logged in: " + login_problem)
    state = read_state(run.analytics)
    state.check()
    with open_logs(run, state, run.mode) as logs:
        for log in logs:
            has_lines = next(log.lines(log.offset), None) is not None
            # If an earlier run was cut short after its last batch, nothing is left to
            # send, but completed, from which the older script would start, has not
            # moved. So a run is needed that records "ok".
            if has_lines or log.offset != state.completed[log.name]:
                return
    raise Stop(run.find_log_problem() or "nothing is pending")


class Delivery:
    """Sends what is pending, batch by batch, and records each batch that is accepted.

    An event that the server refuses, even alone, is left out for good. But that takes
    proof that the event is at fault, and not the server: another part of the logs must
    be accepted.
        - If an earlier part of the same batch was accepted, the event is left out at
          once. For example, [1 2] is refused, [1] is accepted, [2] is refused.
        - Otherwise it is held. If a later part or batch is accepted, it is left out.
          For example, [1 2] is refused, [1] is refused and held, [2] is accepted. If
          another event is refused alone before that, or if nothing follows, the run
          ends, and the held event stays pending.
    An acceptance is proof for one event only.

    has_proof  whether a part of this batch was accepted that is not used as proof yet
    held       the event that is held, as a Batch of its own, or None; never together
               with has_proof
    """

    def __init__(
        self, run: Run, state: State, logs: "List[Log]", sender: Sender
    ) -> None:
        self.say = run.say
        self.state = state
        self.logs = logs
        self.sender = sender
        self.device_id = sender.agreement.device_id
        self.has_proof = False
        self.held = None  # type: Optional[Batch]

    def deliver(self) -> str:
        """Send all that is pending; return the result to record."""
        passed_over = 0
        try:
            for batch in read_batches(self.logs, self.device_id):
                passed_over += batch.passed_over
                if batch.lines:
                    # What was accepted before this batch proves nothing: the server may
                    # have begun to refuse everything.
                    self.has_proof = False
                    result = self.send(batch)
                    if result != "ok":
                        return result
                elif self.held is None:
                    self.advance(batch)
                # (While an event is held, log.offset must not pass it. These lines are
                # not lost: the ends of the next accepted batch lie behind them.)
        finally:
            if passed_over:
                self.say(PASSED_OVER.format(passed_over))
        return "ok" if self.held is None else self.give_up(self.held)

    def send(self, batch: Batch) -> str:
        """Post a batch, or its parts if it is refused. Return "ok", or why to stop.

        A refused batch is posted in two halves, a refused half in two halves, and so
        on, until the event that is at fault stands alone. For example, if the server
        refuses the third of four, the requests are [1 2 3 4] [1 2] [3 4] [3] [4].
        """
        parts = [batch]
        while parts:
            part = parts.pop(0)
            result = self.sender.post(part)
            if result == "ok":
                self.accept(part)
            elif result != "refused":
                return result
            elif len(part.lines) > 1:
                self.say("the refused batch is sent in two halves")
                parts = split_batch(part, self.device_id) + parts
            elif self.has_proof:
                self.has_proof = False
                self.leave_out(part)
            elif self.held is None:
                self.held = part
            else:
                return self.give_up(self.held)
        return "ok"

    def accept(self, batch: Batch) -> None:
        """Record that a batch is accepted, and leave out the held event, if any."""
        if self.held is None:
            self.has_proof = True
        else:
            # Recorded on its own: it may be in a log that batch.ends does not name.
            self.leave_out(self.held)
            self.held = None
        self.advance(batch)

    def leave_out(self, single: Batch) -> None:
        """Record that a refused event is done."""
        words = ", but accepts others; it is left out for good"
        self.say(describe_refused(single) + words)
        self.advance(single)

    def give_up(self, single: Batch) -> str:
        """Return the result of a run that ends because of the held event."""
        words = "; it stays pending, and all behind it (--skip-pending skips them all)"
        self.say(describe_refused(single) + words)
        return "server_error"

    def advance(self, batch: Batch) -> None:
        """Record that a batch is done, and all before it."""
        for log, end in batch.ends.items():
            log.offset = end
        # Not flushed, which would take time. After a power cut, the next run may send
        # again what this run has sent.
        self.state.save(self.logs, UNFINISHED, flush=False)


def describe_refused(single: Batch) -> str:
    """Return in words that the event of a batch is refused."""
    line = single.lines[0]
    place = f"byte {line.begin} of {line.log.name}.jsonl"
    return f"the server refuses the event at {place}"


def sync(run: Run) -> None:
    """Send what is pending, record what was accepted. Contract: Sync Implementation."""
    check_prerequisites(run)
    problem = run.find_log_problem()
    if problem:
        # It does not hold up the other log.
        run.say(problem)
    with lock_state(run.analytics) as state, open_logs(run, state, run.mode) as logs:
        flush_logs(logs)
        # Record before sending: if that fails, nothing is sent. The result stands if
        # the run is cut short, or if a Stop ends it.
        result = UNFINISHED
        state.save(logs, result, flush=True)
        try:
            with closing(Sender(run)) as sender:
                result = Delivery(run, state, logs, sender).deliver()
            rest = "" if result == "ok" else "; what is not accepted stays pending"
            if not sender.has_begun:
                # (Then the result is "ok", for no batch had an event.)
                rest = "; there was nothing to send"
            run.say(f"the run ends: {result}{rest}")
        finally:
            state.save(logs, result, flush=True)


def limit_time(run: Run) -> None:
    """Let this process end after max_time from now, whatever it is doing.

    A thread ends it with exit code 0. If no thread can run, a timer outside of Python
    ends it a second later, with exit code 1.

    Only the command line calls this: a program that imports sync() shall not be ended.
    The limits are for runs that send, not for --status and the like.
    """
    import _thread  # threading would take 1 ms
    import faulthandler

    # A lock that nobody releases. To wait for it is a sleep, but one that still works
    # where a sandbox (seccomp) makes time.sleep() fail.
    never_free = _thread.allocate_lock()
    never_free.acquire()

    def watch() -> None:
        never_free.acquire(timeout=run.max_time)
        # (If stderr is a full pipe, this blocks, and the timer below ends the process.)
        run.say("the run ends: time is up; what got no answer stays pending")
        os._exit(0)

    _thread.start_new_thread(watch, ())
    # OpenSSL may block while it holds the interpreter's lock, and then no Python thread
    # runs. This timer needs no interpreter. It is meant for tracebacks, but used for
    # its exit: the traceback goes into the null device, which faulthandler keeps open.
    null = open(os.devnull, "wb")  # noqa: SIM115
    faulthandler.dump_traceback_later(run.max_time + 1, exit=True, file=null)


def sync_in_foreground(run: Run) -> None:
    """Sync within the time limit."""
    limit_time(run)
    sync(run)


def find_script() -> str:
    """Return the path of this script, "" if it was piped in."""
    # If the script was piped in, __file__ is missing or "<stdin>". (The name is
    # compared first: a file "<stdin>" in the working directory may be anybody's.)
    script = str(globals().get("__file__", "<stdin>"))
    if script == "<stdin>" or not os.path.isfile(script):
        return ""
    # realpath, for "python3 /dev/stdin < file": in the new process, /dev/stdin would be
    # another file.
    return os.path.realpath(script)


def sync_in_background(run: Run) -> None:
    """Sync in a process that outlives this one, if there is something to do."""
    check_prerequisites(run)
    started = "a new process goes on; --status shows the last result"
    script = find_script()
    if script and sys.executable:
        command = [sys.executable, "-I", script]
        command += ["--dir", run.directory, "--base-url", run.base_url]
        command += ["--max-time", str(run.max_time)]
        start_detached(command, run.directory)
        run.say(started)
    elif sys.platform == "win32":
        # It cannot fork, so the caller waits.
        sync_in_foreground(run)
    elif fork_detached(run.directory):
        # This is the new process.
        sync_in_foreground(run)
    else:
        run.say(started)


def start_detached(command: "List[str]", folder: str) -> None:
    """Start a program that does not end with this process or its terminal."""
    from subprocess import DEVNULL, Popen

    if sys.platform == "win32":
        # No DEVNULL here: with redirections, Python 3.6 lets the new process inherit
        # all handles, our stdout too. A caller that reads it to its end would then wait
        # for the new process.
        flags = 0x8 | 0x200  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
        breakaway = 0x1000000  # CREATE_BREAKAWAY_FROM_JOB
        try:
            process = Popen(command, cwd=folder, creationflags=flags | breakaway)
        except OSError:
            # The job that this process belongs to does not let it go.
            process = Popen(command, cwd=folder, creationflags=flags)
    else:
        # When Popen returns, the new session exists. If the caller is killed from then
        # on, the new process lives on.
        process = Popen(
            command, cwd=folder, start_new_session=True,
            stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL,
        )
    # Pretend that it has ended, or Popen warns that it is still running.
    process.returncode = 0


def fork_detached(folder: str) -> bool:
    """Fork, as a daemon does. Return True in the new process, False in this one."""
    import warnings

    # For type checkers, which would miss fork on Windows. (There, this is not called.)
    if sys.platform == "win32":
        return False
    # Python 3.12 and newer warn of a fork if there is a thread. Some machines have a
    # start-up file for Python that starts one.
    warnings.simplefilter("ignore")
    child = os.fork()
    if child:
        # The child ends as soon as the new session exists.
        os.waitpid(child, 0)
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    # The child of the child does not lead the session, so it never gets a terminal.
    # It lets go of all that it has inherited.
    os.chdir(folder)
    os.closerange(3, 1 << 16)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    return True


def show(text: str, stream: "Optional[TextIO]") -> None:
    """Print a text for people, if the stream is open and can be written.

    Characters that are not printable, or that the stream cannot encode, are printed as
    escapes: the text may hold what was logged, which could otherwise command the
    terminal.
    """
    if stream is None:
        return
    # json.dumps() returns a character that is not printable as an escape, in quotes.
    printable = "".join(
        char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1]
        for char in text
    )
    data = printable.encode(stream.encoding, "backslashreplace")
    with suppress(OSError):
        print(data.decode(stream.encoding), file=stream, flush=True)


def write_line(data: bytes) -> None:
    """Write a line to stdout as it is. (On Windows, print() would add a CR.)"""
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.flush()


def print_body(body: bytes) -> None:
    """Print the body of a request: indented on a terminal, or else exactly."""
    if not sys.stdout.isatty():
        write_line(body)
        return
    text = body.decode("utf-8")
    # Very deep nesting cannot be indented, and is shown as it is.
    with suppress(RecursionError):
        text = json.dumps(json.loads(text), ensure_ascii=False, indent=2)
    show(text, sys.stdout)


def describe_pending(run: Run, logs: "List[Log]") -> str:
    """Return how many events of each log are pending, or why it cannot be read."""
    counts = dict.fromkeys(LOGS, 0)
    as_anonymous = 0
    passed_over = 0
    ends = {log: log.offset for log in logs}
    for batch in read_batches(logs, ""):
        ends = batch.ends
        passed_over += batch.passed_over
        for line in batch.lines:
            counts[line.log.name] += 1
            # The line is before anonymous_until, and the log was opened in community
            # mode. (If it was opened in anonymous mode, there is no difference.)
            if line.mode != line.log.mode:
                as_anonymous += 1
    problems = {name: find_problem(run.log_path(name)) for name in LOGS}
    parts = [f"{name} events: {counts[name]}" for name in LOGS if not problems[name]]
    notes = [", ".join(parts)] if parts else []
    if as_anonymous:
        notes.append(f"of these, to be sent as anonymous only: {as_anonymous}")
    if passed_over:
        notes.append(PASSED_OVER.format(passed_over))
    # What is left of a log after its last batch can only be an unfinished line.
    unfinished = sum(end < log.size for log, end in ends.items())
    if unfinished:
        notes.append(f"half-written lines: {unfinished}")
    notes += [problem for problem in problems.values() if problem]
    return "; ".join(notes)


def show_status(run: Run) -> None:
    """Print how things stand: facts, and no prediction of what a sync would do."""
    state = read_state(run.analytics)
    last = f"{state.result} {state.timestamp}".strip() or "never"
    last += RESULT_HINTS.get(state.result, "")
    problem = find_problem(state.path)
    if state.is_broken:
        problem = f"{state.path} holds no record; everything in the logs is pending"
    if problem:
        last = "unknown: " + problem
    try:
        endpoint = f"{run.endpoint().geturl()} ({run.endpoint_origin()})"
    except Stop as stop:
        endpoint = str(stop)
    login_problem = find_login_problem(run.directory)
    login = "no, " + login_problem if login_problem else "a token in credentials"
    # Nothing is sent. If telemetry is off, count as for community mode, so that
    # describe_pending() can tell which lines would go as anonymous even then.
    mode = "community" if run.mode == "off" else run.mode
    with open_logs(run, state, mode) as logs:
        pending = describe_pending(run, logs)
    lines = [
        "directory: " + run.directory,
        f"mode:      {run.mode} ({run.reason})",
        "endpoint:  " + endpoint,
        "login:     " + login,
        "pending:   " + pending,
        "last sync: " + last,
    ]
    show("\n".join(lines), sys.stdout)


def print_pending(run: Run) -> None:
    """Print yes if a sync would have something to do.

    If not, Stop is raised, and main() prints no.
    """
    check_prerequisites(run)
    write_line(b"yes")


def dry_run(run: Run, preview: str) -> None:
    """Print the bodies that would be posted; send and change nothing.

    preview is a mode to try, whatever was agreed to, or "current" for that of the run.
    """
    mode = preview
    if preview == "current":
        if run.mode == "off":
            hint = "--dry-run anonymous or --dry-run community shows what it would send"
            raise Stop(f"telemetry is off: {run.reason} ({hint})")
        check_prerequisites(run)
        mode = run.mode
        text = f"the mode is {mode}; the server is {run.endpoint().geturl()}"
    else:
        text = f"a preview of {mode} mode; the mode that is set is {run.mode}"
        text += f" ({run.reason})"
    state = read_state(run.analytics)
    state.check()
    with open_logs(run, state, mode) as logs:
        text += "; pending: " + describe_pending(run, logs)
        show("secondme_sync: " + text, sys.stderr)
        device_id = read_device_id(run.directory, mode)
        for batch in read_batches(logs, device_id):
            if batch.body:
                print_body(batch.body)


def skip_pending(run: Run) -> None:
    """Mark what is logged so far as never to be sent, in any mode.

    This holds as long as nobody edits the logs or deletes .sync-offsets; see "Pitfalls"
    in the README.
    """
    problem = run.find_log_problem()
    if problem:
        raise Stop(problem)
    if not any(os.path.exists(run.log_path(name)) for name in LOGS):
        show("nothing is logged yet in " + run.analytics, sys.stdout)
        return
    read_state(run.analytics).check()
    # Nothing is sent, so any mode would do. In this one, describe_pending() says
    # nothing of lines that go as anonymous.
    with lock_state(run.analytics) as state, open_logs(run, state, "anonymous") as logs:
        pending = describe_pending(run, logs)
        flush_logs(logs)
        for log in logs:
            # If the log ends in half a line, the other half alone is no JSON object: it
            # has a closing brace too many.
            log.offset = log.size
        state.save(logs, "skipped", flush=True)
    show("never to be sent: " + pending, sys.stdout)


# The command line.

# directory and preview: None if not given.
Options = namedtuple("Options", "action preview directory base_url max_time verbose")
NO_FLAGS = Options("sync", None, None, BASE_URL, RUN_SECONDS, verbose=False)

DESCRIPTION = """\
Send the usage and feedback events that SecondMe skills have logged on this machine, if
their user agreed to that, to the SecondMe backend:
{}{}
unless config or --base-url names another server.
Without flags: send what is pending, and print nothing.
--dry-run, --status, --pending and --skip-pending send nothing.
"""

EPILOG = """\
exit code: 0, even if nothing could be sent; 2 for wrong flags; 1 if --skip-pending
failed, or if a run hung so badly that it had to be killed a second after --max-time.

environment: SM_TEL=off or SM_TEL=anonymous lowers the mode that config sets.
DO_NOT_TRACK=1, DISABLE_TELEMETRY=1 or CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
switches telemetry off. https_proxy, no_proxy and SSL_CERT_FILE are used as Python
uses them.
"""

# If a Stop ends an action, these words come before the reason that it gives.
FAILED_ACTIONS = {
    "dry-run": "nothing would be sent",
    "skip-pending": "nothing is skipped",
    "status": "nothing can be shown",
    "pending": "a run would end",
    "background": "the run ends",
    "sync": "the run ends",
}

# Flags that take no value and name an action, and what --help says of them.
ACTION_HELP = {
    "status": "print mode, endpoint, login, pending events, last result",
    "pending": "print yes or no: would a run have something to do",
    "skip-pending": "mark what is logged as never to be sent",
    "background": "send in a new process, and return at once",
}


def build_parser() -> "ArgumentParser":
    import argparse

    parser = argparse.ArgumentParser(
        prog="secondme_sync",
        usage="%(prog)s [flags]  (--help lists them)",
        description=DESCRIPTION.format(BASE_URL, EVENTS_PATH),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # This comes first: the flags that are added below take their defaults from it.
    parser.set_defaults(**NO_FLAGS._asdict())
    group = parser.add_mutually_exclusive_group()
    text = "print what would be sent; MODE: current (default), anonymous or community"
    modes = ("current", "anonymous", "community")
    group.add_argument(
        "--dry-run", dest="preview", nargs="?", const="current", choices=modes,
        metavar="MODE", help=text,
    )
    for name, text in ACTION_HELP.items():
        group.add_argument(
            "--" + name, dest="action", action="store_const", const=name, help=text
        )
    add_options(parser)
    return parser


def add_options(parser: "ArgumentParser") -> None:
    """Add the flags that go with any action."""
    add = parser.add_argument
    text = "seconds that a run may take (default: %(default)s)"
    add("--max-time", type=float, metavar="S", help=text)
    add("--dir", dest="directory", metavar="DIR", help="instead of ~/.secondme")
    text = "the server, where config has no baseUrl"
    add("--base-url", metavar="URL", help=text)
    text = "print to stderr what happens; a run sends all the same"
    add("-v", "--verbose", action="store_true", help=text)
    add("--version", action="version", version="secondme_sync " + VERSION)


def parse_args(argv: "List[str]") -> Options:
    """Return what the arguments ask for; exit with 2 if they are wrong."""
    # These two shall be quick. To import argparse would take 5 ms.
    if argv == []:
        return NO_FLAGS
    if argv == ["--background"]:
        return NO_FLAGS._replace(action="background")
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.directory == "":
        parser.error("--dir must name a directory")
    if not 0 < options.max_time <= MAX_RUN_SECONDS:
        parser.error("--max-time must be above 0, and 86400 (a day) at most")
    if options.preview:
        options.action = "dry-run"
    # What the parser stores has the names of the fields of Options.
    return Options(**vars(options))


def find_directory(option: "Optional[str]") -> str:
    """Return the absolute path of the state directory; raise Stop without a home."""
    if option:
        return os.path.abspath(os.path.expanduser(option))
    # On Windows, too, HOME comes first: the skill's shell writes its logs there.
    home = os.environ.get("HOME", os.path.expanduser("~"))
    if not os.path.isabs(home):
        # It would be a folder of the working directory, which may be anybody's.
        raise Stop("there is no home directory: HOME must be an absolute path")
    return os.path.join(home, ".secondme")


def perform(options: Options) -> None:
    """Do what was asked for; raise Stop where that cannot be done."""

    def say(message: str) -> None:
        if options.verbose:
            show("secondme_sync: " + message, sys.stderr)

    directory = find_directory(options.directory)
    environment = read_environment()
    run = Run(directory, environment, options.base_url, options.max_time, say)
    handlers = {
        "dry-run": lambda _: dry_run(run, options.preview),
        "sync": sync_in_foreground,
        "background": sync_in_background,
        "status": show_status,
        "pending": print_pending,
        "skip-pending": skip_pending,
    }
    handlers[options.action](run)


def main(argv: "List[str]") -> int:
    """Do what the arguments ask for; return the exit code."""
    options = parse_args(argv)
    try:
        perform(options)
        return 0
    except Stop as stop:
        message = f"{FAILED_ACTIONS[options.action]}: {stop}"
    except BrokenPipeError:
        # The reader of the output, such as head, has ended.
        return 0
    except Exception as error:
        # Only the system's words for an error number, or the type: the text of another
        # error may hold the token.
        words = getattr(error, "strerror", None) or type(error).__name__
        message = f"an unexpected error ({words})"
    # Skills call these three, and nobody wants to be told.
    is_quiet = options.action in ("sync", "background", "pending")
    if options.verbose or not is_quiet:
        show("secondme_sync: " + message, sys.stderr)
    if options.action == "pending":
        with suppress(Exception):
            write_line(b"no")
    return 1 if options.action == "skip-pending" else 0


if __name__ == "__main__":
    # All output is flushed by now. Python's own exit would flush again, and might print
    # a traceback if nobody reads the output any more.
    os._exit(main(sys.argv[1:]))
