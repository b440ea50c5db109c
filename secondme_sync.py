#!/usr/bin/env python3
"""Upload pending SecondMe telemetry: one file, standard library only, Python 3.6 or newer.

Five steps; a run ends silently, with exit code 0, at the first that says no:

  gate    consent (config, SM_TEL, DO_NOT_TRACK), then the access token
  read    the events in the logs beyond those already accepted
  shape   each to the fields that its mode allows, 100 in a body
  send    by POST to {baseUrl}/api/secondme/telemetry/events/batch
  record  after each accepted body, how far the logs are done

In ~/.secondme it reads config, credentials, .device-id, analytics/{usage,feedback}.jsonl
and writes analytics/.sync-offsets. Contract: SecondMe's "Telemetry Sync".
"""
import sys
if __name__ == "__main__" and not sys.path[0]:
    del sys.path[0]  # nothing from the working directory
import json
import os
import time
import zlib
from collections import Counter, namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress

try:
    import fcntl
except ImportError:  # not POSIX: no lock
    fcntl = None

VERSION = "1.0.0"
BASE_URL = "https://app.mindos.com/gate/lab"
PATH = "/api/secondme/telemetry/events/batch"
MODES = "off", "anonymous", "community"  # from least to most consent

BATCH_EVENTS = 100
BODY_BYTES = 1 << 19  # a single event may be larger
LINE_BYTES = 1 << 20  # of a log line or a small file
ANSWER_BYTES = 1 << 16  # read of an answer
GUARD_BYTES = 256  # before an offset, to know the log again
MAX_DEPTH = 64  # of nesting in an event
REQUEST_SECONDS = 10  # a request; also the longest Retry-After
RUN_SECONDS = 30  # a run; see --max-time
RETRY_SECONDS = {429: 5, 502: 2, 503: 2, 504: 2}  # before the one retry

FIELDS = {  # in sending order; * in community mode alone
    "usage": "skill ts version os arch *session event duration_s outcome error_class "
             "*error_message *user_intent phases_used",
    "feedback": "skill ts version os arch *session outcome *actions_summary *error_summary "
                "*comment *user_intent phases_used references_loaded rating issues"}
DEFAULTS = dict(skill="secondme", ts="", phases_used=[], references_loaded=[], issues=[])
ALLOWED = {(log, mode): [(field.strip("*"), DEFAULTS.get(field)) for field in fields.split()
                         if mode == "community" or "*" not in field]
           for log, fields in FIELDS.items() for mode in MODES}

Run = namedtuple("Run", "home folder environ deadline say clock")
Gate = namedtuple("Gate", "mode source base_url config token device_id")


class Stop(Exception):
    """A reason to go no further, fit to print."""


# Gate.

def consent(config, environ):
    """Return the least (mode, source) that is allowed. Contract: Prerequisites 1."""
    free = environ.get("DO_NOT_TRACK", "") in ("", "0", "false")
    votes = {"config": config.get("telemetry"), "SM_TEL": environ.get("SM_TEL") or "community",
             "DO_NOT_TRACK": "community" if free else "off"}
    ranks = {name: MODES.index(mode) if mode in MODES else 0 for name, mode in votes.items()}
    source = min(ranks, key=ranks.get)
    return MODES[ranks[source]], source


def open_regular(*path):
    """Open a file to read, an empty one if missing; OSError if not regular."""
    path = os.path.join(*path)
    if not os.path.lexists(path):
        path = os.devnull
    elif not os.path.isfile(path):
        raise OSError("a FIFO would block")
    return open(path, "rb")


def read_small(*path):
    """Return the bytes of a small file, none if unreadable."""
    with suppress(OSError), open_regular(*path) as file:
        return file.read(LINE_BYTES)
    return b""


def printable(text):
    return text if isinstance(text, str) and all("!" <= char <= "~" for char in text) else ""


def read_gate(run, strict=True):
    """Return the Gate; if strict, Stop without consent or token. Contract: Prerequisites 1, 2."""
    text = read_small(run.home, "config")
    config = parse_object(text) or {}
    mode, source = consent(config, run.environ)
    if strict and mode == "off":
        raise Stop(f"telemetry is off (decided by {source})")
    credentials = parse_object(read_small(run.home, "credentials")) or {}
    token = printable(credentials.get("accessToken"))
    if strict and not token:
        raise Stop("not logged in")
    device_id = read_small(run.home, ".device-id") if mode == "community" else b""
    device_id = device_id.decode("utf-8", "replace").strip()
    return Gate(mode, source, config.get("baseUrl", BASE_URL), text, token,
                "" if "\ufffd" in device_id else device_id)


def parse_endpoint(base_url):
    """Return the split URL to post to; Stop if it must not be contacted."""
    import socket
    import urllib.parse
    with suppress(AttributeError, ValueError, OSError):
        url = urllib.parse.urlsplit(base_url.rstrip("/") + PATH)
        host = url.hostname or ""
        safe = url.scheme == "https" or url.scheme == "http" and (
            host in ("localhost", "::1") or socket.inet_pton(socket.AF_INET, host)[0] == 127)
        clean = printable(base_url) and not set("@?#").intersection(base_url)
        if safe and clean and host and url.port != 0:
            return url
    raise Stop("baseUrl must be https (http: this machine only) with no user, query or fragment")


# Read.

def parse_float(text):
    if not abs(float(text)) < float("inf"):
        raise ValueError(text)
    return float(text)


DECODER = json.JSONDecoder(  # 309 digits may exceed a float
    parse_float=parse_float, parse_constant=parse_float,
    parse_int=lambda text: int(text) if len(text) < 309 else parse_float(text))


def depth(value):
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def parse_object(data, errors="strict"):
    """Return the JSON object in data (bytes), None if there is none, strict and sane."""
    try:
        text = data.decode("utf-8", errors).strip("\ufeff\0 \t\r\n")
        value, end = DECODER.raw_decode(text)
        sane = end == len(text) and (data.count(b"{") + data.count(b"[") <= MAX_DEPTH
                                     or depth(value) <= MAX_DEPTH)
    except (ValueError, RecursionError):
        return None
    return value if sane and isinstance(value, dict) else None


class Log:
    """An open log, up to its end as found.

    mark is how far it is read: {"bytes": offset, "guard": CRC-32 of what precedes}.
    """

    def __init__(self, name, file, state):
        """Start where state says, or at 0 if the guard shows another log."""
        self.name, self.file = name, file
        self.size = file.seek(0, os.SEEK_END)
        try:
            offset, saved = whole(state["resume"][name]["bytes"]), state["resume"][name]["guard"]
        except (KeyError, TypeError):  # no mark of ours
            offset, saved = state[name + "_bytes"], None
        offset = offset if offset <= self.size else 0
        file.seek(max(0, offset - GUARD_BYTES))
        self.tail = file.read(min(offset, GUARD_BYTES))
        guard = zlib.crc32(self.tail)
        if saved not in (None, guard):
            offset, guard, self.tail = 0, 0, b""
        self.mark = {"bytes": offset, "guard": guard}
        if self.size or not state["resume"][name]:
            state["resume"][name] = self.mark

    def items(self):
        """Yield (mark, bytes of the line, event); a torn last line waits for its rest."""
        offset, tail, skipping = self.mark["bytes"], self.tail, False
        self.file.seek(offset)
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
            mark, skipping = {"bytes": offset, "guard": zlib.crc32(tail)}, False
            if event is not None:
                yield mark, len(line), event
            self.mark, self.tail = mark, tail


@contextmanager
def open_logs(run, locked=False):
    """Yield (state, readable logs, fd of the folder if it is to be locked)."""
    fd = None
    with ExitStack() as stack:
        if locked and fcntl and os.path.isdir(run.folder):
            fd = os.open(run.folder, os.O_RDONLY)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Stop("another run is at work")
            except OSError:  # a file system without locks
                pass
        state, logs = load_state(run), []
        for name in FIELDS:
            with suppress(OSError):
                file = stack.enter_context(open_regular(run.folder, name + ".jsonl"))
                logs.append(Log(name, file, state))
        yield state, logs, fd


def count(logs):
    return Counter(log.name for log in logs for _ in log.items())


def check_pending(state, logs):
    """Stop if there is no event to send and no end to record."""
    if not any(any(log.items()) or log.mark["bytes"] not in (0, state[log.name + "_bytes"])
               for log in logs):
        raise Stop("nothing is pending")


# Shape.

ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


def shape_event(log, mode, event):
    """Return an event's payload: what its log and mode allow, without nulls."""
    payload = {"type": log}
    for field, default in ALLOWED[log, mode]:
        value = event.get(field, default)
        if value is not None:
            payload[field] = value
    return payload


def make_batches(logs, mode):
    """Yield lists of (log, mark, payload): up to BATCH_EVENTS, and BODY_BYTES of log lines."""
    batch, total = [], 0
    for log in logs:
        for mark, size, event in log.items():
            total += size
            if len(batch) == BATCH_EVENTS or batch and total > BODY_BYTES:
                yield batch
                batch, total = [], size
            batch.append((log.name, mark, shape_event(log.name, mode, event)))
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


# Send.

def classify(status, body):
    """Return the result of an answer; status 0 is none. Contract: Error Handling."""
    if not 200 <= status < 300:
        return {0: "network_error", 401: "auth_failed", 413: "too_large"}.get(
            status, "server_error")
    answer = parse_object(body)
    if answer is None:
        return "network_error"
    code = answer.get("code")
    return "ok" if code == 0 and type(code) is int else "server_error"


def retry_delay(status, after, now):
    """Return the seconds before a retry, None for no retry; now is epoch seconds."""
    delay = RETRY_SECONDS.get(status)
    if status == 429:
        import email.utils
        with suppress(TypeError, ValueError, OverflowError):
            date = email.utils.parsedate_tz(after)
            delay = email.utils.mktime_tz(date) - now if date else int(after)
        delay = min(max(delay, 0), REQUEST_SECONDS)
    return delay


def open_connection(url):
    """Return a connection to url; a proxy, as urllib finds it, sees only a TLS tunnel."""
    import http.client
    if url.scheme == "http":
        return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=REQUEST_SECONDS)
    import base64
    import urllib.request
    proxy = urllib.request.getproxies().get("https")
    if urllib.request.proxy_bypass(url.netloc):
        proxy = None
    hop = urllib.parse.urlsplit(proxy if "://" in proxy else "//" + proxy) if proxy else url
    link = http.client.HTTPSConnection(hop.hostname, hop.port or 443, timeout=REQUEST_SECONDS)
    if proxy:
        login = base64.b64encode(urllib.parse.unquote(f"{hop.username}:{hop.password}").encode())
        headers = {"Proxy-Authorization": "Basic " + login.decode()} if hop.password else {}
        link.set_tunnel(url.hostname, url.port or 443, headers)
    return link


class Sender:
    """Posts bodies over one connection, in bounded time."""

    def __init__(self, run, gate):
        import threading
        self.run, self.gate, self.due = run, gate, run.deadline
        self.url = parse_endpoint(gate.base_url)
        self.link = open_connection(self.url)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        """End the process in time; nothing else ends a hung DNS lookup."""
        while self.run.clock.monotonic() < self.due:
            time.sleep(0.1)
        if self.due:
            self.run.say("time is up")
            os._exit(0)

    def post(self, body):
        """Post a body, once more if the contract says so; return the result."""
        clock, say = self.run.clock, self.run.say
        for last in (False, True):
            if read_small(self.run.home, "config") != self.gate.config:
                raise Stop("config has changed")  # consent withdrawn?
            self.due = min(clock.monotonic() + REQUEST_SECONDS, self.run.deadline)
            status, after, answer = self.request(body)
            self.due = self.run.deadline
            result, delay = classify(status, answer), retry_delay(status, after, clock.time())
            say(f"{len(body)} bytes: HTTP {status}, {result}")
            if delay is None or last:
                return result
            say(f"retry in {delay:.0f} s")
            clock.sleep(delay)

    def request(self, body):
        """Return (status, Retry-After, body) of one request, status 0 if it fails."""
        import http.client
        link = self.link
        headers = {"Authorization": "Bearer " + self.gate.token,
                   "Content-Type": "application/json", "User-Agent": "secondme_sync/" + VERSION}
        try:
            if not link.sock:
                link.connect()
            with suppress(ConnectionError):  # it may answer early
                link.request("POST", self.url.path, body, headers)
            reply = link.getresponse()
            answer = reply.read(ANSWER_BYTES)
            if not reply.isclosed() or reply.status != 200:
                link.close()
            return reply.status, reply.getheader("Retry-After"), b"" if reply.length else answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.run.say(type(error).__name__)  # its text might hold the token
            return 0, "", b""

    def close(self):
        self.due = 0
        self.link.close()


def deliver(batches, gate, post, accept):
    """Post batches, halved if too large, until one fails; return the result."""
    for batch in batches:
        body, half = encode_body(gate, batch), len(batch) // 2
        result = "too_large" if half and len(body) > BODY_BYTES else post(body)
        if result == "ok":
            accept(batch)
        elif result == "too_large":
            halves = batch[:half], batch[half:]
            result = deliver(halves, gate, post, accept) if half else "server_error"
        if result != "ok":
            return result
    return "ok"


# Record.

def load_state(run):
    """Return the state: the contract's four keys, and resume: a mark per log."""
    saved = parse_object(read_small(run.folder, ".sync-offsets")) or {}
    state = {name + "_bytes": whole(saved.get(name + "_bytes")) for name in FIELDS}
    state.update((key, saved.get(key)) for key in ("last_sync_ts", "last_sync_result"))
    marks = saved.get("resume")
    state["resume"] = {name: marks.get(name) if isinstance(marks, dict) else None
                       for name in FIELDS}
    return state


def whole(value):
    return value if type(value) is int and value >= 0 else 0


def save_state(run, state, result="", fd=None):
    """Replace the state file; Stop if that fails. With fd, its folder, flush both to disk."""
    if result:
        now = time.gmtime(run.clock.time())
        state.update(last_sync_ts=time.strftime("%Y-%m-%dT%H:%M:%SZ", now), last_sync_result=result)
    path = os.path.join(run.folder, ".sync-offsets")
    temp = path + ".tmp"
    try:
        mode = os.stat(path).st_mode & 0o777 | 0o400 if os.path.exists(path) else 0o600
        with suppress(FileNotFoundError):
            os.unlink(temp)
        with open(temp, "x") as file:
            os.chmod(temp, mode)
            file.write(json.dumps(state))
            if fd is not None:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temp, path)
        if fd is not None:
            os.fsync(fd)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temp)
        raise Stop(f"progress cannot be recorded: {error.strerror}")


def finish(run, state, logs, result, fd):
    for log in logs:
        if result == "ok" and log.size:
            state["resume"][log.name] = log.mark
            state[log.name + "_bytes"] = log.mark["bytes"]
    save_state(run, state, result, fd)


# The run, and the command line.

def sync(run):
    """send what is pending"""
    gate = read_gate(run)
    with open_logs(run, locked=True) as (state, logs, fd):
        check_pending(state, logs)
        save_state(run, state, "network_error")  # until the end; who cannot record must not send

        def accept(batch):
            state["resume"].update({log: mark for log, mark, _ in batch})
            save_state(run, state)

        with closing(Sender(run, gate)) as sender:
            result = deliver(make_batches(logs, gate.mode), gate, sender.post, accept)
        finish(run, state, logs, result, fd)


def dry_run(run):
    """print the bodies that would be posted now; change nothing"""
    gate, counts = read_gate(run), Counter()
    url = parse_endpoint(gate.base_url).geturl()

    def show(body):
        if sys.stdout.isatty():
            body = json.dumps(json.loads(body), indent=2, ensure_ascii=False).encode()
        sys.stdout.buffer.write(body + b"\n")
        return "ok"

    with open_logs(run) as (state, logs, _):
        check_pending(state, logs)
        deliver(make_batches(logs, gate.mode), gate, show,
                lambda batch: counts.update(log for log, _, _ in batch))
    run.say(f"{gate.mode} mode, to {url}: {describe(counts)}")


def describe(counts):
    return ", ".join(f"{counts[name]} {name}" for name in FIELDS) + " events"


def status(run):
    """say how things stand"""
    gate = read_gate(run, strict=False)
    try:
        endpoint = parse_endpoint(gate.base_url).geturl()
    except Stop as stop:
        endpoint = f"refused: {stop}"
    with open_logs(run) as (state, logs, _):
        print(f"telemetry: {gate.mode} (decided by {gate.source})\nendpoint:  {endpoint}")
        print("logged in:", "yes" if gate.token else "no")
        print("pending:  ", describe(count(logs)))
        print("last sync:", state["last_sync_result"] or "never", state["last_sync_ts"] or "")


def pending(run):
    """print yes or no: is there something to do"""
    try:
        check_work(run)
        print("yes")
    except Stop:
        print("no")


def check_work(run):
    read_gate(run)
    with open_logs(run) as (state, logs, _):
        check_pending(state, logs)


def skip_pending(run):
    """mark all that is logged so far as never to be sent"""
    with open_logs(run, locked=True) as (state, logs, fd):
        counts = count(logs)
        if len(logs) < len(FIELDS):
            raise Stop("a log cannot be read")
        if counts:
            finish(run, state, logs, "ok", fd)
    print("never to be sent:", describe(counts))


def background(run):
    """sync in a process of its own; return at once"""
    check_work(run)
    if not hasattr(os, "fork") or detach():
        sync(run)


def detach():
    """Return True in a new process."""
    if os.fork():
        return False
    os.setsid()
    os.closerange(0, 1 << 16)
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)
    return True


def parse_args(argv):
    import argparse
    parser = argparse.ArgumentParser("secondme_sync", "%(prog)s [flags]")
    group = parser.add_mutually_exclusive_group()
    for action in (dry_run, status, pending, skip_pending, background):
        group.add_argument("--" + action.__name__.replace("_", "-"), dest="action", const=action,
                           action="store_const", default=sync, help=action.__doc__)
    parser.add_argument("--max-time", type=float, default=RUN_SECONDS, metavar="S",
                        help="seconds for a run (default: %(default)s)")
    parser.add_argument("--dir", help="instead of ~/.secondme")
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what happens")
    parser.add_argument("--version", action="version", version="secondme_sync " + VERSION)
    args = parser.parse_args(argv)
    return args.action, args.dir, args.max_time, args.verbose


def say(text):
    with suppress(AttributeError, OSError, ValueError):  # closed
        sys.stderr.write(f"secondme_sync: {text}\n")
        sys.stderr.flush()


def main(argv):
    action, home, seconds, verbose = parse_args(argv) if argv else (sync, "", RUN_SECONDS, False)
    home = home or os.path.expanduser("~/.secondme")
    run = Run(home, os.path.join(home, "analytics"), os.environ, time.monotonic() + seconds,
              say if verbose or action in (dry_run, status, skip_pending) else lambda _: None, time)
    try:
        action(run)
        return 0
    except Stop as stop:
        run.say(f"stopped: {stop}")
    except (Exception, KeyboardInterrupt) as error:  # the last resort
        run.say("stopped: " + type(error).__name__)
    return int(action is skip_pending)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(code)  # a flush could fail aloud
