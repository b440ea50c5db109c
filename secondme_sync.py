#!/usr/bin/env python3
"""Upload pending SecondMe telemetry: one file, standard library only, Python 3.6 or newer.

Five steps; a run ends silently, with exit code 0, at the first that says no:

  gate    consent (config, SM_TEL, DO_NOT_TRACK), then the access token
  read    the events in the logs beyond those already accepted
  shape   each event to the fields that its mode allows, up to 100 in a body
  send    POST the bodies to {baseUrl}/api/secondme/telemetry/events/batch
  record  after each accepted batch, how far the logs are done

Under ~/.secondme it reads config, credentials, .device-id, analytics/usage.jsonl and
analytics/feedback.jsonl; it writes analytics/.sync-offsets. Flags: see --help. "Contract"
is SecondMe's page "Telemetry Sync".
"""
import io
import json
import os
import sys
import time
import zlib
from collections import Counter, namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain

try:
    import fcntl
except ImportError:  # not POSIX: nothing keeps two runs apart
    fcntl = None

VERSION = "1.0.0"
BASE_URL = "https://app.mindos.com/gate/lab"  # where config names none
PATH = "/api/secondme/telemetry/events/batch"
MODES = "off", "anonymous", "community"  # from least to most consent

BATCH_EVENTS = 100  # the contract's batch
BODY_BYTES = 512 * 1024  # of a request; only a single event may be larger
LINE_BYTES = 1024 * 1024  # of a log line, or a file like config: memory stays small
ANSWER_BYTES = 64 * 1024  # read of an answer; a good one has some 20
GUARD_BYTES = 256  # checksummed before an offset, to know the log again
MAX_DIGITS = 308  # of an integer: float range
MAX_DEPTH = 64  # levels of nesting in an event
REQUEST_SECONDS = 10  # one request; also the longest Retry-After
RUN_SECONDS = 30  # one run, unless --max-time says otherwise
RETRY_SECONDS = {429: 5, 502: 2, 503: 2, 504: 2}  # status: wait before the one retry

OK, AUTH_FAILED, SERVER_ERROR, NETWORK_ERROR = "ok auth_failed server_error network_error".split()
TOO_LARGE = "too large"  # within a run, never recorded

FIELDS = {  # of analytics/<log>.jsonl, in the order of sending; * is for community mode alone
    "usage": "skill ts version os arch *session event duration_s outcome error_class "
             "*error_message *user_intent phases_used",
    "feedback": "skill ts version os arch *session outcome *actions_summary *error_summary "
                "*comment *user_intent phases_used references_loaded rating issues"}
DEFAULTS = dict(skill="secondme", ts="", phases_used=[], references_loaded=[], issues=[])
ALLOWED = {(log, mode): [(field.strip("*"), DEFAULTS.get(field)) for field in fields.split()
                         if mode == "community" or "*" not in field]
           for log, fields in FIELDS.items() for mode in MODES}

Run = namedtuple("Run", "home folder environ deadline say clock")
Gate = namedtuple("Gate", "mode source base_url config device_id token")
Answer = namedtuple("Answer", "status retry_after body")
NO_ANSWER = Answer(0, None, b"")


class Stop(Exception):
    """A reason to send nothing, fit to print."""


# Gate: who agreed to what, who is logged in, where it may go.

def consent(config, environ):
    """Return (mode, what decided it), the least that is allowed. Contract: Prerequisites 1."""
    refused = environ.get("DO_NOT_TRACK", "") not in ("", "0", "false")
    votes = ((config.get("telemetry"), "config"),
             (environ.get("SM_TEL") or "community", "SM_TEL"),
             ("off" if refused else "community", "DO_NOT_TRACK"))
    return min(((mode if mode in MODES else "off", source) for mode, source in votes),
               key=lambda vote: MODES.index(vote[0]))


def open_regular(*path):
    """Open a file to read bytes, an empty one where it is missing; OSError if not regular."""
    path = os.path.join(*path)
    if not os.path.lexists(path):
        return io.BytesIO()
    if not os.path.isfile(path):
        raise OSError("to open a FIFO is to wait")
    return open(path, "rb")


def read_small(*path):
    """Return the bytes of a small file, none where it cannot be read."""
    with suppress(OSError), open_regular(*path) as file:
        return file.read(LINE_BYTES)
    return b""


def read_object(*path):
    return parse_object(read_small(*path)) or {}


def is_printable(text):
    return isinstance(text, str) and all("!" <= char <= "~" for char in text)


def read_gate(run):
    """Return the Gate as it stands now; token is "" where none fits an HTTP header."""
    config = read_object(run.home, "config")
    mode, source = consent(config, run.environ)
    token = device_id = ""
    if mode != "off":
        token = read_object(run.home, "credentials").get("accessToken")
    if mode == "community":
        device_id = read_small(run.home, ".device-id").decode("utf-8", "replace").strip()
    return Gate(mode, source, config.get("baseUrl", BASE_URL), config, device_id,
                token if is_printable(token) else "")


def enter(run):
    """Return the Gate; Stop without consent or token. Contract: Prerequisites 1, 2."""
    gate = read_gate(run)
    if gate.mode == "off":
        raise Stop("telemetry is off (decided by %s)" % gate.source)
    if not gate.token:
        raise Stop("not logged in (no usable accessToken in credentials)")
    return gate


def parse_endpoint(base_url):
    """Return the split URL to post to; Stop where baseUrl must not be contacted."""
    import socket
    import urllib.parse
    with suppress(AttributeError, ValueError, OSError):  # no str, no URL, no address
        url = urllib.parse.urlsplit(base_url.rstrip("/") + PATH)
        host = url.hostname or ""
        local = url.scheme == "http" and (
            host in ("localhost", "::1") or socket.inet_pton(socket.AF_INET, host)[0] == 127)
        clean = is_printable(base_url) and not set("@?#").intersection(base_url)
        if host and url.port != 0 and clean and (local or url.scheme == "https"):
            return url
    raise Stop("baseUrl is refused: it must be https, or http to this machine itself, "
               "without user name, query and fragment")


# Read: from logs to events, line by line.

def parse_float(text):
    if not abs(float(text)) < float("inf"):
        raise ValueError("NaN, Infinity, or past float range")
    return float(text)


def parse_int(text):
    if len(text) > MAX_DIGITS:
        raise ValueError("too many digits")
    return int(text)


DECODER = json.JSONDecoder(
    parse_float=parse_float, parse_int=parse_int, parse_constant=parse_float)


def depth(value):
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def parse_object(data, errors="strict"):
    """Return the JSON object that data (bytes) is, None where it is no strict and sane one."""
    try:
        text = data.decode("utf-8", errors).strip("\ufeff \t\r\n")
        value, end = DECODER.raw_decode(text)
        brackets = data.count(b"{") + data.count(b"[")
        sane = end == len(text) and (brackets <= MAX_DEPTH or depth(value) <= MAX_DEPTH)
    except (ValueError, RecursionError):
        return None
    return value if sane and isinstance(value, dict) else None


class Log:
    """An open log, which ends where it ended when it was opened.

    mark is how far it is read: {"bytes": offset, "guard": checksum of the bytes before it}.
    """

    def __init__(self, name, file, state):
        """Start where state says; at 0 if the guard does not match: it is another log then."""
        self.name, self.file = name, file
        self.size = file.seek(0, os.SEEK_END)
        saved = state["resume"].get(name)
        offset = saved["bytes"] if saved else state[name + "_bytes"]
        file.seek(max(0, offset - GUARD_BYTES))
        self.tail = file.read(min(offset, GUARD_BYTES))
        guard = zlib.crc32(self.tail)
        if offset > self.size or saved and guard != saved["guard"]:
            offset, guard, self.tail = file.seek(0), 0, b""
        self.mark = state["resume"][name] = {"bytes": offset, "guard": guard}

    def items(self):
        """Yield (log name, mark, bytes of the line, event); a line that is none is passed over.

        A last line without newline counts if it is a whole event, else it waits for its rest.
        """
        offset, tail, skipping = self.mark["bytes"], self.tail, False
        while offset < self.size:
            line = self.file.readline(min(LINE_BYTES + 1, self.size - offset))
            ended = line.endswith(b"\n")
            offset += len(line)
            tail = (tail + line)[-GUARD_BYTES:]
            if not ended and len(line) > LINE_BYTES:
                skipping = True
                continue
            event = None if skipping else parse_object(line, "replace")
            if event is None and not ended:
                return
            skipping = False
            self.mark = {"bytes": offset, "guard": zlib.crc32(tail)}
            if event is not None:
                yield self.name, self.mark, len(line), event


@contextmanager
def open_logs(run):
    """Yield the state, and the logs where it says; one that cannot be read is left out."""
    state, logs = load_state(run), []
    with ExitStack() as files:
        for name in FIELDS:
            with suppress(OSError):
                file = files.enter_context(open_regular(run.folder, name + ".jsonl"))
                logs.append(Log(name, file, state))
        yield state, logs


def read_items(logs):
    return chain.from_iterable(log.items() for log in logs)


def is_behind(state, logs):
    """Tell whether the logs are done further than state's *_bytes say."""
    return any(log.mark["bytes"] > state[log.name + "_bytes"] for log in logs)


# Shape: from events to request bodies.

ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def shape_event(log, mode, event):
    """Return the payload of an event: what its log and mode allow, without nulls."""
    payload = {"type": log}
    for field, default in ALLOWED[log, mode]:
        value = event.get(field, default)
        if value is not None:
            payload[field] = value
    return payload


def make_batches(items, mode):
    """Yield lists of (log, mark, payload): up to BATCH_EVENTS, and BODY_BYTES of log lines."""
    batch, total = [], 0
    for log, mark, size, event in items:
        total += size
        if len(batch) == BATCH_EVENTS or batch and total > BODY_BYTES:
            yield batch
            batch, total = [], size
        batch.append((log, mark, shape_event(log, mode, event)))
    if batch:
        yield batch


def encode_body(gate, batch):
    """Return the body for a batch, strict JSON in UTF-8; lone surrogates are replaced."""
    payload = {"telemetryMode": gate.mode, "events": [event for _, _, event in batch]}
    if gate.device_id:
        payload["deviceId"] = gate.device_id
    text = ENCODER.encode(payload)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# Send: one kept connection, one retry, bounded time.

def classify(answer):
    """Return the result of an Answer. Contract: Error Handling."""
    if not 200 <= answer.status < 300:
        known = {0: NETWORK_ERROR, 401: AUTH_FAILED, 413: TOO_LARGE}
        return known.get(answer.status, SERVER_ERROR)
    content = parse_object(answer.body)
    if content is None:
        return NETWORK_ERROR
    code = content.get("code")
    return OK if code == 0 and type(code) is int else SERVER_ERROR


def retry_delay(answer, now):
    """Return the seconds to wait before a retry, None where the answer calls for none.

    Retry-After, of a 429, is seconds or an HTTP-date; now is seconds since the epoch.
    """
    delay = RETRY_SECONDS.get(answer.status)
    if answer.status == 429:
        import email.utils
        with suppress(TypeError, ValueError, OverflowError):
            date = email.utils.parsedate_tz(answer.retry_after)
            delay = email.utils.mktime_tz(date) - now if date else int(answer.retry_after)
        delay = min(max(delay, 0), REQUEST_SECONDS)
    return delay


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
    proxy = urllib.request.getproxies().get("https")
    if proxy and urllib.request.proxy_bypass(url.netloc):
        proxy = None
    hop = urllib.parse.urlsplit(proxy if "://" in proxy else "//" + proxy) if proxy else url
    connection = http.client.HTTPSConnection(
        hop.hostname, hop.port, timeout=REQUEST_SECONDS, context=ssl.create_default_context())
    if proxy:
        login = urllib.parse.unquote("%s:%s" % (hop.username, hop.password)).encode()
        login = {"Proxy-Authorization": "Basic " + base64.b64encode(login).decode()}
        connection.set_tunnel(url.hostname, url.port, login if hop.password else {})
    return connection


class Sender:
    """Posts batches over one kept connection, and notes in state what is accepted."""

    def __init__(self, run, gate, state, fd):
        import threading
        self.run, self.gate, self.state, self.fd = run, gate, state, fd
        self.connection, self.due = None, float("inf")
        threading.Thread(target=self.supervise, daemon=True).start()

    def supervise(self):
        """End the process when a request is overdue: a hung DNS lookup ends no other way."""
        while self.run.clock.monotonic() < self.due:
            time.sleep(0.1)
        save_state(self.run, self.state, NETWORK_ERROR, self.fd)
        os._exit(0)

    def post(self, body):
        """Post a body, with the contract's one retry; return the result."""
        for last in (False, True):
            if read_object(self.run.home, "config") != self.gate.config:
                raise Stop("config has changed")  # consent may have been withdrawn
            left = self.run.deadline - self.run.clock.monotonic()
            if left <= 0:
                return NETWORK_ERROR
            answer = self.request(body, min(left, REQUEST_SECONDS))
            result, delay = classify(answer), retry_delay(answer, self.run.clock.time())
            self.run.say("%d bytes: HTTP status %d, %s" % (len(body), answer.status, result))
            if delay is None or last:
                return result
            self.run.say("trying once more in %d s" % delay)
            self.run.clock.sleep(min(delay, left))

    def request(self, body, seconds):
        """Make one request; return its Answer."""
        import http.client
        self.due = self.run.clock.monotonic() + seconds
        try:
            return self.exchange(body)
        except (OSError, http.client.HTTPException, ValueError, Stop) as error:
            # only our own text is shown: another might hold the token
            self.run.say(str(error) if isinstance(error, Stop) else type(error).__name__)
            return NO_ANSWER
        finally:
            self.due = float("inf")

    def exchange(self, body):
        import select
        url = parse_endpoint(self.gate.base_url)
        link = self.connection = self.connection or open_connection(url)
        if link.sock and select.select([link.sock], [], [], 0)[0]:
            link.close()  # the server has closed it: start anew
        link.request("POST", url.path, body, {
            "Authorization": "Bearer " + self.gate.token, "Content-Type": "application/json",
            "User-Agent": "secondme_sync/" + VERSION})
        response = link.getresponse()
        content = response.read(ANSWER_BYTES)
        if not response.isclosed():
            link.close()
        return Answer(response.status, response.getheader("Retry-After"), content)

    def accept(self, batch):
        self.state["resume"].update({log: mark for log, mark, _ in batch})
        save_state(self.run, self.state)

    def close(self):
        if self.connection:
            self.connection.close()


def deliver(batches, gate, post, accept):
    """Post batches up to the first that fails, in halves where one is too large.

    accept(part) is called for each part that is accepted. Return the result.
    """
    for batch in batches:
        body, half = encode_body(gate, batch), len(batch) // 2
        result = TOO_LARGE if half and len(body) > BODY_BYTES else post(body)
        if result == OK:
            accept(batch)
        elif result == TOO_LARGE:
            halves = batch[:half], batch[half:]
            result = deliver(halves, gate, post, accept) if half else SERVER_ERROR
        if result != OK:
            return result
    return OK


# Record: one state file, replaced as a whole.

def load_state(run):
    """Return the state: the contract's four keys, and resume with a mark (see Log) per log."""
    saved = read_object(run.folder, ".sync-offsets")
    state = {name + "_bytes": whole(saved, name + "_bytes") for name in FIELDS}
    state.update({key: saved.get(key) for key in ("last_sync_ts", "last_sync_result")})
    marks = saved.get("resume")
    marks = marks if isinstance(marks, dict) else {}
    state["resume"] = {name: {key: whole(marks[name], key) for key in ("bytes", "guard")}
                       for name in FIELDS if isinstance(marks.get(name), dict)}
    return state


def whole(mapping, key):
    value = mapping.get(key)
    return value if type(value) is int and value >= 0 else 0


def save_state(run, state, result=None, fd=None):
    """Replace the state file; a run ends with a result, and with fd, its folder's, flushed."""
    if result or not state["last_sync_result"]:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.clock.time()))
        state.update(last_sync_ts=now, last_sync_result=result or NETWORK_ERROR)
    path = os.path.join(run.folder, ".sync-offsets")
    temp = path + ".tmp"
    try:
        mode = os.stat(path).st_mode & 0o777 | 0o400 if os.path.exists(path) else 0o600
        with suppress(FileNotFoundError):
            os.unlink(temp)
        with open(temp, "xb", 0) as file:
            os.chmod(temp, mode)
            file.write(json.dumps(state).encode())
            if fd is not None:
                os.fsync(file.fileno())
        os.replace(temp, path)
        if fd is not None:
            os.fsync(fd)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temp)
        raise Stop("progress cannot be recorded: " + os.strerror(error.errno))


@contextmanager
def lock(run):
    """Keep other runs out by flock of the folder, which ends with the process; yield its fd."""
    fd = os.open(run.folder, os.O_RDONLY) if fcntl and os.path.isdir(run.folder) else None
    try:
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    except BlockingIOError:
        raise Stop("another run is at work")
    finally:
        if fd is not None:
            os.close(fd)


# The run, and the command line.

def sync(run):
    """send what is pending"""
    gate = enter(run)
    with lock(run) as fd, open_logs(run) as (state, logs):
        batches = make_batches(read_items(logs), gate.mode)
        first, result = next(batches, None), OK
        if first:
            save_state(run, state)  # who cannot record must not send
            with closing(Sender(run, gate, state, fd)) as sender:
                result = deliver(chain([first], batches), gate, sender.post, sender.accept)
        elif not is_behind(state, logs):
            raise Stop("nothing is pending")
        finish(run, state, logs, result, fd)


def finish(run, state, logs, result, fd):
    """Record the end of a run: *_bytes move where all is done."""
    for log in logs if result == OK else ():
        state["resume"][log.name] = log.mark
        state[log.name + "_bytes"] = log.mark["bytes"]
    save_state(run, state, result, fd)
    run.say("result: " + result)


def dry_run(run):
    """print the bodies that would be posted now; change nothing"""
    gate, counts = enter(run), Counter()
    url = parse_endpoint(gate.base_url).geturl()

    def show(body):
        if sys.stdout.isatty():
            body = json.dumps(json.loads(body.decode()), indent=2, ensure_ascii=False).encode()
        sys.stdout.buffer.write(body + b"\n")
        return OK

    with open_logs(run) as (_, logs):
        deliver(make_batches(read_items(logs), gate.mode), gate, show,
                lambda batch: counts.update(log for log, _, _ in batch))
    run.say("%s mode, to %s: %s" % (gate.mode, url, describe(counts)))


def describe(counts):
    return ", ".join("%d %s" % (counts[log], log) for log in FIELDS) + " events"


def status(run):
    """say how things stand"""
    gate = read_gate(run)
    try:
        endpoint = parse_endpoint(gate.base_url).geturl()
    except Stop as stop:
        endpoint = str(stop)
    with open_logs(run) as (state, logs):
        counts = Counter(item[0] for item in read_items(logs))
    last = "%(last_sync_result)s at %(last_sync_ts)s" % state
    print("telemetry: %s (decided by %s)" % (gate.mode, gate.source))
    print("endpoint:  " + endpoint)
    print("logged in: " + ("yes" if gate.token else "no"))
    print("pending:   " + describe(counts))
    print("last sync: " + (last if state["last_sync_result"] else "never"))


def pending(run):
    """print yes or no: is there something to do"""
    print("yes" if has_work(run) else "no")


def has_work(run):
    with suppress(Stop):
        enter(run)
        with open_logs(run) as (state, logs):
            return any(read_items(logs)) or is_behind(state, logs)
    return False


def skip_pending(run):
    """mark all that is logged so far as never to be sent"""
    with lock(run) as fd, open_logs(run) as (state, logs):
        counts = Counter(item[0] for item in read_items(logs))
        if len(logs) < len(FIELDS):
            raise Stop("a log cannot be read")
        if counts or is_behind(state, logs):
            finish(run, state, logs, OK, fd)
    print("never to be sent: " + describe(counts))


def background(run):
    """sync in a process of its own; return at once"""
    if has_work(run) and (not hasattr(os, "fork") or detach()):
        sync(run)


def detach():
    """Go on in a new process with a session and null streams of its own: True there."""
    if os.fork():
        return False
    os.setsid()
    os.chdir(os.sep)
    os.closerange(0, 1024)
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)
    return True


def parse_args(argv):
    import argparse
    parser = argparse.ArgumentParser("secondme_sync", description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group()
    for action in (dry_run, status, pending, skip_pending, background):
        group.add_argument("--" + action.__name__.replace("_", "-"), dest="action", const=action,
                           action="store_const", default=sync, help=action.__doc__)
    parser.add_argument("--max-time", type=float, default=RUN_SECONDS, metavar="S",
                        help="seconds for the whole run (default: %(default)s)")
    parser.add_argument("--dir", metavar="D", help="state directory (default: ~/.secondme)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what happens")
    parser.add_argument("--version", action="version", version="secondme_sync " + VERSION)
    args = parser.parse_args(argv)
    return args.action, args.dir, args.max_time, args.verbose


def say(text):
    if sys.stderr:
        print("secondme_sync: " + text, file=sys.stderr, flush=True)


def main(argv=None):
    """Run the command line (default: sys.argv); return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    action, home, seconds, verbose = parse_args(argv) if argv else (sync, "", RUN_SECONDS, False)
    home = os.path.abspath(home or os.path.expanduser("~/.secondme"))
    verbose = verbose or action in (dry_run, status, skip_pending)
    run = Run(home, os.path.join(home, "analytics"), os.environ, time.monotonic() + seconds,
              say if verbose else lambda text: None, time)
    try:
        action(run)
        return 0
    except Stop as stop:
        run.say("nothing is sent: %s" % stop)
    except (Exception, KeyboardInterrupt) as error:  # the last resort: never a visible error
        run.say("stopped: " + type(error).__name__)  # its text might hold the token
    return int(action is skip_pending)


if __name__ == "__main__":
    code = main()
    with suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # without a second try to flush, which would show an error
