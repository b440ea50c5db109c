#!/usr/bin/env python3
"""Upload pending SecondMe telemetry: one file, standard library only, Python 3.6 or newer.

  gate    consent (config, SM_TEL, DO_NOT_TRACK), then the access token
  read    the events in the logs beyond those already accepted
  shape   each to the fields that its mode allows, 100 in a body
  send    by POST to {baseUrl}/api/secondme/telemetry/events/batch
  record  after each accepted body, how far the logs are done

A run ends, silently, at the first step that says no. Under ~/.secondme it writes nothing but
analytics/.sync-offsets. Contract: references/telemetry-sync.md of mindverse/second-me-skills.
"""
import os
import sys

if __name__ == "__main__":
    sys.excepthook = lambda *error: os._exit(0)  # silent, even if Ctrl-C comes while it imports
    if not sys.path[0]:
        del sys.path[0]  # pasted: import nothing from the working directory

import json
import time
import zlib
from contextlib import ExitStack, closing, contextmanager, suppress

VERSION = "1.1.0"
BASE_URL = "https://app.mindos.com/gate/lab"
PATH = "/api/secondme/telemetry/events/batch"
BATCH_EVENTS = 100
BODY_BYTES = 512 * 1024  # a single event may be larger
LINE_BYTES = 1024 * 1024  # of a log line, and of a small file
ANSWER_BYTES = 64 * 1024  # read of an answer
MAX_DEPTH = 64  # of nesting in an event
FINGERPRINT_BYTES = 256  # at the beginning of a log, to know it again
RECORD_BYTES = 512  # of the state: a sector, which a disk writes whole or not at all
CONNECT_SECONDS = 4  # for each address of a host
REQUEST_SECONDS = 10  # for a request; also the longest Retry-After
RUN_SECONDS = 30  # for a run; see --max-time
RETRY_SECONDS = {429: 5, 502: 2, 503: 2, 504: 2}  # before the one retry

ANONYMOUS = {  # the fields of each log that anonymous mode sends
    "usage": ["skill", "ts", "version", "os", "arch", "event", "duration_s", "outcome",
              "error_class", "phases_used"],
    "feedback": ["skill", "ts", "version", "os", "arch", "outcome", "phases_used",
                 "references_loaded", "rating", "issues"]}
COMMUNITY = {  # those that community mode adds
    "usage": ["session", "error_message", "user_intent"],
    "feedback": ["session", "actions_summary", "error_summary", "comment", "user_intent"]}
DEFAULTS = {  # of fields that an event lacks; null and other missing ones are not sent
    "skill": "secondme", "ts": "", "phases_used": [], "references_loaded": [], "issues": []}
LOGS = list(ANONYMOUS)
NO_MARK = {"bytes": 0, "anonymous": 0, "fingerprint": None}  # see Log


class Stop(Exception):
    """A reason to go no further, fit to print."""


# Gate: consent, token, endpoint. Contract: Prerequisites.
def consent(config, environ):
    """Return (mode, reason): what config (bytes) allows, or less if the environment does."""
    telemetry = member(parse_object(config), "telemetry")
    limit = environ.get("SM_TEL") or "community"
    found = "telemetry in config is " + json.dumps(telemetry)
    if parse_object(config) is None:
        found = "config is not a JSON object" if config else "there is no readable config"
    if telemetry not in ("anonymous", "community"):
        return "off", found
    if limit not in ("anonymous", "community"):
        return "off", "SM_TEL is " + json.dumps(limit)
    if environ.get("DO_NOT_TRACK", "") not in ("", "0", "false"):
        return "off", "DO_NOT_TRACK is " + json.dumps(environ["DO_NOT_TRACK"])
    if limit == "anonymous" and telemetry == "community":
        return "anonymous", "SM_TEL is " + json.dumps(limit)
    return telemetry, found


class Run:
    """One call: where it works, for how many seconds, whom it tells, in what mode and why."""

    def __init__(self, home, environ, seconds=RUN_SECONDS, say=lambda text: None,
                 clock=time.monotonic, sleep=time.sleep):
        self.home, self.folder = home, os.path.join(home, "analytics")
        self.seconds, self.say, self.clock, self.sleep = seconds, say, clock, sleep
        self.deadline = self.due = clock() + seconds  # due: when a watched process is ended
        self.config = read_small(home, "config")
        self.mode, self.reason = consent(self.config, environ)
        self.base_url = member(parse_object(self.config), "baseUrl", BASE_URL)

    def token(self):
        """Return the access token, "" if there is none that fits a header."""
        return printable(member(parse_object(read_small(self.home, "credentials")), "accessToken"))

    def device_id(self, mode):
        """Return the device id that goes with events in a mode, "" for none."""
        data = read_small(self.home, ".device-id") if mode == "community" else b""
        text = data.decode("utf-8", "replace").strip()
        return "" if "\ufffd" in text else text

    def endpoint(self):
        """Return the split URL to post to; Stop if baseUrl must not be contacted."""
        import socket
        import urllib.parse
        with suppress(AttributeError, ValueError, OSError):
            url = urllib.parse.urlsplit(self.base_url.rstrip("/") + PATH)
            host = url.hostname or ""
            safe = url.scheme == "https" or url.scheme == "http" and (
                host in ("localhost", "::1") or socket.inet_pton(socket.AF_INET, host)[0] == 127)
            clean = printable(self.base_url) and not set("@?#").intersection(self.base_url)
            if safe and clean and host and url.port != 0:
                return url
        raise Stop("baseUrl must be https (http: this machine only), no user, query or fragment")

    def check(self):
        """Stop unless there is consent, a token, and something to send or record."""
        if self.mode == "off":
            raise Stop("telemetry is off: " + self.reason)
        if not self.token():
            raise Stop("not logged in")
        state = State(self.folder)
        with open_logs(state, self.mode) as logs:
            known = all(log.offset == state.record[log.name + "_bytes"] for log in logs)
            if known and not any(True for log in logs for _ in log.lines()):
                raise Stop("nothing is pending")


def printable(value):
    """Return a text of printable ASCII with no blank, "" for any other value."""
    return value if isinstance(value, str) and all("!" <= char <= "~" for char in value) else ""


class State:
    """What .sync-offsets says of the logs. Contract: Error Handling (Offsets), Rules."""

    def __init__(self, folder, file=None):
        """Read the record; what is missing or broken counts as 0, or as unknown."""
        self.folder, self.file = folder, file
        data = read_small(folder, ".sync-offsets")
        saved = parse_object(data[:RECORD_BYTES]) or parse_object(data)
        self.record = {name + "_bytes": whole(saved, name + "_bytes", 0) for name in LOGS}
        for key in "last_sync_ts", "last_sync_result":
            self.record[key] = printable(member(saved, key))[:20] or None
        self.marks = self.record["resume"] = {}
        for name in LOGS:
            mark = member(member(saved, "resume"), name)
            if whole(mark, "fingerprint", None) is None:  # an older script's, if any
                mark = {"bytes": self.record[name + "_bytes"]}
            self.marks[name] = {key: whole(mark, key, NO_MARK[key]) for key in NO_MARK}

    def save(self, logs, result):
        """Overwrite the record by one write: a reader or power cut meets the old or the new one."""
        if result in ("ok", "skipped"):
            self.record.update((log.name + "_bytes", log.offset) for log in logs)
        self.marks.update((log.name, log.mark()) for log in logs)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.record.update(last_sync_ts=now, last_sync_result=result)
        self.file.seek(0)
        self.file.write(json.dumps(self.record).ljust(RECORD_BYTES - 1).encode("ascii") + b"\n")
        self.file.flush()

    def flush(self):
        """Bring to disk what was written, then cut off what a longer file holds beyond."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.truncate(RECORD_BYTES)


@contextmanager
def locked_state(folder):
    """Yield the State, its file open and locked; Stop if another run has it, or it is no use."""
    path, flags = os.path.join(folder, ".sync-offsets"), os.O_RDWR | os.O_CREAT
    try:
        with open(os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600), "r+b") as file:
            lock_file(file)
            state, size = State(folder, file), file.seek(0, os.SEEK_END)
            if size < RECORD_BYTES:  # made longer first: no power cut between length and bytes
                file.write((b"" if size else b"{}").ljust(RECORD_BYTES - size))
                state.flush()
            if size == 0 and os.name == "posix":  # a new name
                directory = os.open(folder, os.O_RDONLY)
                os.fsync(directory)
                os.close(directory)
            try:
                yield state
            finally:
                state.flush()
    except OSError as error:
        raise Stop(f"progress cannot be recorded: {error.strerror}")


def lock_file(file):
    """Lock a file until it is closed or its process ends; Stop if another run has it."""
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(1 << 30)  # one byte, far from those that others read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # without locks, as on some network drives, POSIX goes on
        if os.name == "nt" or isinstance(error, BlockingIOError):
            raise Stop("another run is at work")


# Read: small files, JSON, logs.
def read_small(*path):
    """Return the bytes of a small file, none if it cannot be read."""
    path = os.path.join(*path)
    with suppress(OSError):
        if os.path.isfile(path):  # a FIFO would block
            with open(path, "rb") as file:
                return file.read(LINE_BYTES)
    return b""


def parse_float(text):
    if not abs(float(text)) < float("inf"):
        raise ValueError(text)
    return float(text)


DECODER = json.JSONDecoder(  # 309 digits may exceed a float
    parse_float=parse_float, parse_constant=parse_float,
    parse_int=lambda text: int(text) if len(text) < 309 else parse_float(text))


def parse_object(data):
    """Return the JSON object in text or UTF-8 bytes; None if it is none, strict and sane."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        text = text.strip("\ufeff\0 \t\r\n")  # a power cut may leave NULs in a log
        value, end = DECODER.raw_decode(text)
        sane = text.count("{") + text.count("[") <= MAX_DEPTH or depth(value) <= MAX_DEPTH
    except (ValueError, RecursionError):
        return None
    return value if sane and end == len(text) and isinstance(value, dict) else None


def depth(value):
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def member(value, key, default=None):
    """Return a member of a JSON object, the default if it lacks it or is no object."""
    return value.get(key, default) if isinstance(value, dict) else default


def whole(value, key, default):
    """Return a member that is a whole number of at most 63 bits, else the default."""
    number = member(value, key)
    return number if type(number) is int and 0 <= number < 1 << 63 else default


class Log:
    """An open log as it was found: up to offset it is done, up to anonymous it stays anonymous."""

    def __init__(self, name, file, mark, mode):
        self.name, self.file = name, file
        self.head = file.read(FINGERPRINT_BYTES)
        self.size = file.seek(0, os.SEEK_END)
        self.offset, self.anonymous = mark["bytes"], mark["anonymous"]
        known = mark["fingerprint"] is not None
        if known and mark != self.mark() or not known and self.offset > self.size:
            self.offset = self.anonymous = 0  # another log
        self.offset = min(self.offset, self.size)
        self.anonymous = self.size if mode == "anonymous" else min(self.anonymous, self.size)

    def mark(self):
        """Return where to go on, with a checksum of the log's beginning as far as it was seen."""
        seen = self.head[:max(self.offset, self.anonymous)]
        return {"bytes": self.offset, "anonymous": self.anonymous, "fingerprint": zlib.crc32(seen)}

    def lines(self):
        """Yield (begin, end, event) for each line to go on with, event None if it is none."""
        end = self.file.seek(self.offset)
        while end < self.size:
            begin, line = end, self.file.readline(min(LINE_BYTES, self.size - end))
            end += len(line)
            event = parse_object(line.decode("utf-8", "replace"))
            while event is None and line and not line.endswith(b"\n"):  # a longer one, to its end
                line = self.file.readline(min(LINE_BYTES, self.size - end))
                end += len(line)
            if event is None and not line:
                return  # a torn last line waits for its rest
            yield begin, end, event


@contextmanager
def open_logs(state, mode):
    """Yield the logs that can be read, each to go on where state says."""
    with ExitStack() as stack:
        logs = []
        for name in LOGS:
            path = os.path.join(state.folder, name + ".jsonl")
            with suppress(OSError):
                if os.path.isfile(path):
                    file = stack.enter_context(open(path, "rb"))
                    logs.append(Log(name, file, state.marks[name], mode))
        yield logs


# Shape: from events to a body. Contract: Sync Implementation, Anonymous Mode Stripping.
ALLOWED = {(mode, log): [(field, DEFAULTS.get(field)) for field in fields]
           for log in LOGS for mode, fields in (("anonymous", ANONYMOUS[log]),
                                                ("community", ANONYMOUS[log] + COMMUNITY[log]))}
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


def shape_event(mode, log, event):
    """Return an event's payload: the fields that its mode and log (a name) allow, no nulls."""
    payload = {"type": log}
    for field, default in ALLOWED[mode, log]:
        value = event.get(field, default)
        if value is not None:
            payload[field] = value
    return payload


def take_batch(logs, mode, limit):
    """Return (mode, payloads, {log: offset}) of what is first: of one mode, up to limit events."""
    batch_mode, payloads, offsets, size = None, [], {}, 0
    for log in logs:
        for begin, end, event in log.lines():
            if event is not None:
                kind, size = "anonymous" if begin < log.anonymous else mode, size + end - begin
                if payloads and (kind != batch_mode or len(payloads) == limit or size > BODY_BYTES):
                    return batch_mode, payloads, offsets
                batch_mode = kind
                payloads.append(shape_event(kind, log.name, event))
            offsets[log] = end
    return batch_mode, payloads, offsets


def encode_body(mode, payloads, device_id):
    """Return a body: strict JSON in UTF-8, with the device id in community mode alone."""
    body = {"telemetryMode": mode, "events": payloads}
    if device_id and mode == "community":
        body["deviceId"] = device_id
    text = ENCODER.encode(body).encode("utf-16", "surrogatepass")  # lone surrogates: replaced
    return text.decode("utf-16", "replace").encode("utf-8")


def deliver(logs, mode, device_id, post, save):
    """Post what is pending by post(body), save() where logs are accepted; return the result."""
    limit = BATCH_EVENTS
    while True:
        batch_mode, payloads, offsets = take_batch(logs, mode, limit)
        result = "ok"  # of lines to pass over, if there are only such
        if payloads:
            body = encode_body(batch_mode, payloads, device_id)
            fits = len(body) <= BODY_BYTES or len(payloads) == 1
            result = post(body) if fits else "too_large"
        if result == "too_large" and len(payloads) > 1:
            limit = len(payloads) // 2
        elif result != "ok":
            return "server_error" if result == "too_large" else result
        else:
            for log in offsets:
                log.offset = offsets[log]
            save()
            limit = min(limit + BATCH_EVENTS // 10, BATCH_EVENTS)
            if not payloads:
                return "ok"


# Send: one connection, each request in bounded time. Contract: Error Handling.
def classify(status, body):
    """Return the result of an answer."""
    if not 200 <= status < 300:
        return {401: "auth_failed", 413: "too_large"}.get(status, "server_error")
    answer = parse_object(body)
    if answer is None:
        return "network_error"
    return "ok" if answer.get("code") == 0 and type(answer["code"]) is int else "server_error"


def retry_delay(status, retry_after, now):
    """Return the seconds before a retry, None for no retry; now is epoch seconds."""
    delay = RETRY_SECONDS.get(status)
    if status == 429:
        import email.utils
        with suppress(TypeError, ValueError, OverflowError):
            date = email.utils.parsedate_tz(retry_after)
            delay = email.utils.mktime_tz(date) - now if date else int(retry_after)
        delay = min(max(delay, 0), REQUEST_SECONDS)
    return delay


def open_link(url):
    """Return a connection yet to be made: TLS, in a proxy's tunnel where urllib knows a proxy."""
    import http.client
    if url.scheme == "http":  # to this machine, with no proxy
        return http.client.HTTPConnection(url.netloc, timeout=CONNECT_SECONDS)
    import urllib.request
    request, proxies = urllib.request.Request(url.geturl()), urllib.request.ProxyHandler()
    if hasattr(proxies, "https_open"):
        proxies.https_open(request)
    link = http.client.HTTPSConnection(request.host, timeout=CONNECT_SECONDS)
    if request.host != url.netloc:
        login = request.get_header("Proxy-authorization")
        link.set_tunnel(url.hostname, url.port or 443, login and {"Proxy-Authorization": login})
    return link


class Sender:
    """Posts bodies over one connection, kept as long as the server keeps it."""

    def __init__(self, run):
        self.run, self.url, self.slowest = run, run.endpoint(), 0
        self.link = open_link(self.url)
        by_proxy = "" if self.link.host.lower() == self.url.hostname else " by " + self.link.host
        self.peer = self.url.netloc + by_proxy
        self.headers = {"Authorization": "Bearer " + run.token(),
                        "Content-Type": "application/json",
                        "User-Agent": "secondme_sync/" + VERSION}

    def post(self, body):
        """Post a body, once more if the contract says so; return the result, or Stop."""
        for last in (False, True):
            if read_small(self.run.home, "config") != self.run.config:
                raise Stop("config has changed")  # consent withdrawn?
            if not self.has_time():
                raise Stop("too little time is left for another request")
            status, retry_after, answer = self.attempt(body)
            result, delay = classify(status, answer), retry_delay(status, retry_after, time.time())
            code = member(parse_object(answer), "code", 0)
            said = f" with code {code}" if type(code) is int and code else ""
            self.run.say(f"{len(body)} bytes to {self.peer}: HTTP {status}{said}, {result}")
            if last or delay is None or not self.has_time(delay):
                return result
            self.run.say(f"retry in {delay:.0f} s")
            self.run.sleep(delay)

    def has_time(self, delay=0):
        """Tell if a request after a delay would end in time, judged by the slowest so far."""
        return delay + min(2 * self.slowest, REQUEST_SECONDS) < self.run.deadline - self.run.clock()

    def attempt(self, body):
        """Return (status, Retry-After, body) of the answer to a request; Stop if none comes."""
        import http.client
        begun = self.run.clock()
        try:
            reply = self.request(body)
            answer = reply.read(ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:  # its text might hold the token
            raise Stop(f"network_error, no answer ({type(error).__name__}) from {self.peer}")
        finally:
            self.run.due = self.run.deadline
            self.slowest = max(self.slowest, self.run.clock() - begun)
        if not reply.isclosed() or reply.status != 200:
            self.link.close()
        return reply.status, reply.getheader("Retry-After"), b"" if reply.length else answer

    def request(self, body):
        """Return the response to a body; ask once more if a kept connection proves closed."""
        import socket
        while True:
            kept = self.link.sock is not None
            if not kept:
                self.link.connect()
                self.link.sock.settimeout(REQUEST_SECONDS)
            self.run.due = min(self.run.clock() + REQUEST_SECONDS, self.run.deadline)
            try:
                with suppress(OSError):  # an answer may come, and the connection end, early
                    self.link.request("POST", self.url.path, body, self.headers)
                return self.link.getresponse()
            except OSError as error:
                if not kept or isinstance(error, socket.timeout):
                    raise
                self.link.close()


# The run, and what else the command line offers.
def sync(run):
    """Send what is pending, and record what is accepted. Contract: Sync Implementation."""
    run.check()
    with locked_state(run.folder) as state, open_logs(state, run.mode) as logs:
        state.save(logs, "network_error")  # until it ends otherwise
        state.flush()  # a run that cannot record must not send
        sender = Sender(run)
        with closing(sender.link):
            result = deliver(logs, run.mode, run.device_id(run.mode), sender.post,
                             lambda: state.save(logs, "network_error"))
        state.save(logs, result)


def watched_sync(run):
    """Sync, and end the process when due: nothing else ends a look-up of names that hangs."""
    def watch():
        while run.clock() < run.due:
            time.sleep(0.1)
        run.say("time is up")
        os._exit(0)
    import _thread
    _thread.start_new_thread(watch, ())
    sync(run)


def background(run):
    """Sync in a process of its own, if there is something to do; return at once."""
    run.check()
    file = globals().get("__file__") or "<stdin>"
    command = [sys.executable, "-I", os.path.abspath(file), "--dir", run.home,
               "--max-time", str(run.seconds)]
    if os.name == "nt" and file == "<stdin>":
        watched_sync(run)  # pasted, there is no file that another process could run
    elif os.name == "nt":
        from subprocess import DEVNULL, Popen
        detached = 0x8 | 0x200  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
        Popen(command, cwd=run.home, creationflags=detached,
              stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL).returncode = 0  # nobody waits for it
    elif os.fork() == 0:
        os.setsid()
        os.chdir(run.home)
        os.closerange(0, 1 << 16)
        for _ in range(3):
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if file != "<stdin>":  # on macOS, a bare fork may abort when it looks up names
            os.execv(command[0], command)
        watched_sync(run)


def describe_pending(folder, logs, mode):
    """Return in words how many events of logs are pending, and how many of them as anonymous."""
    kept, counts = 0, {name: "unreadable" for name in LOGS
                       if os.path.lexists(os.path.join(folder, name + ".jsonl"))}
    for log in logs:
        begins = [begin for begin, _, event in log.lines() if event is not None]
        counts[log.name] = len(begins)
        kept += sum(begin < log.anonymous for begin in begins)
    text = ", ".join(f"{counts.get(name, 0)} {name}" for name in LOGS) + " events"
    return f"{text}, {kept} of them as anonymous" if kept and mode == "community" else text


def report(run):
    """Return in lines how things stand, and what a sync would do now."""
    state, endpoint, now = State(run.folder), "refused", "a sync would send"
    try:
        endpoint = run.endpoint().geturl()
        run.check()
    except Stop as stop:
        now = f"a sync would send nothing: {stop}"
    with open_logs(state, run.mode) as logs:
        pending = describe_pending(run.folder, logs, run.mode)
    last = " ".join(filter(None, (state.record["last_sync_result"], state.record["last_sync_ts"])))
    lines = ["directory: " + run.home, f"telemetry: {run.mode} ({run.reason})",
             "endpoint:  " + endpoint, "logged in: " + ("yes" if run.token() else "no"),
             "pending:   " + pending, "last sync: " + (last or "never"), "now:       " + now]
    encoding = getattr(sys.stdout, "encoding", "ascii")
    return "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)


def dry_run(run, mode):
    """Print the bodies that would be posted now, or would be in a mode; change nothing."""
    def show(body):
        if sys.stdout.isatty():
            body = json.dumps(json.loads(body.decode("utf-8")), indent=2).encode("utf-8")
        sys.stdout.buffer.write(body + b"\n")
        return "ok"
    say(report(run))
    if not mode:
        run.check()
        run.endpoint()
    mode = mode or run.mode
    with open_logs(State(run.folder), mode) as logs:
        deliver(logs, mode, run.device_id(mode), show, save=lambda: None)


def pending(run):
    """Print yes or no: would a sync have something to do?"""
    try:
        run.check()
        sys.stdout.buffer.write(b"yes\n")
    except Stop as stop:
        sys.stdout.buffer.write(b"no\n")
        run.say(str(stop))


def skip_pending(run):
    """Mark all that is logged so far as never to be sent."""
    with locked_state(run.folder) as state, open_logs(state, "off") as logs:
        text = describe_pending(run.folder, logs, "off")
        if "unreadable" in text:
            raise Stop(text)
        for log in logs:
            log.offset = max((end for _, end, _ in log.lines()), default=log.offset)
        state.save(logs, "skipped")
    print("never to be sent:", text)


def parse_args(argv):
    """Return (action, MODE of --dry-run, directory, seconds, verbose); exit on misuse."""
    import argparse
    parser = argparse.ArgumentParser("secondme_sync", "%(prog)s [flags]", allow_abbrev=False)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry-run", nargs="?", const="", choices=("", "anonymous", "community"),
                       metavar="MODE", help="print the bodies that would be posted, or in MODE")
    for flag, action, text in (
            ("--status", lambda run: print(report(run)), "say how things stand"),
            ("--pending", pending, "print yes or no: is there something to do"),
            ("--skip-pending", skip_pending, "mark what is logged as never to be sent"),
            ("--background", background, "sync in a process of its own, return at once")):
        group.add_argument(flag, dest="action", action="store_const", const=action, help=text)
    parser.add_argument("--max-time", type=float, metavar="S", default=RUN_SECONDS,
                        help="seconds for a sync (default: %(default)s)")
    parser.add_argument("--dir", help="instead of ~/.secondme")
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what happens")
    parser.add_argument("--version", action="version", version="secondme_sync " + VERSION)
    args = parser.parse_args(argv)
    if args.dir == "" or not 0 < args.max_time < float("inf"):
        parser.error("--dir must name a directory, --max-time be a number above 0")
    return args.action or watched_sync, args.dry_run, args.dir, args.max_time, args.verbose


def say(text):
    with suppress(AttributeError, OSError, ValueError):  # closed
        sys.stderr.write("secondme_sync: " + text.replace("\n", "\nsecondme_sync: ") + "\n")
        sys.stderr.flush()


def main(argv):
    """Do what the flags say; return the exit code."""
    action, mode, home, seconds, verbose = (
        parse_args(argv) if argv else (watched_sync, None, None, RUN_SECONDS, False))
    tell = say if verbose or action is skip_pending else lambda text: None
    try:
        home = os.path.abspath(home or os.path.expanduser("~/.secondme"))
        run = Run(home, os.environ, seconds, tell)
        action(run) if mode is None else dry_run(run, mode)
        print(end="", flush=True)
        return 0
    except (Exception, KeyboardInterrupt) as error:  # the last resort; other texts are not safe
        tell("stopped: " + (str(error) if isinstance(error, Stop) else type(error).__name__))
    return int(action is skip_pending)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # a flush at exit could fail aloud
