"""Upload pending SecondMe telemetry: one file, standard library only, Python 3.6 or newer.

  gate    consent (config, SM_TEL, DO_NOT_TRACK), then the access token
  read    the events in the logs beyond those already accepted
  shape   each to the fields that its mode allows, in batches
  send    by POST to {baseUrl}/api/secondme/telemetry/events/batch
  record  before the first body and after each, how far the logs are done

A run ends, silently, at the first step that says no. Under ~/.secondme it writes nothing but
analytics/.sync-offsets. Contract: references/telemetry-sync.md of mindverse/second-me-skills.
"""
import os
import sys

if __name__ == "__main__":
    sys.excepthook = lambda *error: os._exit("--skip-pending" in sys.argv)  # silent from here on
    sys.path = [path for path in sys.path if path]  # pasted: nothing from the working directory

import codecs
import json
import time
import zlib
from contextlib import ExitStack, contextmanager, suppress

VERSION = "1.1.0"
BASE_URL = "https://app.mindos.com/gate/lab"
PATH = "/api/secondme/telemetry/events/batch"
BATCH_EVENTS = 100
BODY_BYTES = 512 * 1024  # a single event may be larger
LINE_BYTES = 1024 * 1024  # of a log line
SMALL_BYTES = 64 * 1024  # read of an answer, of config and the like
MAX_DEPTH = 64  # of nesting in an event
FINGERPRINT_BYTES = 256  # at the beginning of a log, to know it again
RECORD_BYTES = 512  # of the state: a sector, which a disk writes whole or not at all
CONNECT_SECONDS = 4  # for each address of a host
REQUEST_SECONDS = 10  # also the longest wait that a Retry-After gets
RUN_SECONDS = 30  # see --max-time
RETRY_SECONDS = {429: 5, 502: 2, 503: 2, 504: 2}  # before the one retry

BOTH = ("skill", "ts", "version", "os", "arch", "outcome", "phases_used")  # of either log
ANONYMOUS = {  # the fields of each log that anonymous mode sends
    "usage": BOTH + ("event", "duration_s", "error_class"),
    "feedback": BOTH + ("references_loaded", "rating", "issues")}
COMMUNITY = {  # those that community mode adds
    "usage": ("session", "user_intent", "error_message"),
    "feedback": ("session", "user_intent", "actions_summary", "error_summary", "comment")}
DEFAULTS = {  # if an event lacks these; what else it lacks, and null, is not sent
    "skill": "secondme", "ts": "", "phases_used": [], "references_loaded": [], "issues": []}
LOGS = tuple(ANONYMOUS)  # analytics/<name>.jsonl


class Stop(Exception):
    """A reason to go no further, fit to print."""


# Files and JSON: what is missing, broken or of another type counts as absent.
def read_small(*path):
    """Return the first SMALL_BYTES of a file, none if it cannot be read."""
    path = os.path.join(*path)
    if os.path.isfile(path):  # a FIFO would block
        with suppress(OSError), open(path, "rb") as file:
            return file.read(SMALL_BYTES)
    return b""


def parse_number(text):
    if not abs(float(text)) < float("inf"):
        raise ValueError(text)
    return float(text)


DECODER = json.JSONDecoder(  # an integer of 309 digits may be past float range
    parse_float=parse_number, parse_constant=parse_number,
    parse_int=lambda text: int(text) if len(text) < 309 else parse_number(text))


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


def whole(value, key, default=0):
    """Return a member that is a whole number of at most 63 bits, else the default."""
    number = member(value, key)
    return number if type(number) is int and 0 <= number < 1 << 63 else default


def word(value, key, default=""):
    """Return a member that is printable ASCII without blanks, "" for any other value."""
    text = member(value, key, default)
    return text if isinstance(text, str) and all("!" <= char <= "~" for char in text) else ""


# Gate: consent, token, endpoint. Contract: Prerequisites.
def consent(config, environ):
    """Return (mode, reason): what config (bytes) allows, or less if the environment does."""
    settings = parse_object(config)
    if settings is None:
        return "off", "config is not a JSON object" if config else "there is no readable config"
    mode, limit = settings.get("telemetry"), environ.get("SM_TEL") or "community"
    reason = "telemetry in config is " + json.dumps(mode)
    if mode not in ("anonymous", "community"):
        return "off", reason if "telemetry" in settings else "config has no telemetry"
    if limit not in ("anonymous", "community"):
        return "off", "SM_TEL is " + json.dumps(limit)
    if environ.get("DO_NOT_TRACK", "") not in ("", "0", "false"):
        return "off", "DO_NOT_TRACK is " + json.dumps(environ["DO_NOT_TRACK"])
    if limit == "anonymous" and mode == "community":
        return "anonymous", "SM_TEL is " + json.dumps(limit)
    return mode, reason


class Run:
    """One call: where it works, for how many seconds, whom it tells, in what mode and why."""

    def __init__(self, home, environ, seconds=RUN_SECONDS, say=lambda text: None,
                 clock=time.monotonic, sleep=time.sleep):
        self.home, self.folder = home, os.path.join(home, "analytics")
        self.seconds, self.say, self.clock, self.sleep = seconds, say, clock, sleep
        self.deadline = self.due = clock() + seconds  # due: that of a request, if it is earlier
        self.config = read_small(home, "config")
        self.mode, self.reason = consent(self.config, environ)

    def token(self):
        """Return the access token, "" if there is none that fits a header."""
        return word(parse_object(read_small(self.home, "credentials")), "accessToken")

    def device_id(self, mode):
        """Return the device id that goes with events in a mode, "" for none."""
        data = read_small(self.home, ".device-id") if mode == "community" else b""
        text = data.decode("utf-8", "replace").strip()
        return "" if "\ufffd" in text else text

    def endpoint(self):
        """Return the split URL to post to; Stop if baseUrl must not be contacted."""
        import re
        import socket
        import urllib.parse
        base_url = word(parse_object(self.config), "baseUrl", BASE_URL)
        form = r"(?i)https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?(/[^@?#]*)?"
        with suppress(ValueError, OSError):  # no port, no IPv4 address
            url = urllib.parse.urlsplit(base_url.rstrip("/") + PATH)
            if re.fullmatch(form, base_url) and url.port != 0 and (
                    url.scheme == "https" or url.hostname in ("localhost", "::1")
                    or socket.inet_pton(socket.AF_INET, url.hostname)[0] == 127):
                return url
        raise Stop("baseUrl must be https (http: this machine only), no user, query or fragment")


# State: the record in .sync-offsets. Contract: Error Handling (Offsets), Rules.
class State:
    """The contract's four keys and, under resume, a mark for each log (see Log.mark)."""

    def __init__(self, folder, file=None):  # open and locked, if it is to be changed
        data = file.read(SMALL_BYTES) if file else read_small(folder, ".sync-offsets")
        saved = parse_object(data[:RECORD_BYTES]) or parse_object(data)
        self.file, self.marks = file, {}
        self.record = {key: word(saved, key) for key in ("last_sync_ts", "last_sync_result")}
        for name in LOGS:
            done = self.record[name + "_bytes"] = whole(saved, name + "_bytes")
            mark = member(member(saved, "resume"), name)
            self.marks[name] = {key: whole(mark, key)
                                for key in ("bytes", "anonymous", "fingerprint")}
            if whole(mark, "fingerprint", None) is None:  # an older script's, if any
                self.marks[name] = {"bytes": done}

    def save(self, logs, result="network_error"):
        """Overwrite the record by one write: a kill or power cut leaves the old or the new one."""
        for log in logs:
            self.marks[log.name] = log.mark()
            if result in ("ok", "skipped"):
                self.record[log.name + "_bytes"] = log.offset
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.record.update(last_sync_ts=now, last_sync_result=result, resume=self.marks)
        self.file.seek(0)
        self.file.write(json.dumps(self.record).ljust(RECORD_BYTES - 1).encode("ascii") + b"\n")
        self.file.flush()

    def save_on_disk(self, logs, result):
        """Save past a power cut: first the logs, lest new lines take the place of lost ones."""
        for log in logs:
            with suppress(OSError):  # Windows flushes only what may be written
                os.fsync(log.file.fileno())
        self.save(logs, result)
        os.fsync(self.file.fileno())
        self.file.truncate(RECORD_BYTES)  # a longer file was another program's


@contextmanager
def locked_state(folder):
    """Yield the State, its file open and locked; Stop if another run has it, or it is no use."""
    path = os.path.join(folder, ".sync-offsets")
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            lock_file(file)
            state, size = State(folder, file), file.seek(0, os.SEEK_END)
            if 0 < size < RECORD_BYTES:  # lengthened first: a power cut between new bytes and new
                file.write(b" " * (RECORD_BYTES - size))  # length would leave half a record
                file.flush()
                os.fsync(file.fileno())
            if size == 0:
                with suppress(OSError):  # the folder's new name is to be on disk, where that can be
                    directory = os.open(folder, os.O_RDONLY)
                    os.fsync(directory)
                    os.close(directory)
            yield state
    except OSError as error:
        raise Stop(f"progress cannot be recorded: {error.strerror or error}")


def lock_file(file):
    """Lock a file until it is closed or its process ends; Stop if another run has it."""
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(1 << 30)  # one byte, far from those that others read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # without locks, as on some network drives, POSIX goes on
        if os.name == "nt" or isinstance(error, BlockingIOError):
            raise Stop("another run is at work")


# Read: the logs, line by line.
class Log:
    """An open log as it was found: up to offset it is done, up to anonymous it stays anonymous."""

    def __init__(self, name, file, mark, mode):
        self.name, self.file, self.mode = name, file, mode
        self.size = os.fstat(file.fileno()).st_size  # what is appended from now on: the next run's
        self.head = file.read(FINGERPRINT_BYTES)
        self.offset, self.anonymous = mark["bytes"], mark.get("anonymous", 0)
        known = mark == self.mark() if "fingerprint" in mark else self.offset <= self.size
        if not known:  # another log, though it may hold what was to stay anonymous
            self.offset, self.anonymous = 0, self.size if self.anonymous > self.offset else 0
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
            while event is None and not line.endswith(b"\n"):  # pass over all of a long one
                line = self.file.readline(min(LINE_BYTES, self.size - end))
                end += len(line)
                if not line:
                    return  # a torn last line waits for its rest
            yield begin, end, event


@contextmanager
def open_logs(folder, marks, mode):
    """Yield the logs that can be read, each to go on where its mark says."""
    with ExitStack() as stack:
        logs = []
        for name in LOGS:
            path = os.path.join(folder, name + ".jsonl")
            with suppress(OSError):
                if os.path.isfile(path):
                    file = stack.enter_context(open(path, "rb"))
                    logs.append(Log(name, file, marks[name], mode))
        yield logs


# Shape: from events to a body. Contract: Sync Implementation, Anonymous Mode Stripping.
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))
codecs.register_error("repair", lambda bad: (b"\xef\xbf\xbd" * (bad.end - bad.start), bad.end))


def shape_event(mode, log, event):
    """Return an event's payload: the fields that its mode and log (a name) allow, no nulls."""
    payload = {"type": log}
    for field in ANONYMOUS[log] + (COMMUNITY[log] if mode == "community" else ()):
        value = event.get(field, DEFAULTS.get(field))
        if value is not None:
            payload[field] = value
    return payload


def next_body(logs, device_id, max_size):
    """Return (body, number of events, {log: end}) of the next max_size bytes of lines, or one."""
    body, ends, size = {"telemetryMode": None, "events": []}, {}, 0
    for log, (begin, end, event) in ((log, line) for log in logs for line in log.lines()):
        mode, size = "anonymous" if begin < log.anonymous else log.mode, size + end - begin
        if ends and (size > max_size or len(body["events"]) == BATCH_EVENTS
                     or body["telemetryMode"] not in (None, mode)):
            break
        if event is not None:
            body["telemetryMode"] = mode
            body["events"].append(shape_event(mode, log.name, event))
        ends[log] = end
    if device_id and body["telemetryMode"] == "community":
        body["deviceId"] = device_id
    return ENCODER.encode(body).encode("utf-8", "repair"), len(body["events"]), ends


# Send: one connection, each request in bounded time. Contract: Error Handling.
def classify(status, answer):
    """Return the result of an answer: of its status, and of the JSON object in it, if any."""
    if not 200 <= status < 300:
        return {401: "auth_failed", 413: "too_large"}.get(status, "server_error")
    if answer is None:
        return "network_error"
    return "ok" if whole(answer, "code", None) == 0 else "server_error"


def retry_delay(status, retry_after, now):
    """Return the seconds before a retry, None for no retry; now is epoch seconds."""
    delay = RETRY_SECONDS.get(status)
    if status == 429:
        import email.utils
        with suppress(TypeError, ValueError, LookupError, OverflowError):
            date = email.utils.parsedate_tz(retry_after)
            delay = email.utils.mktime_tz(date) - now if date else int(retry_after)
        delay = min(max(delay, 0), REQUEST_SECONDS)
    return delay


def open_link(url):
    """Return a connection yet to be made: TLS, in a proxy's tunnel where urllib knows a proxy."""
    import http.client
    if url.scheme == "http":  # to this machine, with no proxy
        return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=CONNECT_SECONDS)
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
        self.run, self.url, self.slowest = run, run.endpoint(), 0  # seconds of a request so far
        self.link = open_link(self.url)
        self.peer = f"{self.link.host}:{self.link.port}"  # the server's, or a proxy's
        self.agreed = run.config, run.token() or None  # without a token, never
        self.headers = {"Authorization": f"Bearer {self.agreed[1]}",
                        "Content-Type": "application/json",
                        "User-Agent": "secondme_sync/" + VERSION}

    def post(self, body):
        """Post a body, once more if the contract says so; return the result, or Stop."""
        for retried in False, True:
            status, retry_after, answer = self.request(body)
            result, delay = classify(status, answer), retry_delay(status, retry_after, time.time())
            code = whole(answer, "code", None)
            self.run.say(f"{len(body)} bytes to {self.peer}: HTTP {status}, code {code}, {result}")
            if retried or delay is None or not self.has_time(delay):
                return result
            self.run.say(f"retry in {delay:.0f} s")
            self.run.sleep(delay)

    def has_time(self, delay=0):
        """Tell if a request after a delay would end in time, twice as slow as any so far."""
        return delay + min(2 * self.slowest, REQUEST_SECONDS) < self.run.deadline - self.run.clock()

    def request(self, body):
        """Return (status, Retry-After, JSON object or None), or Stop."""
        import http.client
        import select
        import socket
        if not self.has_time():
            raise Stop("too little time is left for another request")
        kept = self.link.sock and not select.select([self.link.sock], [], [], 0)[0]
        begun = self.run.clock()
        try:
            for connected in kept, True:  # a connect may take long: asked before and after
                if (read_small(self.run.home, "config"), self.run.token()) != self.agreed:
                    raise Stop("config or login has changed")  # consent may be withdrawn
                if not connected:  # or it has something to say: its end, or what nobody asked
                    self.link.close()
                    self.link.connect()
                    self.link.sock.settimeout(REQUEST_SECONDS)
            self.run.due = min(self.run.clock() + REQUEST_SECONDS, self.run.deadline)
            with suppress(OSError):  # an answer may come, and the connection end, early
                self.link.request("POST", self.url.path, body, self.headers)
            return self.answer()
        except (OSError, http.client.HTTPException) as error:  # its text might hold the token
            self.link.close()
            if not kept or not isinstance(error, OSError) or isinstance(error, socket.timeout):
                raise Stop(f"network_error, no answer ({type(error).__name__}) from {self.peer}")
        finally:
            self.run.due = self.run.deadline
            self.slowest = max(self.slowest, self.run.clock() - begun)
        return self.request(body)  # the server had closed the kept connection: over a new one

    def answer(self):
        """Read what request() returns."""
        import http.client
        reply, buffer, size = self.link.getresponse(), bytearray(SMALL_BYTES), 0
        with suppress(OSError, http.client.HTTPException):  # the status is enough
            size = reply.readinto(buffer)  # read() would take all of a chunk of -1 bytes
        if not reply.isclosed() or reply.status != 200:  # not all was read, or perhaps sent
            self.link.close()
        answer = None if reply.length else parse_object(bytes(buffer[:size]))
        return reply.status, reply.getheader("Retry-After"), answer


# The run, and what else the command line offers.
def check(run):
    """Stop unless there is consent, a token, and something to send or record."""
    if run.mode == "off":
        raise Stop("telemetry is off: " + run.reason)
    if not run.token():
        raise Stop("not logged in")
    state = State(run.folder)
    with open_logs(run.folder, state.marks, run.mode) as logs:
        if all(log.offset == state.record[log.name + "_bytes"]
               and next(log.lines(), None) is None for log in logs):
            raise Stop("nothing is pending")


def deliver(logs, device_id, post, save):
    """Post what is pending by post(body), save() where logs are accepted; return the result."""
    max_size = BODY_BYTES
    while True:
        body, count, ends = next_body(logs, device_id, max_size)
        if not ends:
            return "ok"
        result = "ok"  # of lines to pass over
        if count > 0:
            result = post(body) if len(body) <= BODY_BYTES or count == 1 else "too_large"
        if result == "ok":
            for log in ends:
                log.offset = ends[log]
            save()
        elif result == "too_large" and count > 1:
            size = sum(ends[log] - log.offset for log in ends)
            max_size = size // 2 + size // count // 2  # of half of them, and of half an event
        else:
            return "server_error" if result == "too_large" else result


def sync(run):
    """Send what is pending, and record what is accepted. Contract: Sync Implementation."""
    check(run)
    with locked_state(run.folder) as state, open_logs(run.folder, state.marks, run.mode) as logs:
        result = "network_error"  # until it ends otherwise
        state.save_on_disk(logs, result)  # a run that cannot record must not send
        sender = Sender(run)
        try:
            result = deliver(logs, run.device_id(run.mode), sender.post, lambda: state.save(logs))
        finally:
            sender.link.close()
            state.save_on_disk(logs, result)


def watched_sync(run):
    """Sync, and end the process when due: nothing else ends a look-up of names that hangs."""
    def watch(say, grace):
        while run.clock() < run.due + grace:
            time.sleep(0.1)
        say("time is up")
        os._exit(0)
    import _thread
    _thread.start_new_thread(watch, (run.say, 0))
    _thread.start_new_thread(watch, (lambda text: None, 0.5))  # if the other hangs in saying so
    sync(run)


def background(run):
    """Sync in a process of its own, if there is something to do; return at once."""
    check(run)
    file = globals().get("__file__", "<stdin>")
    path = file != "<stdin>" and os.path.realpath(file)
    is_file = path and os.path.isfile(path) and sys.executable  # else: pasted, or out of a pipe
    command = [sys.executable, "-I", path, "--dir", run.home, "--max-time", str(run.seconds)]
    if os.name == "nt" and is_file:
        from subprocess import Popen  # with a returncode, it does not warn that nobody waits
        detached = 0x8 | 0x200  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
        Popen(command, cwd=run.home, creationflags=detached, close_fds=True).returncode = 0
    elif os.name == "nt":
        watched_sync(run)
    elif os.fork() == 0:
        os.setsid()
        os.chdir(run.home)
        os.closerange(0, 1 << 16)
        for _ in range(3):
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if is_file:  # on macOS, a bare fork may abort when it looks up names
            os.execv(sys.executable, command)
        watched_sync(run)


def show(text, stream):
    """Print a text for people, as escapes what the stream cannot show, if it is open."""
    with suppress(AttributeError, OSError):
        data = text.encode(stream.encoding, "backslashreplace")
        print(data.decode(stream.encoding), file=stream, flush=True)


def describe_pending(folder, logs):
    """Return in words how many events of logs are pending, and how many of them as anonymous."""
    kept, counts = 0, {name: "unreadable" for name in LOGS
                       if os.path.lexists(os.path.join(folder, name + ".jsonl"))}
    for log in logs:
        begins = [begin for begin, _, event in log.lines() if event is not None]
        counts[log.name] = len(begins)
        kept += sum(begin < log.anonymous for begin in begins if log.mode == "community")
    text = ", ".join(f"{counts.get(name, 0)} {name}" for name in LOGS) + " events"
    return f"{text}, {kept} of them as anonymous" if kept else text


def report(run):
    """Return in lines how things stand, and what a sync would do now."""
    state, endpoint, now = State(run.folder), "refused", ""
    try:
        endpoint = run.endpoint().geturl()
        check(run)
    except Stop as stop:
        now = f"nothing: {stop}"
    with open_logs(run.folder, state.marks, run.mode) as logs:
        pending = describe_pending(run.folder, logs)
    last = "{last_sync_result} {last_sync_ts}".format(**state.record).strip()
    return "\n".join([
        "directory: " + run.home, f"telemetry: {run.mode} ({run.reason})",
        "endpoint:  " + endpoint, "logged in: " + ("yes" if run.token() else "no"),
        "pending:   " + pending, "last sync: " + (last or "never"),
        "now:       a sync would send " + (now or "what is pending")])


def dry_run(run, mode):
    """Print the bodies that would be posted now, or would be in a mode; change nothing."""
    def post(body):
        if sys.stdout.isatty():
            show(json.dumps(json.loads(body), ensure_ascii=False, indent=2), sys.stdout)
        else:
            sys.stdout.buffer.write(body + b"\n")
        return "ok"
    show(report(run), sys.stderr)
    if not mode:
        check(run)
        run.endpoint()
    with open_logs(run.folder, State(run.folder).marks, mode or run.mode) as logs:
        deliver(logs, run.device_id(mode or run.mode), post, save=lambda: None)


def pending(run):
    """Print yes or no: would a sync have something to do?"""
    try:
        check(run)
        sys.stdout.buffer.write(b"yes\n")
    except Stop as stop:
        sys.stdout.buffer.write(b"no\n")
        run.say(str(stop))


def skip_pending(run):
    """Mark all lines logged so far, but not one half written, as never to be sent."""
    with locked_state(run.folder) as state, open_logs(run.folder, state.marks, "off") as logs:
        text = describe_pending(run.folder, logs)
        if "unreadable" in text:
            raise Stop("nothing is skipped: " + text)
        for log in logs:
            log.offset = max((end for _, end, _ in log.lines()), default=log.offset)
        state.save_on_disk(logs, "skipped")
    show("never to be sent: " + text, sys.stdout)


def parse_args(argv):
    """Return (action, directory, seconds, verbose); exit on misuse."""
    import argparse
    usage = "%(prog)s [flags]; without flags it sends what is pending, silently"
    parser = argparse.ArgumentParser("secondme_sync", usage, allow_abbrev=False)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry-run", nargs="?", const=False, choices=("anonymous", "community"),
                       metavar="MODE", help="print the bodies that would be posted, or in MODE")
    for flag, action, text in (
            ("--status", lambda run: show(report(run), sys.stdout), "say how things stand"),
            ("--pending", pending, "print yes or no: is there something to do"),
            ("--skip-pending", skip_pending, "mark what is logged as never to be sent"),
            ("--background", background, "sync in a process of its own, return at once")):
        group.add_argument(flag, dest="action", action="store_const", const=action, help=text)
    parser.add_argument("--max-time", type=float, metavar="S", default=RUN_SECONDS,
                        help="seconds for a sync (default: %(default)s)")
    parser.add_argument("--dir", default="~/.secondme", help="instead of ~/.secondme")
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what happens")
    parser.add_argument("--version", action="version", version="secondme_sync " + VERSION)
    args = parser.parse_args(argv)
    if not args.dir or not 0 < args.max_time < float("inf"):
        parser.error("--dir must name a directory, --max-time be a number above 0")
    if args.dry_run is not None:
        args.action = lambda run: dry_run(run, args.dry_run)
    return args.action or watched_sync, args.dir, args.max_time, args.verbose


def main(argv):
    """Do what the flags say; return the exit code."""
    def tell(text):
        if verbose or action is skip_pending:
            show("secondme_sync: " + text, sys.stderr)
    plain = {(): watched_sync, ("--pending",): pending, ("--background",): background}
    action, home, seconds, verbose = plain.get(tuple(argv)), "~/.secondme", RUN_SECONDS, False
    if not action:  # those above, as skills call them, are quicker without the parser
        action, home, seconds, verbose = parse_args(argv)
    try:
        action(Run(os.path.abspath(os.path.expanduser(home)), os.environ, seconds, tell))
        print(end="", flush=True)  # what cannot be written fails here
        return 0
    except (Exception, KeyboardInterrupt) as error:  # the last resort; other texts are not safe
        tell("stopped: " + (str(error) if isinstance(error, Stop) else type(error).__name__))
    return int(action is skip_pending)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # a flush at exit could fail aloud
