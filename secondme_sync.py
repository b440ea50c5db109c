#!/usr/bin/env python3
"""Upload pending SecondMe telemetry: one file, standard library only, Python 3.6 or newer.

A run takes five steps and leaves silently, with exit code 0, at the first that says no:

  gate    consent (config, SM_TEL, DO_NOT_TRACK), then the access token
  read    the events that the logs hold beyond those already accepted
  shape   each event to the fields that its mode allows, up to 100 in a body
  send    POST the bodies to {baseUrl}/api/secondme/telemetry/events/batch
  record  after each accepted batch, how far the logs are done

Under ~/.secondme (or --dir) it reads config, credentials, .device-id, analytics/usage.jsonl
and analytics/feedback.jsonl, and writes analytics/.sync-offsets alone. "Contract" below is
SecondMe's reference page "Telemetry Sync". The flags: --help.
"""
import collections
import contextlib
import io
import itertools
import json
import math
import os
import stat
import sys
import time
import zlib

try:
    import fcntl
except ImportError:  # not POSIX: nothing keeps two runs apart
    fcntl = None

VERSION = "1.0.0"
BASE_URL = "https://app.mindos.com/gate/lab"  # where config names none
PATH = "/api/secondme/telemetry/events/batch"
MODES = ("off", "anonymous", "community")  # from least to most consent
LOGS = ("usage", "feedback")  # analytics/<log>.jsonl, sent in this order

BATCH_EVENTS = 100  # the contract's batch
BODY_BYTES = 512 * 1024  # of one request; only a single event may be larger
LINE_BYTES = 1024 * 1024  # a longer log line is passed over: memory stays small
FILE_BYTES = 1024 * 1024  # read of config and the like
ANSWER_BYTES = 64 * 1024  # read of an answer; a good one has some 20
GUARD_BYTES = 256  # checksummed before an offset, to know the log again
MAX_DEPTH = 64  # levels of nesting in an event
REQUEST_SECONDS = 10  # one request in all; also the longest Retry-After
RUN_SECONDS = 30  # one run in all, unless --max-time says otherwise
RETRY_SECONDS = {429: 5, 502: 2, 503: 2, 504: 2}  # status: wait before the one retry

OK, AUTH_FAILED, SERVER_ERROR, NETWORK_ERROR = "ok auth_failed server_error network_error".split()
TOO_LARGE, CHANGED = "too large", "settings changed"  # within a run, never recorded

COMMON = "skill ts version os arch session "
FIELDS = {
    "usage": (COMMON + "event duration_s outcome error_class error_message user_intent "
              "phases_used").split(),
    "feedback": (COMMON + "outcome actions_summary error_summary comment user_intent "
                 "phases_used references_loaded rating issues").split(),
}
DEFAULTS = {"skill": "secondme", "ts": "", "phases_used": [], "references_loaded": [],
            "issues": []}
COMMUNITY_ONLY = set("session error_message user_intent actions_summary error_summary "
                     "comment".split())  # contract: Anonymous Mode Stripping

Run = collections.namedtuple("Run", "home folder environ max_time say clock")
Gate = collections.namedtuple("Gate", "mode source base_url token device_id")
Item = collections.namedtuple("Item", "log mark size event")  # size: bytes of the line
Answer = collections.namedtuple("Answer", "status retry_after body")


class Stop(Exception):
    """A reason to send nothing, fit to print."""


# Gate: who agreed to what, who is logged in, where it may go.

def consent(config, environ):
    """Return (mode, what decided it): the least that config, SM_TEL and DO_NOT_TRACK allow.

    Contract: Prerequisites 1. What is not exactly one of MODES means off.
    """
    votes = [(config.get("telemetry"), "config")]
    if environ.get("SM_TEL"):
        votes.append((environ["SM_TEL"], "SM_TEL"))
    if environ.get("DO_NOT_TRACK", "") not in ("", "0", "false"):
        votes.append(("off", "DO_NOT_TRACK"))
    votes = [(mode if mode in MODES else "off", source) for mode, source in votes]
    return min(votes, key=lambda vote: MODES.index(vote[0]))


def open_regular(*path):
    """Open a regular file for reading bytes; OSError for all else, without waiting (FIFO)."""
    nonblock = getattr(os, "O_NONBLOCK", 0)
    file = open(os.path.join(*path), "rb", opener=lambda name, flags: os.open(name, flags | nonblock))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def read_text(*path):
    """Return the text of a small UTF-8 file, "" where it cannot be had."""
    try:
        with open_regular(*path) as file:
            return file.read(FILE_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return ""


def read_object(*path):
    """Return the JSON object in a small file, {} where there is none."""
    return parse_object(read_text(*path)) or {}


def read_mode(run):
    """Return (mode, what decided it, baseUrl) as they stand now."""
    config = read_object(run.home, "config")
    return consent(config, run.environ) + (config.get("baseUrl", BASE_URL),)


def read_token(run):
    """Return the accessToken, "" where there is none that fits an HTTP header."""
    token = read_object(run.home, "credentials").get("accessToken")
    return token if isinstance(token, str) and is_printable(token) else ""


def is_printable(text):
    """Tell whether text is ASCII without spaces and control characters."""
    return all("!" <= char <= "~" for char in text)


def read_gate(run):
    """Return the Gate; Stop where consent or token is missing. Contract: Prerequisites 1, 2."""
    mode, source, base_url = read_mode(run)
    if mode == "off":
        raise Stop("telemetry is off (decided by %s)" % source)
    token = read_token(run)
    if not token:
        raise Stop("not logged in (no usable accessToken in credentials)")
    device_id = read_text(run.home, ".device-id").strip() if mode == "community" else ""
    return Gate(mode, source, base_url, token, device_id)


def parse_endpoint(base_url):
    """Return the split URL to post to; Stop where baseUrl must not be contacted."""
    import socket
    import urllib.parse
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no str, no URL, no address
        url = urllib.parse.urlsplit(base_url.rstrip("/") + PATH)
        host, plain = url.hostname or "", url.scheme == "http"
        safe = url.scheme == "https" or plain and (
            host in ("localhost", "::1") or socket.inet_pton(socket.AF_INET, host)[0] == 127)
        if safe and host and url.port != 0 and is_printable(base_url) and not set("@?#") & set(base_url):
            return url
    raise Stop("baseUrl is refused: it takes https, or http to this machine itself, and no "
               "user name, query or fragment")


# Read: from logs to events, line by line.

def finite(text, convert=float):
    """Parse a JSON number; ValueError past float range, and for NaN and Infinity."""
    if not math.isfinite(float(text)):
        raise ValueError("not finite")
    return convert(text)


DECODER = json.JSONDecoder(parse_float=finite, parse_constant=finite,
                           parse_int=lambda text: finite(text, int))


def depth(value):
    """Return the levels of nesting in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def parse_object(text):
    """Return the JSON object that text is, None where it is no strict and sane one."""
    try:
        value = DECODER.decode(text.lstrip("\ufeff"))
        deep = text.count("{") + text.count("[") > MAX_DEPTH and depth(value) > MAX_DEPTH
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not deep else None


class Log:
    """An open log; it ends where it ended when it was opened.

    mark is how far it is read: {"bytes": offset, "guard": checksum of the bytes before it}.
    """

    def __init__(self, name, file, state):
        """Start where state says; at 0 if the guard does not match: it is another log then."""
        self.name, self.file = name, file
        self.size = file.seek(0, os.SEEK_END)
        saved = state["resume"].get(name)
        offset = saved["bytes"] if saved else state[name + "_bytes"]
        offset = offset if offset <= self.size else 0
        file.seek(max(0, offset - GUARD_BYTES))
        self.tail = file.read(min(offset, GUARD_BYTES))
        if saved and zlib.crc32(self.tail) != saved["guard"]:
            offset, self.tail = file.seek(0), b""
        self.mark = {"bytes": offset, "guard": zlib.crc32(self.tail)}

    def items(self):
        """Yield an Item per event; a line that is none is passed over.

        A last line without newline is read if it is a whole event, else it waits for its rest.
        """
        offset, skipping = self.mark["bytes"], False
        while offset < self.size:
            line = self.file.readline(min(LINE_BYTES + 1, self.size - offset))
            ended = line.endswith(b"\n")
            offset += len(line)
            self.tail = (self.tail + line)[-GUARD_BYTES:]
            if not ended and len(line) > LINE_BYTES:
                skipping = True
                continue
            event = None if skipping else parse_object(line.decode("utf-8", "replace"))
            if event is None and not ended:
                return
            skipping = False
            self.mark = {"bytes": offset, "guard": zlib.crc32(self.tail)}
            if event is not None:
                yield Item(self.name, self.mark, len(line), event)


@contextlib.contextmanager
def open_logs(run, state):
    """Open the logs where state says they go on; one that cannot be read is left out."""
    with contextlib.ExitStack() as files:
        logs = []
        for name in LOGS:
            with contextlib.suppress(OSError):
                try:
                    file = files.enter_context(open_regular(run.folder, name + ".jsonl"))
                except FileNotFoundError:
                    file = io.BytesIO()
                logs.append(Log(name, file, state))
        yield logs


def read_items(logs):
    """Yield the Items of all logs, in order."""
    return itertools.chain.from_iterable(log.items() for log in logs)


def is_behind(state, logs):
    """Tell whether the logs are done further than state's *_bytes say."""
    return any(log.mark["bytes"] > state[log.name + "_bytes"] for log in logs)


# Shape: from events to request bodies.

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False,
                           separators=(",", ":"))


def shape_event(log, mode, event):
    """Return the payload of an event: what its log and mode allow, without nulls."""
    payload = {"type": log}
    for field in FIELDS[log]:
        if mode == "community" or field not in COMMUNITY_ONLY:
            value = event.get(field, DEFAULTS.get(field))
            if value is not None:
                payload[field] = value
    return payload


def make_batches(items):
    """Group Items into lists of up to BATCH_EVENTS, and BODY_BYTES of log lines."""
    batch, size = [], 0
    for item in items:
        if len(batch) == BATCH_EVENTS or batch and size + item.size > BODY_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch


def encode_body(gate, batch):
    """Return the body for a batch, strict JSON in UTF-8; lone surrogates are replaced."""
    events = [shape_event(item.log, gate.mode, item.event) for item in batch]
    payload = {"telemetryMode": gate.mode, "events": events}
    if gate.device_id:
        payload["deviceId"] = gate.device_id
    text = ENCODER.encode(payload)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


# Send: one kept connection, one retry, bounded time.

def classify(answer):
    """Return the result that an Answer (None: there was none) stands for.

    Contract: Error Handling. Success is 2xx with a JSON object whose code is 0.
    """
    if answer is None:
        return NETWORK_ERROR
    if answer.status in (401, 413):
        return AUTH_FAILED if answer.status == 401 else TOO_LARGE
    if not 200 <= answer.status < 300:
        return SERVER_ERROR
    content = parse_object(answer.body.decode("utf-8", "replace"))
    if content is None:
        return NETWORK_ERROR
    code = content.get("code")
    return OK if code == 0 and type(code) is int else SERVER_ERROR


def retry_delay(answer, now):
    """Return the seconds to wait before a retry, None where the answer calls for none.

    Retry-After (of a 429) is seconds or an HTTP-date; now is in seconds since the epoch.
    """
    delay = RETRY_SECONDS.get(answer.status) if answer else None
    if delay is None or answer.status != 429:
        return delay
    import email.utils
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = email.utils.parsedate_tz(answer.retry_after)
        delay = email.utils.mktime_tz(date) - now if date else int(answer.retry_after)
    return min(max(delay, 0), REQUEST_SECONDS)


def open_connection(url):
    """Return a connection to url, made at the first request.

    A proxy (any that urllib finds) sees but the TLS tunnel; plain http stays on this machine.
    """
    import http.client
    if url.scheme == "http":
        return http.client.HTTPConnection(url.hostname, url.port, timeout=REQUEST_SECONDS)
    import base64
    import ssl
    import urllib.request
    options = {"timeout": REQUEST_SECONDS, "context": ssl.create_default_context()}
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(url.netloc):
        return http.client.HTTPSConnection(url.hostname, url.port, **options)
    proxy = urllib.parse.urlsplit(proxy if "://" in proxy else "//" + proxy)
    connection = http.client.HTTPSConnection(proxy.hostname, proxy.port, **options)
    headers = {}
    if proxy.username and proxy.password:
        login = urllib.parse.unquote(proxy.username + ":" + proxy.password).encode("utf-8")
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login).decode("ascii")
    connection.set_tunnel(url.hostname, url.port, headers)
    return connection


def was_closed(connection):
    """Tell whether the server has closed a kept connection."""
    import selectors
    with selectors.DefaultSelector() as selector:
        selector.register(connection.sock, selectors.EVENT_READ)
        return bool(selector.select(0))


class Sender:
    """Posts bodies to one URL until deadline (seconds of run.clock.monotonic)."""

    def __init__(self, run, gate, url, deadline):
        self.run, self.gate, self.url, self.deadline = run, gate, url, deadline
        self.connection = None

    def post(self, body):
        """Post a body, with the contract's one retry; return the result."""
        for last in (False, True):
            if read_mode(self.run) != self.gate[:3]:  # consent may be withdrawn at any time
                return CHANGED
            answer = self.attempt(body)
            result, delay = classify(answer), retry_delay(answer, self.run.clock.time())
            self.run.say("%d bytes: %s%s" % (
                len(body), result, ", HTTP %d" % answer.status if answer else ""))
            if delay is None or last:
                return result
            if delay >= self.deadline - self.run.clock.monotonic():
                return NETWORK_ERROR
            self.run.say("trying once more in %d s" % delay)
            self.run.clock.sleep(delay)

    def attempt(self, body):
        """Return the Answer to one request, None where there is none in time.

        The request has a thread, which is left behind when its time is up: nothing else ends
        a hung DNS lookup or a server that drips its answer.
        """
        import threading
        answers = []
        seconds = min(REQUEST_SECONDS, self.deadline - self.run.clock.monotonic())
        if seconds > 0:
            thread = threading.Thread(target=self.exchange, args=(body, answers), daemon=True)
            thread.start()
            thread.join(seconds)
        return answers[0] if answers else None

    def exchange(self, body, answers):
        """Make one request; append the Answer, if there is one, to answers."""
        connection, self.connection = self.connection, None  # in nobody else's hands meanwhile
        try:
            connection = connection or open_connection(self.url)
            if connection.sock and was_closed(connection):
                connection.close()
            connection.request("POST", self.url.path, body, {
                "Authorization": "Bearer " + self.gate.token,
                "Content-Type": "application/json", "User-Agent": "secondme_sync/" + VERSION})
            response = connection.getresponse()
            answer = Answer(response.status, response.getheader("Retry-After"),
                            response.read(ANSWER_BYTES))
            if not response.isclosed():
                connection.close()
            self.connection = connection
            answers.append(answer)
        except Exception as error:  # whatever it is, there is no answer
            self.run.say("no answer: " + type(error).__name__)  # its text might hold the token
            if connection:
                connection.close()

    def close(self):
        """Close the kept connection."""
        if self.connection:
            self.connection.close()


def deliver(batch, gate, post, accept):
    """Post a batch, in halves where it is too large; accept(part) what is accepted."""
    body = encode_body(gate, batch)
    several = len(batch) > 1
    result = TOO_LARGE if several and len(body) > BODY_BYTES else post(body)
    if result == OK:
        accept(batch)
    if result != TOO_LARGE:
        return result
    middle = len(batch) // 2
    halves = batch[:middle], batch[middle:]
    return deliver_all(halves, gate, post, accept) if several else SERVER_ERROR


def deliver_all(batches, gate, post, accept):
    """Deliver batches in order, up to the first that fails; return the result."""
    results = (deliver(batch, gate, post, accept) for batch in batches)
    return next((result for result in results if result != OK), OK)


# Record: one state file, replaced as a whole.

def load_state(run):
    """Return the state: the contract's four keys, and resume with a mark (see Log) per log."""
    saved = read_object(run.folder, ".sync-offsets")
    state = {name + "_bytes": whole(saved.get(name + "_bytes")) for name in LOGS}
    state["last_sync_ts"] = saved.get("last_sync_ts")
    state["last_sync_result"] = saved.get("last_sync_result")
    marks = saved.get("resume")
    marks = marks if isinstance(marks, dict) else {}
    state["resume"] = {name: {key: whole(marks[name].get(key)) for key in ("bytes", "guard")}
                       for name in LOGS if isinstance(marks.get(name), dict)}
    return state


def whole(value):
    """Return value if it is a whole, non-negative number, else 0."""
    return value if type(value) is int and value >= 0 else 0


def save_state(run, state, descriptor=None):
    """Replace the state file, or Stop; with the folder's descriptor, flush both to disk."""
    path = os.path.join(run.folder, ".sync-offsets")
    try:
        mode = os.stat(path).st_mode & 0o777 | 0o400 if os.path.exists(path) else 0o600
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + ".tmp")
        try:
            with open(path + ".tmp", "xb") as file:
                os.chmod(path + ".tmp", mode)
                file.write(json.dumps(state).encode("ascii"))
                if descriptor is not None:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
            if descriptor is not None:
                os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path + ".tmp")
            raise
    except OSError as error:
        raise Stop("progress cannot be recorded (%s)" % os.strerror(error.errno))


def record(run, state, logs, result, descriptor):
    """End a run: note its result and the time; *_bytes move where all is done."""
    for log in logs if result == OK else ():
        state["resume"][log.name] = log.mark
        state[log.name + "_bytes"] = log.mark["bytes"]
    if result != CHANGED:
        stamp(run, state, result)
    save_state(run, state, descriptor)


def stamp(run, state, result):
    """Put result and the time into state."""
    now = time.gmtime(run.clock.time())
    state.update(last_sync_ts=time.strftime("%Y-%m-%dT%H:%M:%SZ", now), last_sync_result=result)


@contextlib.contextmanager
def lock(run):
    """Keep other runs out by flock of the folder, which ends with the process; yield its fd."""
    if fcntl is None:
        yield None
        return
    try:
        descriptor = os.open(run.folder, os.O_RDONLY)
    except OSError:
        raise Stop("nothing is logged yet")
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Stop("another run is at work")
        yield descriptor
    finally:
        os.close(descriptor)


# The run, and the command line.

def sync(run):
    """Do the five steps; return the result."""
    deadline = run.clock.monotonic() + run.max_time
    gate = read_gate(run)
    with lock(run) as descriptor:
        state = load_state(run)
        with open_logs(run, state) as logs:
            batches = make_batches(read_items(logs))
            first = next(batches, None)
            if not first and not is_behind(state, logs):
                raise Stop("nothing is pending")
            result = OK
            if first:
                batches = itertools.chain([first], batches)
                result = send(run, gate, state, batches, deadline)
            record(run, state, logs, result, descriptor)
    run.say("result: " + result)


def send(run, gate, state, batches, deadline):
    """Post the batches, saving state with each that is accepted; return the result."""
    try:
        url = parse_endpoint(gate.base_url)
    except Stop as stop:
        run.say(str(stop))
        return NETWORK_ERROR
    if state["last_sync_result"] is None:
        stamp(run, state, NETWORK_ERROR)  # until a run has come to its end
    save_state(run, state)  # who cannot record must not send

    def accept(batch):
        state["resume"].update({item.log: item.mark for item in batch})
        save_state(run, state)

    with contextlib.closing(Sender(run, gate, url, deadline)) as sender:
        return deliver_all(batches, gate, sender.post, accept)


def dry_run(run):
    """Print the bodies that sync would post now; send nothing, change nothing."""
    gate = read_gate(run)
    url = parse_endpoint(gate.base_url)
    counts = collections.Counter()

    def show(body):
        if sys.stdout.isatty():
            body = json.dumps(json.loads(body.decode()), indent=2, ensure_ascii=False).encode()
        sys.stdout.buffer.write(body + b"\n")
        return OK

    with open_logs(run, load_state(run)) as logs:
        deliver_all(make_batches(read_items(logs)), gate, show,
                    lambda batch: counts.update(item.log for item in batch))
    if not counts:
        raise Stop("nothing is pending")
    run.say("mode %s, to %s" % (gate.mode, url.geturl()))
    run.say("would send " + describe(counts))


def describe(counts):
    """Say how many events of each log there are."""
    return ", ".join("%d %s" % (counts[name], name) for name in LOGS) + " events"


def status(run):
    """Print for people how things stand."""
    mode, source, base_url = read_mode(run)
    state = load_state(run)
    with open_logs(run, state) as logs:
        counts = collections.Counter(item.log for item in read_items(logs))
    try:
        endpoint = parse_endpoint(base_url).geturl()
    except Stop as stop:
        endpoint = str(stop)
    print("telemetry:  %s (decided by %s)" % (mode, source))
    print("endpoint:   " + endpoint)
    print("logged in:  " + ("yes" if read_token(run) else "no"))
    print("pending:    " + describe(counts))
    print("last sync:  %s" % ("%(last_sync_result)s at %(last_sync_ts)s" % state
                              if state["last_sync_result"] else "never"))


def pending(run):
    """Print yes or no: does sync have something to do?"""
    print("yes" if has_work(run) else "no")


def has_work(run):
    """Tell whether sync would send or record something."""
    state = load_state(run)
    with contextlib.suppress(Stop), open_logs(run, state) as logs:
        read_gate(run)
        return next(read_items(logs), None) is not None or is_behind(state, logs)
    return False


def skip_pending(run):
    """Mark all that is logged as never to be sent."""
    if not os.path.isdir(run.folder):
        print("nothing is logged yet")
        return
    with lock(run) as descriptor:
        state = load_state(run)
        with open_logs(run, state) as logs:
            if len(logs) < len(LOGS):
                raise Stop("a log cannot be read")
            counts = collections.Counter(item.log for item in read_items(logs))
            record(run, state, logs, OK, descriptor)
    print("never to be sent: " + describe(counts))


def background(run):
    """Sync in a process of its own, if there is something to do; return at once."""
    if has_work(run) and (not hasattr(os, "fork") or detach()):
        sync(run)


def detach():
    """Go on in a new process with a session and null streams of its own: True there."""
    if os.fork():
        return False
    os.setsid()
    os.chdir(os.sep)
    os.closerange(0, 1024)
    for _ in range(3):  # standard input, output, error
        os.open(os.devnull, os.O_RDWR)
    return True


def parse_args(argv):
    """Return (action, directory, seconds, verbose) for the command line."""
    import argparse
    parser = argparse.ArgumentParser(
        prog="secondme_sync", description="Upload pending SecondMe telemetry, if you agreed to it.")
    actions = parser.add_mutually_exclusive_group()
    for action, text in (
            (dry_run, "print the bodies that would be posted now; send and change nothing"),
            (status, "say how things stand"),
            (pending, "print yes or no: is there something to send"),
            (skip_pending, "mark all that is logged so far as never to be sent"),
            (background, "sync in a process of its own and return at once")):
        actions.add_argument("--" + action.__name__.replace("_", "-"), dest="action", help=text,
                             action="store_const", const=action, default=sync)
    parser.add_argument("--max-time", type=seconds, default=RUN_SECONDS, metavar="S",
                        help="seconds that the whole run may take (default: %(default)s)")
    parser.add_argument("--dir", metavar="D", help="state directory (default: ~/.secondme)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what happens")
    parser.add_argument("--version", action="version", version="secondme_sync " + VERSION)
    args = parser.parse_args(argv)
    return args.action, args.dir, args.max_time, args.verbose


def seconds(text):
    """Parse --max-time."""
    if not 0 < float(text) <= 3600:
        raise ValueError("out of range")
    return float(text)


def say(text):
    """Print a line for people on stderr."""
    if sys.stderr:
        print("secondme_sync: " + text, file=sys.stderr)


def main(argv=None):
    """Run the command line (default: sys.argv) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    action, home, max_time, verbose = parse_args(argv) if argv else (sync, None, RUN_SECONDS, False)
    home = os.path.abspath(home or os.path.expanduser("~/.secondme"))
    for_people = verbose or action in (dry_run, status, skip_pending)
    run = Run(home, os.path.join(home, "analytics"), os.environ, max_time,
              say if for_people else lambda text: None, time)
    try:
        action(run)
    except Stop as stop:
        run.say("nothing is sent: %s" % stop)
    except (Exception, KeyboardInterrupt) as error:  # the last resort: never a visible error
        run.say("stopped: " + type(error).__name__)  # its text might hold the token
    else:
        return 0
    return 1 if action is skip_pending else 0


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)  # at once: a request may still hang in DNS
