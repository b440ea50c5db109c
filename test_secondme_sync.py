"""Tests of secondme_sync.py: `python -m pytest`, or `tox` for every Python.

The sections follow the script: Gate, State, Read, Shape, Send, then the command line and the
whole as users run it. A helper that serves one test or one table stands beside it. The others
are in fixtures/harness.py and fixtures/fake_backend.py, and their docstrings say what they do.
Most tests begin with the fixture `home`, a home directory with .secondme in it:

    home.fill(2, 1)             log two usage events and a feedback event; return their sessions
    home.deliver(answer(503))   sync in this process with a backend that answers so, then OK;
                                return the backend: .sessions .sizes .modes .requests .said
    home.sync()                 the same without a backend; return the messages
    home.run("--status")        run the script in a process of its own; return code, out, err
    home.run(DO_NOT_TRACK="1")  the same with a variable; == SILENT: code 0 and no output
    with home.backend() as backend:
                                a backend for home.run(), which config names
    home.main("--dry-run")      call main() in this process, for what sends nothing
    home.assert_done()          fail unless the state says that everything is sent

`answers` has odd answers ready, such as answers.cut_off(200) and answers.after(0.2). Waits are
noted by a FakeClock instead of slept, and no test reaches another machine.

A table has its column names in a comment above the rows. To add a case, add a row: one line of
literals, the expected values written out, with an id where the values do not speak. To try it:

    python -m pytest -k "refused_base_url and password"
"""
import ast
import collections
import contextlib
import email.utils
import errno
import http.client
import inspect
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

import pytest

# Before the import of helpers, so that a failing assert of theirs shows its values.
pytest.register_assert_rewrite("fake_backend", "harness", "model")

import secondme_sync  # noqa: E402
from fake_backend import (  # noqa: E402
    answer, answers, CERTIFICATE, DROP, FakeBackend, http_date, OK, PATH, Proxy, tls_context)
from harness import (  # noqa: E402
    BATCH, FakeClock, feedback, Home, LAUNCH, line, MAKERS, NOWHERE, POSIX, posix_only, Result,
    ROOT, SCRIPT, SILENT, TOKEN, until, usage, wait)
from model import Disk, Model, refers_to  # noqa: E402

pytest_plugins = ["harness"]


# Gate: prerequisites, token, device id, consent, endpoint, home directory.

@pytest.mark.parametrize("flags", [[], ["--background"]], ids=["sync", "background"])
@pytest.mark.parametrize("take_away", [
    pytest.param(lambda home: home.configure(telemetry="off"), id="consent"),
    pytest.param(lambda home: home.log_out(), id="token"),
    pytest.param(lambda home: home.write_state_of_reference_script(), id="pending events"),
])
def test_missing_prerequisite_stops_the_run(home, take_away, flags):
    """Contract: Prerequisites. The run is silent and leaves no trace."""
    home.fill(1, 1)
    with home.backend(default=None) as backend:
        take_away(home)
        before = home.snapshot()

        assert home.run(*flags) == SILENT

        assert home.snapshot() == before
        assert backend.connections == 0


@pytest.mark.parametrize("content", [
    pytest.param('{"accessToken": ""}', id="empty"),
    pytest.param('{"accessToken": null}', id="null"),
    pytest.param('{"accessToken": 7}', id="number"),
    pytest.param('{"accessToken": ["x"]}', id="list"),
    pytest.param('{"token": "x"}', id="another key"),
    pytest.param('["accessToken"]', id="JSON list"),
    pytest.param('"x"', id="JSON string"),
    pytest.param('{"accessToken": "x"', id="unfinished JSON"),
    pytest.param("", id="empty file"),
])
def test_credentials_without_token_send_nothing(home, content):
    home.fill(1)
    home.write("credentials", content)

    backend = home.deliver()

    assert backend.connections == 0
    assert home.offsets() is None


@pytest.mark.parametrize("token", [
    pytest.param("LEAK words", id="blank inside"),
    pytest.param("LEAK ", id="blank behind"),
    pytest.param("LEAK\r\nHost: y", id="line break"),
    pytest.param("LEAK\u94a5", id="Chinese"),
    pytest.param("LEAK\x7f", id="DEL"),
    pytest.param("\0LEAK", id="NUL"),
])
def test_token_unfit_for_a_header_counts_as_missing(home, token):
    home.fill(1)
    home.write("credentials", {"accessToken": token})

    assert home.deliver().connections == 0

    shown = home.main("--dry-run", "-v")
    assert b"LEAK" not in shown.out
    assert b"LEAK" not in shown.err


@pytest.mark.parametrize("token", ["#!", "~~", "!~" * 40, "a.b-c_d=="])
def test_token_goes_into_one_header_unchanged(home, token):
    home.fill(1)
    home.write("credentials", {"accessToken": token, "more": "ignored"})

    request, = home.deliver().requests

    assert request.headers["Authorization"] == "Bearer " + token
    assert token.encode("ascii") not in request.body


def test_request_names_path_type_and_program(home):
    home.fill(1)

    request, = home.deliver().requests

    assert request.method == "POST"
    assert request.path == PATH
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["User-Agent"] == "secondme_sync/" + secondme_sync.VERSION


@pytest.mark.parametrize("content, device_id", [
    # content of .device-id, deviceId in the body
    (b"dev-42", "dev-42"),
    (b"  dev-42\r\n", "dev-42"),
    (b"\xef\xbb\xbfdev-42\n", "dev-42"),
    (b"dev-42\0\0\0", "dev-42"),
    (b"\0dev-42\n", "dev-42"),
    (b"dev 42", "dev 42"),
    (b"\xe8\xae\xbe\xe5\xa4\x87-42", "\u8bbe\u5907-42"),
], ids=["plain", "blanks", "BOM", "NULs behind", "NUL before", "blank inside", "Chinese"])
def test_device_id_is_sent_without_its_surroundings(home, content, device_id):
    home.fill(1)
    home.write(".device-id", content)

    body, = home.deliver().bodies()

    assert body["deviceId"] == device_id


@pytest.mark.parametrize("content", [
    pytest.param(b"", id="empty"),
    pytest.param(b" \0\r\n", id="blank"),
    pytest.param("\ufeffdev-42".encode("utf-16-le"), id="UTF-16 with BOM"),
    pytest.param("dev-42".encode("utf-16-le"), id="UTF-16 little-endian"),
    pytest.param("dev-42".encode("utf-16-be"), id="UTF-16 big-endian"),
    pytest.param(b"dev\xff42", id="bad UTF-8"),
    pytest.param(b"dev\x0042", id="NUL inside"),
    pytest.param(b"dev\n42", id="two lines"),
    pytest.param(b"dev\x1b[2J42", id="escape sequence"),
    pytest.param(b"dev\x7f42", id="DEL"),
    pytest.param("dev\x9b42".encode("utf-8"), id="C1 control"),
    pytest.param("dev\u202e42".encode("utf-8"), id="bidi mark"),
])
def test_unusable_device_id_is_left_out(home, content):
    sent = home.fill(1)
    home.write(".device-id", content)

    backend = home.deliver()

    assert backend.sessions == sent
    assert "deviceId" not in backend.bodies()[0]


@pytest.mark.parametrize("name", ["config", "credentials"])
@pytest.mark.parametrize("before, behind", [
    # bytes before the content, bytes behind it
    (b"\xef\xbb\xbf", b""),
    (b"", b"\0\0\0\0"),
    (b" \n", b"\r\n\r\n"),
], ids=["BOM", "NULs", "blanks"])
def test_surroundings_of_a_small_file_are_ignored(home, name, before, behind):
    sent = home.fill(1)
    with home.backend() as backend:
        home.write(name, before + home.path_of(name).read_bytes() + behind)

        home.sync()

    assert backend.sessions == sent


@pytest.mark.parametrize("telemetry, environment, mode, decided_by", [
    # telemetry in config, environment, mode, what the reason names
    ("community", {}, "community", "config"),
    ("anonymous", {}, "anonymous", "config"),
    ("off", {}, "off", "config"),
    # Only the exact words give consent.
    ("Community", {}, "off", "config"),
    ("ANONYMOUS", {}, "off", "config"),
    (" community", {}, "off", "config"),
    ("on", {}, "off", "config"),
    ("", {}, "off", "config"),
    (True, {}, "off", "config"),
    (1, {}, "off", "config"),
    (None, {}, "off", "config"),
    (["community"], {}, "off", "config"),
    ({"community": 1}, {}, "off", "config"),
    # SM_TEL can only lower what config allows.
    ("community", {"SM_TEL": "community"}, "community", "config"),
    ("community", {"SM_TEL": "anonymous"}, "anonymous", "SM_TEL"),
    ("community", {"SM_TEL": "off"}, "off", "SM_TEL"),
    ("anonymous", {"SM_TEL": "community"}, "anonymous", "config"),
    ("anonymous", {"SM_TEL": "anonymous"}, "anonymous", "config"),
    ("anonymous", {"SM_TEL": "off"}, "off", "SM_TEL"),
    ("off", {"SM_TEL": "community"}, "off", "config"),
    ("off", {"SM_TEL": "anonymous"}, "off", "config"),
    # An empty SM_TEL says nothing, an unknown one means off.
    ("community", {"SM_TEL": ""}, "community", "config"),
    ("community", {"SM_TEL": "Anonymous"}, "off", "SM_TEL"),
    ("community", {"SM_TEL": "on"}, "off", "SM_TEL"),
    ("community", {"SM_TEL": " "}, "off", "SM_TEL"),
    # The other variables mean off, unless empty, 0 or false.
    ("community", {"DO_NOT_TRACK": "1"}, "off", "DO_NOT_TRACK"),
    ("anonymous", {"DO_NOT_TRACK": "true"}, "off", "DO_NOT_TRACK"),
    ("community", {"DO_NOT_TRACK": "no"}, "off", "DO_NOT_TRACK"),
    ("community", {"DO_NOT_TRACK": "False"}, "off", "DO_NOT_TRACK"),
    ("community", {"DO_NOT_TRACK": ""}, "community", "config"),
    ("community", {"DO_NOT_TRACK": "0"}, "community", "config"),
    ("anonymous", {"DO_NOT_TRACK": "false"}, "anonymous", "config"),
    ("community", {"DISABLE_TELEMETRY": "1"}, "off", "DISABLE_TELEMETRY"),
    ("anonymous", {"DISABLE_TELEMETRY": "yes"}, "off", "DISABLE_TELEMETRY"),
    ("community", {"DISABLE_TELEMETRY": "0"}, "community", "config"),
    ("community", {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}, "off", "CLAUDE_CODE"),
    ("anonymous", {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "on"}, "off", "CLAUDE_CODE"),
    ("community", {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "false"}, "community", "config"),
    # The lowest of all counts.
    ("community", {"SM_TEL": "community", "DO_NOT_TRACK": "1"}, "off", "DO_NOT_TRACK"),
    ("community", {"SM_TEL": "anonymous", "DISABLE_TELEMETRY": "1"}, "off", "DISABLE_TELEMETRY"),
    ("community", {"SM_TEL": "anonymous", "DO_NOT_TRACK": "0"}, "anonymous", "SM_TEL"),
    ("off", {"SM_TEL": "anonymous", "DO_NOT_TRACK": "0"}, "off", "config"),
], ids=str)
def test_consent_is_the_lowest_of_all(telemetry, environment, mode, decided_by):
    config = json.dumps({"telemetry": telemetry}).encode("ascii")

    consent = secondme_sync.decide_consent(config, environment)

    assert consent.mode == mode
    assert decided_by in consent.reason


@pytest.mark.parametrize("telemetry, environment, modes", [
    # telemetry in config, environment, mode and number of events of each request
    ("community", {}, [("community", 1)]),
    ("anonymous", {}, [("anonymous", 1)]),
    ("off", {}, []),
    ("Community", {}, []),
    ("community", {"SM_TEL": "anonymous"}, [("anonymous", 1)]),
    ("community", {"DISABLE_TELEMETRY": "1"}, []),
], ids=str)
def test_consent_decides_what_is_sent(home, telemetry, environment, modes):
    home.fill(1)

    backend = home.deliver(mode=telemetry, environ=environment)

    assert backend.modes == modes


@pytest.mark.parametrize("environment, pending", [
    # environment, printed by --pending
    ({}, b"yes\n"),
    ({"SM_TEL": "off"}, b"no\n"),
    ({"DO_NOT_TRACK": "1"}, b"no\n"),
    ({"DISABLE_TELEMETRY": "1"}, b"no\n"),
    ({"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}, b"no\n"),
], ids=["nothing", "SM_TEL", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "CLAUDE_CODE"])
def test_environment_of_the_process_is_read(home, environment, pending):
    home.fill(1)

    assert home.main("--pending", **environment).out == pending


@pytest.mark.parametrize("content, reason", [
    # content of config, in the reason
    (b"", "missing or empty"),
    (b" ", "not a valid JSON object"),
    (b"community", "not a valid JSON object"),
    (b'"community"', "not a valid JSON object"),
    (b'["telemetry", "community"]', "not a valid JSON object"),
    (b'{"telemetry": "community"', "not a valid JSON object"),
    (b'{"telemetry": "community",}', "not a valid JSON object"),
    (b'{"telemetry": "community"} and more', "not a valid JSON object"),
    (b'{"telemetry": "community"}{}', "not a valid JSON object"),
    (b'{"telemetry": "community", "note": "\xff"}', "not a valid JSON object"),
    (b'\xff\xfe{"telemetry": "community"}', "not a valid JSON object"),
    ('{"telemetry": "community"}'.encode("utf-16"), "not a valid JSON object"),
    (b"{}", "names no mode"),
    (b'{"Telemetry": "community"}', "names no mode"),
    (b'{"settings": {"telemetry": "community"}}', "names no mode"),
])
def test_config_without_valid_telemetry_means_off(home, content, reason):
    home.fill(1)
    home.write("config", content)
    before = home.snapshot()

    home.sync()

    assert home.snapshot() == before
    consent = secondme_sync.decide_consent(content, {})
    assert consent.mode == "off"
    assert reason in consent.reason


def test_missing_config_means_off(home):
    home.fill(1)
    home.path_of("config").unlink()
    before = home.snapshot()

    home.sync()

    assert home.snapshot() == before


# Prints the name of each file that is opened.
SHOW_OPENED = """
sys.addaudithook(lambda name, args: name == "open" and print(args[0], file=sys.stderr, flush=True))
"""


def opened_files(home, **environment):
    """Run the script; return the names of the files in .secondme that it opened, in order."""
    err = home.run(shim=SHOW_OPENED, **environment).err.decode("utf-8", "replace")
    paths = [path for path in err.splitlines() if path.startswith(str(home.dir))]
    return [os.path.basename(path) for path in paths]


needs_audit_hooks = pytest.mark.skipif(sys.version_info < (3, 8), reason="new in Python 3.8")


@needs_audit_hooks
@pytest.mark.parametrize("telemetry, environment", [
    # telemetry in config, environment
    ("off", {}),
    ("unknown", {}),
    ("community", {"SM_TEL": "off"}),
    ("anonymous", {"SM_TEL": "unknown"}),
    ("community", {"DO_NOT_TRACK": "1"}),
    ("community", {"DISABLE_TELEMETRY": "1"}),
    ("community", {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}),
], ids=str)
def test_without_consent_only_config_is_opened(home, telemetry, environment):
    home.configure(telemetry=telemetry)
    home.fill(1)

    assert opened_files(home, **environment) == ["config"]


@needs_audit_hooks
def test_anonymous_run_does_not_open_the_device_id(home):
    home.configure(telemetry="anonymous")
    home.fill(1)

    names = opened_files(home)

    assert names[0] == "config"
    assert "usage.jsonl" in names
    assert ".device-id" not in names


@needs_audit_hooks
def test_community_run_opens_config_first(home):
    home.fill(1)

    names = opened_files(home)

    assert names[0] == "config"
    assert ".device-id" in names


@pytest.mark.parametrize("base_url, endpoint", [
    # baseUrl, where EVENTS_PATH is added
    ("https://example.test", "https://example.test"),
    ("https://example.test/", "https://example.test"),
    ("https://example.test:8443/x/", "https://example.test:8443/x"),
    ("https://example.test:443", "https://example.test:443"),
    ("HTTPS://example.test/a/", "https://example.test/a"),
    ("https://a-b.example_1.test/~c/d", "https://a-b.example_1.test/~c/d"),
    ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
    ("http://127.0.0.1", "http://127.0.0.1"),
    ("http://127.8.9.10:81", "http://127.8.9.10:81"),
    ("http://127.255.255.255", "http://127.255.255.255"),
    ("http://[::1]:8080/x", "http://[::1]:8080/x"),
    ("http://LocalHost:1", "http://LocalHost:1"),
    ("http://localhost/gate/lab/", "http://localhost/gate/lab"),
])
def test_endpoint_is_base_url_and_path(base_url, endpoint):
    url = secondme_sync.parse_endpoint(base_url, "--base-url")

    assert url.geturl() == endpoint + secondme_sync.EVENTS_PATH


@pytest.fixture
def lookups(monkeypatch):
    """The hosts that are looked up, before any connect; every look-up fails."""
    hosts = []

    def fail(host, *args, **kwargs):
        hosts.append(host)
        raise socket.gaierror("refused by the test")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return hosts


@pytest.mark.parametrize("base_url, host", [
    # baseUrl (None: not in config), the host that is looked up
    (None, urllib.parse.urlsplit(secondme_sync.BASE_URL).hostname),
    ("https://example.test", "example.test"),
    ("https://203.0.113.7:8443/x", "203.0.113.7"),
    ("http://127.8.9.10:81", "127.8.9.10"),
    ("http://[::1]:8080", "::1"),
    ("http://localhost", "127.0.0.1"),
    ("http://LOCALHOST:8080/gate", "127.0.0.1"),
])
def test_host_of_the_base_url_is_contacted(home, monkeypatch, lookups, base_url, host):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    home.configure(baseUrl=base_url)
    home.fill(1)

    home.sync()

    assert lookups == [host]
    assert home.result == "network_error"


def test_localhost_is_this_machine_whatever_its_name_leads_to(home, monkeypatch):
    """A name server or a hosts file may send localhost to another machine."""
    sent = home.fill(1)
    real_getaddrinfo = socket.getaddrinfo
    hosts = []

    def mislead(host, *args, **kwargs):
        hosts.append(host)
        is_name = str(host).lower() == "localhost"
        return real_getaddrinfo("127.0.0.2" if is_name else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", mislead)
    with home.backend() as backend:
        home.configure(baseUrl="http://localhost:%d/gate/lab" % backend.port)

        home.sync()

    assert backend.sessions == sent
    assert "localhost" not in hosts


@pytest.mark.parametrize("base_url", [
    # plain http to another machine, or to a name that looks like this one
    "http://example.test",
    "http://127.0.0.1.example.test",
    "http://localhost.example.test",
    "http://localhost.",
    "http://mylocalhost",
    "http://128.0.0.1",
    "http://126.0.0.1",
    "http://0.0.0.0",
    "http://[::]",
    "http://[::2]",
    "http://[::ffff:127.0.0.1]",
    # other ways to write an address of this machine
    "http://127.1",
    "http://2130706433",
    "http://0x7f.0.0.1",
    "http://127.0.0.256",
    "http://127.0.0.01",
    "http://127.0.0.1.",
    # other schemes, or none
    "ftp://127.0.0.1",
    "ws://127.0.0.1",
    "file:///etc/passwd",
    "//127.0.0.1",
    "127.0.0.1",
    "localhost:80",
    "http:127.0.0.1",
    "http:///127.0.0.1",
    "",
    "https://",
    "http://",
    "not a URL",
    # user and password
    pytest.param("https://me@example.test", id="user"),
    pytest.param("https://me:word@example.test", id="user and password"),
    "http://me@127.0.0.1",
    "http://127.0.0.1@example.test",
    "http://127.0.0.1\\@example.test",
    # query and fragment
    "https://example.test?x",
    "https://example.test/?x",
    "https://example.test/?",
    "https://example.test/#x",
    "https://example.test/#",
    # ports
    "https://example.test:port",
    "https://example.test:99999",
    "https://example.test:0",
    "https://example.test:",
    "https://example.test:-1",
    "https://127.0.0.1%3a80",
    # blanks and control characters
    " https://example.test",
    "https://example.test ",
    "https://exa mple.test",
    "https://example.test\n",
    "https://example.test\nHost: x",
    "https://example.test/a b",
    "https://example.test/a\nb",
    "https://example.test/a\tb",
    "https://example.test/a\r\nHost: x",
    "https://example.test/a\0b",
    "https://example.test/a\x7fb",
    # characters that are not ASCII, some of which other programs take for ASCII
    "https://ex\u00e4mple.test",
    "https://example.test/\u00e4",
    "https://example\u3002test",
    "http://localho\u017ft",
    "http\u017f://example.test",
    "http://127.0.0.\u0661",
    "http://\uff11\uff12\uff17.0.0.1",
    "http://127\u30020.0.1",
    # brackets
    "http://[::1].example.test",
    "http://x[::1]",
    "http://example.test[::1]:80",
    "https://[::1]x",
    "https://[::1",
    "https://[x]",
    "https://[fe80::1%25lo]",
    # other types
    7,
    True,
    [],
    ["https://example.test"],
    {"url": "http://127.0.0.1"},
], ids=ascii)
def test_refused_base_url_is_never_contacted(home, lookups, base_url):
    home.fill(1)
    home.configure(baseUrl=base_url)

    home.sync()

    assert lookups == []
    assert home.result == "network_error"
    assert home.completed == [0, 0]


def test_base_url_flag_is_used_without_one_in_config(home):
    sent = home.fill(1)
    with FakeBackend() as backend:
        home.configure(baseUrl=None)

        assert home.run("--base-url", backend.url) == SILENT

    assert backend.sessions == sent


def test_base_url_in_config_comes_before_the_flag(home):
    sent = home.fill(1)
    with home.backend() as backend, FakeBackend() as other:
        assert home.run("--base-url", other.url) == SILENT

    assert backend.sessions == sent
    assert other.connections == 0


def test_base_url_flag_does_not_replace_a_refused_one(home):
    home.fill(1)
    with FakeBackend() as backend:
        home.configure(baseUrl="http://example.test")

        assert home.run("--base-url", backend.url) == SILENT

    assert backend.connections == 0
    assert home.result == "network_error"


@pytest.mark.parametrize("base_url", [
    "http://example.test", "http://127.0.0.1@example.test", "https://example.test?x", "",
])
def test_base_url_flag_follows_the_same_rules(home, lookups, base_url):
    home.configure(baseUrl=None)
    home.fill(1)
    run = secondme_sync.Run(str(home.dir), {}, base_url=base_url)

    with pytest.raises(secondme_sync.Stop):
        secondme_sync.sync(run)

    assert lookups == []
    assert home.result == "network_error"


root_only = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")


def as_user(uid):
    """Return a shim that runs the script as another user.

    That user may not be able to read the files of this Python, so modules come first.
    """
    return """
import argparse, email.utils, encodings.idna, errno, faulthandler, fcntl, http.client, os, pwd
import selectors, signal, threading, urllib.parse
argparse.ArgumentParser().format_help()  # argparse imports more when it is used
runpy.run_path(sys.argv[0])  # the modules at the top of the script
source = open(sys.argv[0]).read()
os.setgroups([])
os.setgid(%d)
os.setuid(%d)
exec(source, {"__name__": "__main__"})
""" % (uid, uid)


def assert_no_home(home, shim="", **environment):
    """Fail if a run in the folder of home finds a home directory there, or gives no reason."""
    home.fill(1)
    shutil.copytree(str(home.dir), str(home.path / "~" / ".secondme"))
    with home.backend(default=None) as backend:
        shutil.copy(str(home.path_of("config")), str(home.path / "~" / ".secondme"))
        before = home.snapshot()

        silent = home.run(shim=shim, **environment)
        verbose = home.run("-v", shim=shim, **environment)

        assert silent == SILENT
        assert verbose.code == 0
        assert b"no home directory" in verbose.err
        assert home.snapshot() == before
        assert backend.connections == 0


@pytest.mark.parametrize("path", ["", ".", "~", "./~", "no-such-folder"])
def test_home_that_is_not_absolute_is_no_home(home, path):
    """It would be a folder of the working directory, which may be anybody's."""
    assert_no_home(home, HOME=path)


@root_only
@pytest.mark.skipif(sys.version_info < (3, 8), reason="~ is then an error of Python's own")
def test_user_without_name_or_home_has_no_home(open_home):
    assert_no_home(open_home, shim=as_user(54321), HOME=None)


@pytest.mark.skipif(os.name != "nt", reason="USERPROFILE is a variable of Windows")
def test_home_comes_before_userprofile(home):
    """In Git Bash the two may differ, and the skill's shell writes its logs to HOME."""
    sent = home.fill(1)
    elsewhere = home.path / "elsewhere"
    elsewhere.mkdir()
    with home.backend() as backend:
        assert home.run(USERPROFILE=str(elsewhere)) == SILENT

    assert backend.sessions == sent


# State: the record, its file, its lock.

STATE_KEYS = {log + "_bytes" for log in secondme_sync.LOGS} | {
    "last_sync_ts", "last_sync_result", "resume"}


def utc_now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def test_state_has_the_keys_of_the_contract(home):
    home.log("usage", 1)
    home.log("feedback", 2, 3)
    begun = utc_now()

    home.deliver()

    state = home.offsets()
    assert set(state) == STATE_KEYS
    assert state["usage_bytes"] == home.size("usage")
    assert state["feedback_bytes"] == home.size("feedback")
    assert state["last_sync_result"] == "ok"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", state["last_sync_ts"])
    assert begun <= state["last_sync_ts"] <= utc_now()


@pytest.mark.parametrize("name", ["usage", "feedback"])
def test_mark_identifies_a_log_by_its_first_256_bytes(home, name):
    """Version 1.1.0 has written such marks: they must stay valid."""
    home.log("usage", 1)
    home.log("feedback", 2, 3)

    home.deliver()

    mark = home.offsets()["resume"][name]
    beginning = home.path_of(name + ".jsonl").read_bytes()[:256]
    assert mark["bytes"] == home.size(name)
    assert mark["anonymous"] == 0
    assert mark["fingerprint"] == zlib.crc32(beginning)


def test_record_is_one_line_of_512_bytes(home):
    home.fill(1)

    home.deliver()

    content = home.state.read_bytes()
    assert len(content) == 512
    assert re.fullmatch(rb"\{[^\n]*\} +\n", content)


def test_result_is_network_error_while_a_run_is_on(home):
    """A run that is killed leaves a true result."""
    home.fill(BATCH, 1)
    results = []
    note_result = answers.then(lambda: results.append(home.result))

    home.deliver(note_result, note_result)

    assert results == ["network_error", "network_error"]
    assert home.result == "ok"


@pytest.fixture
def state(home):
    """A State whose file holds 512 dots."""
    home.write(".sync-offsets", b"." * 512)
    with open(str(home.state), "r+b", buffering=0) as file:
        yield secondme_sync.State(file, str(home.state))


def test_record_of_511_bytes_is_written_with_a_newline(home, state):
    state.write(b"x" * 511, flush=False)

    assert home.state.read_bytes() == b"x" * 511 + b"\n"


def test_record_of_512_bytes_is_refused(home, state):
    """It is not cut, for a part of it is no record."""
    with pytest.raises(OSError):
        state.write(b"x" * 512, flush=False)

    assert home.state.read_bytes() == b"." * 512


MOST = (1 << 63) - 1  # the largest number that is read from a state


def test_long_record_fits_512_bytes(home):
    """Numbers of more digits are not read from a state, so no record grows much longer."""
    state = {"last_sync_ts": "9" * 20, "last_sync_result": "network_error", "resume": {}}
    for name in ("usage", "feedback"):
        state[name + "_bytes"] = MOST
        state["resume"][name] = {"bytes": MOST, "fingerprint": MOST, "anonymous": MOST}
    home.write(".sync-offsets", state)
    home.log("usage", 1)

    home.deliver(DROP)

    assert home.result == "network_error"
    assert home.completed == [MOST, MOST]
    assert home.offsets()["resume"]["feedback"] == state["resume"]["feedback"]
    assert home.state.stat().st_size == 512


def add_logs(monkeypatch, *names):
    """Let the script have more logs."""
    monkeypatch.setattr(secondme_sync, "LOGS", secondme_sync.LOGS + names)
    fields = {mode: dict(secondme_sync.FIELDS[mode], **dict.fromkeys(names, ("ts",)))
              for mode in secondme_sync.FIELDS}
    monkeypatch.setattr(secondme_sync, "FIELDS", fields)


def test_record_that_would_not_fit_is_refused(home, monkeypatch):
    """If it were cut, each run would send everything again. So nothing is sent at all."""
    names = ["log" * 60]
    add_logs(monkeypatch, *names)
    home.fill(3, 3)
    for name in names:
        home.append(name, line(usage(1)) * 3)

    backend = home.deliver()

    assert backend.connections == 0
    assert "cannot be recorded" in backend.said[-1]


def test_mark_of_a_missing_log_is_kept(home):
    home.fill(1, 2)
    home.deliver()
    content = home.path_of("feedback.jsonl").read_bytes()
    mark = home.offsets()["resume"]["feedback"]

    home.path_of("feedback.jsonl").unlink()
    home.log("usage", 1)
    assert home.deliver().sessions == ["s-1"]
    assert home.offsets()["resume"]["feedback"] == mark

    home.append("feedback", content)
    home.log("feedback", 2)
    assert home.deliver().sessions == ["f-2"]


INVALID_NUMBERS = [
    -1, -10**30, 1.5, 1e300, "7", None, True, [1], {}, 2**63, 10**400]


@pytest.mark.parametrize("value", INVALID_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", ["usage_bytes", "feedback_bytes"])
def test_invalid_offset_counts_as_zero(home, key, value):
    home.fill(2, 1)
    home.write(".sync-offsets", {key: value})

    backend = home.deliver()

    assert backend.modes == [("community", 3)]
    home.assert_done()


@pytest.mark.parametrize("value", INVALID_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", ["bytes", "anonymous", "fingerprint"])
def test_invalid_number_in_a_mark_counts_as_zero(home, key, value):
    home.fill(2, 1)
    mark = {"bytes": 0, "fingerprint": 0, "anonymous": 0}
    mark[key] = value
    home.write(".sync-offsets", {"resume": {"usage": mark}})

    backend = home.deliver()

    assert backend.modes == [("community", 3)]
    home.assert_done()


@pytest.mark.parametrize("key, value", [
    # key of the mark, a valid number that does not belong to the log
    ("bytes", 10**9),
    ("bytes", 2**63 - 1),
    ("anonymous", 10**9),
    ("fingerprint", 7),
])
def test_log_that_does_not_fit_its_mark_is_new(home, key, value):
    """It may hold again what was sent as anonymous, so it goes as anonymous."""
    home.fill(2, 1)
    mark = {"bytes": 0, "fingerprint": 0, "anonymous": 0}
    mark[key] = value
    home.write(".sync-offsets", {"resume": {"usage": mark}})

    backend = home.deliver()

    assert backend.modes == [("anonymous", 2), ("community", 1)]
    home.assert_done()


@pytest.mark.parametrize("beyond", [
    pytest.param(1, id="one byte"),
    pytest.param(10**9, id="far"),
])
def test_reference_offset_past_the_end_makes_a_log_new(home, beyond):
    """The reference script sends nothing of such a log until it has grown past the offset."""
    home.fill(2, 1)
    home.write_state_of_reference_script(usage_bytes=home.size("usage") + beyond)

    backend = home.deliver()

    assert backend.modes == [("anonymous", 2)]
    home.assert_done()
    home.log("usage", 2)
    assert home.deliver().modes == [("community", 1)]


@pytest.mark.parametrize("usage_events, modes", [
    # events that the reference script has sent of two, what is sent then
    (0, [("community", 2)]),
    (1, [("community", 1)]),
    (2, []),
])
def test_reference_offset_within_a_log_is_continued(home, usage_events, modes):
    home.fill(usage_events)
    offset = home.size("usage")
    home.log("usage", *range(usage_events, 2))
    home.write_state_of_reference_script(usage_bytes=offset)

    assert home.deliver().modes == modes


INVALID_RESUMES = [
    7,
    [],
    "x",
    None,
    {"usage": 7},
    {"usage": []},
    {"usage": {}},
    {"usage": {"bytes": 9}},
    {"usage": {"bytes": 9, "fingerprint": "x"}},
    {"usage": {"bytes": 9, "guard": 3}},
]


@pytest.mark.parametrize("resume", INVALID_RESUMES, ids=repr)
def test_invalid_resume_falls_back_to_usage_bytes(home, resume):
    home.fill(1)
    offset = home.size("usage")
    home.log("usage", 1)
    home.write_state_of_reference_script(usage_bytes=offset, resume=resume)

    assert home.deliver().sessions == ["s-1"]
    home.assert_done()


def write_foreign_state(home, length):
    """Write the state as another program might: indented, with keys of its own."""
    state = dict(home.offsets(), more={"of": "another program"}, pad="")
    state["pad"] = "x" * (length - len(json.dumps(state, indent=1)))
    home.write(".sync-offsets", json.dumps(state, indent=1))


def write_state(change):
    """Return a change of the state's bytes."""
    return lambda home: home.write(".sync-offsets", change(home.state.read_bytes()))


LOST = ["s-0", "s-1", "s-2"]
KEPT = ["s-2"]


@pytest.mark.parametrize("change, sent", [
    # what is done to a state that says that s-0 and s-1 are sent, what is sent of s-0 to s-2
    pytest.param(lambda home: home.state.unlink(), LOST, id="missing"),
    pytest.param(write_state(lambda data: b""), LOST, id="empty"),
    pytest.param(write_state(lambda data: b" " * 512), LOST, id="blank"),
    pytest.param(write_state(lambda data: b"\0" * 512), LOST, id="NULs"),
    pytest.param(write_state(lambda data: data[:90]), LOST, id="half"),
    pytest.param(write_state(lambda data: b"[1]"), LOST, id="another type"),
    pytest.param(write_state(lambda data: bytes(range(256)) * 8), LOST, id="garbage"),
    pytest.param(write_state(lambda data: b"[" * 100000), LOST, id="deep"),
    pytest.param(write_state(lambda data: b'{"usage_bytes": ' + b"9" * 5000), LOST, id="digits"),
    pytest.param(write_state(lambda data: data.strip() + b"\0" * 99), KEPT, id="NULs behind"),
    pytest.param(write_state(lambda data: b"\xef\xbb\xbf" + data.strip()), KEPT, id="BOM before"),
    pytest.param(write_state(lambda data: data.strip()), KEPT, id="without padding"),
    pytest.param(write_state(lambda data: data + b'x": 1}'), KEPT, id="rest of another behind"),
    pytest.param(lambda home: write_foreign_state(home, 511), KEPT, id="foreign, 511 bytes"),
    pytest.param(lambda home: write_foreign_state(home, 512), KEPT, id="foreign, 512 bytes"),
    pytest.param(lambda home: write_foreign_state(home, 513), KEPT, id="foreign, 513 bytes"),
    pytest.param(lambda home: write_foreign_state(home, 5000), KEPT, id="foreign, 5000 bytes"),
])
def test_any_state_file_is_replaced_by_a_valid_one(home, change, sent):
    home.fill(2)
    home.deliver()
    change(home)
    home.log("usage", 2)

    backend = home.deliver()

    assert backend.sessions == sent
    home.assert_done()
    assert set(home.offsets()) == STATE_KEYS


@posix_only("Windows has links for administrators only")
def test_linked_state_stays_a_link(home):
    home.fill(2)
    home.deliver()
    home.state.replace(home.path / "elsewhere")
    home.state.symlink_to(home.path / "elsewhere")
    home.log("usage", 2)

    backend = home.deliver()

    assert backend.sessions == ["s-2"]
    home.assert_done()
    assert home.state.is_symlink()


@pytest.fixture(params=[0, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@posix_only("Windows has no modes of files")
def test_new_state_is_for_its_owner_only(home, umask):
    home.fill(1)

    home.deliver()

    assert oct(home.state.stat().st_mode & 0o777) == "0o600"


@posix_only("Windows has no modes of files")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666], ids=oct)
def test_existing_state_keeps_its_mode(home, umask, mode):
    home.fill(1)
    home.write(".sync-offsets", {})
    home.state.chmod(mode)

    home.deliver()

    assert oct(home.state.stat().st_mode & 0o777) == oct(mode)
    home.assert_done()


NOBODY = 65534


@root_only
def test_root_run_leaves_state_usable_by_its_owner(open_home):
    home = open_home
    for path in home.path.rglob("*"):
        os.chown(str(path), NOBODY, NOBODY)
    with home.backend() as backend:
        for number, shim in enumerate([as_user(NOBODY), "", as_user(NOBODY)]):
            home.log("usage", number)
            assert home.run(shim=shim) == SILENT
            assert home.result == "ok"

    assert backend.sessions == ["s-0", "s-1", "s-2"]
    home.assert_done()
    assert home.state.stat().st_uid == NOBODY
    assert oct(home.state.stat().st_mode & 0o777) == "0o600"


# What a run says where it sends nothing, as it could not record what was accepted.
NOT_RECORDED = "cannot be recorded"
NOT_READ = ".sync-offsets cannot be read"

needs_links = posix_only("Windows has links for administrators only")


@pytest.mark.parametrize("make, reason", [
    pytest.param(lambda path: path.mkdir(), NOT_READ, id="directory"),
    pytest.param(lambda path: os.mkfifo(str(path)), NOT_READ, id="FIFO",
                 marks=posix_only("Windows has no FIFOs")),
    pytest.param(lambda path: path.symlink_to("/dev/null"), NOT_READ, id="device",
                 marks=needs_links),
    pytest.param(lambda path: path.symlink_to(path), NOT_READ, id="link to itself",
                 marks=needs_links),
    pytest.param(lambda path: path.symlink_to(path.parent / "nowhere" / "x"), NOT_RECORDED,
                 id="dangling link", marks=needs_links),
])
def test_unusable_state_file_means_nothing_is_sent(home, make, reason):
    sent = home.fill(2, 1)
    make(home.state)
    with home.backend() as backend:
        assert home.run() == SILENT
        assert reason in home.run("-v").err.decode("utf-8", "replace")
        assert backend.connections == 0

    if os.path.isdir(str(home.state)):
        home.state.rmdir()
    else:
        home.state.unlink()
    assert home.deliver().sessions == sent
    home.assert_done()


def leave_no_room():
    """Let no file of this process grow, as if the disk were full."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def sync_one_event(home):
    home.log("usage", 900)
    home.deliver()


# What the state is before a run; each leaves all events of home.fill(2, 1) pending.
missing_state = pytest.param(lambda home: None, id="no state")
reference_state = pytest.param(
    lambda home: home.write_state_of_reference_script(), id="reference script's state")
own_state = pytest.param(sync_one_event, id="own state")


@posix_only("Windows has no limits of a process")
@pytest.mark.parametrize("prepare", [missing_state, reference_state, own_state])
def test_full_disk_means_nothing_is_sent(home, prepare):
    prepare(home)
    sent = home.fill(2, 1)
    before = home.state.read_bytes() if home.state.exists() else b""
    full_disk = {"preexec_fn": leave_no_room}
    with home.backend() as backend:
        assert home.run(options=full_disk) == SILENT
        assert NOT_RECORDED in home.run("-v", options=full_disk).err.decode("utf-8", "replace")
        assert backend.connections == 0
        assert home.state.read_bytes() == before

        assert home.run() == SILENT

    assert backend.sessions == sent
    home.assert_done()


@root_only
@pytest.mark.parametrize("is_new", [True, False], ids=["folder of another", "state of another"])
def test_unwritable_state_means_nothing_is_sent(open_home, is_new):
    home = open_home
    sent = home.fill(2, 1)
    if not is_new:
        home.analytics.chmod(0o777)
        home.write(".sync-offsets", {})
        home.state.chmod(0o644)
    with home.backend() as backend:
        assert home.run(shim=as_user(NOBODY)) == SILENT
        assert NOT_RECORDED in home.run("-v", shim=as_user(NOBODY)).err.decode("utf-8")
        assert backend.connections == 0

        assert home.run() == SILENT

    assert backend.sessions == sent
    home.assert_done()


def failing(code):
    """Return a function that fails with an error, named as in errno."""
    def fail(*args, **kwargs):
        raise OSError(getattr(errno, code), "made by the test")
    return fail


@pytest.mark.parametrize("prepare", [missing_state, reference_state, own_state])
@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "ENOTSUP"])
def test_file_system_without_fsync_syncs(home, monkeypatch, code, prepare):
    prepare(home)
    sent = home.fill(2, 1)
    monkeypatch.setattr(os, "fsync", failing(code))

    assert home.deliver().sessions == sent
    home.assert_done()


@pytest.mark.parametrize("prepare", [missing_state, reference_state, own_state])
@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"])
def test_failed_flush_means_nothing_is_sent(home, monkeypatch, code, prepare):
    prepare(home)
    sent = home.fill(2, 1)
    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", failing(code))

        backend = home.deliver()

    assert backend.connections == 0
    assert NOT_RECORDED in backend.said[-1]
    assert home.deliver().sessions == sent
    home.assert_done()


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"])
def test_state_that_does_not_open_means_nothing_is_sent(home, monkeypatch, code):
    sent = home.fill(2, 1)
    real_open = os.open

    def fail(path, *args, **kwargs):
        if str(path) == str(home.state):
            failing(code)()
        return real_open(path, *args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(os, "open", fail)

        backend = home.deliver()

    assert backend.connections == 0
    assert NOT_RECORDED in backend.said[-1]
    assert home.deliver().sessions == sent


@posix_only("Windows has no flock")
@pytest.mark.parametrize("code", ["EAGAIN", "EACCES"])
def test_refused_lock_is_held_by_another_run(home, monkeypatch, code):
    home.fill(1)
    monkeypatch.setattr("fcntl.flock", failing(code))

    backend = home.deliver()

    assert backend.connections == 0
    assert "another run" in backend.said[-1]


@posix_only("Windows has no flock")
@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "ENOSYS", "EINVAL"])
def test_file_system_without_locks_syncs(home, monkeypatch, code):
    sent = home.fill(1, 1)
    monkeypatch.setattr("fcntl.flock", failing(code))

    assert home.deliver().sessions == sent
    home.assert_done()
    assert home.deliver().sessions == []


@pytest.fixture
def running(home, hold):
    """A run that has posted its only event, s-0, and waits for the answer.

    It is a Popen; running.backend is its backend.
    """
    home.fill(1)
    with home.backend(hold) as backend:
        process = home.spawn()
        assert hold.arrived.wait(20)
        process.backend = backend
        yield process
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_second_run_leaves_at_once(home, running):
    assert home.run() == SILENT
    assert len(running.backend.requests) == 1


def test_second_run_says_that_there_is_another(home, running):
    assert "another run" in home.sync()[-1]


def test_skip_pending_fails_beside_a_run(home, running):
    result = home.main("--skip-pending")

    assert result.code == 1
    assert result.out == b""
    assert b"another run" in result.err


def test_dry_run_works_beside_a_run(home, running):
    result = home.run("--dry-run")

    assert result.code == 0
    assert json.loads(result.out.decode("utf-8"))["events"][0]["session"] == "s-0"


def test_lock_ends_with_its_process(home, running):
    running.kill()
    wait(running)

    assert home.run() == SILENT

    assert running.backend.sessions == ["s-0", "s-0"]
    home.assert_done()


def test_eight_runs_at_once_send_every_event_once(home):
    sent = home.fill(5 * BATCH, 150)
    with home.backend(*[answers.after(0.05)] * 6) as backend:
        runs = [home.spawn() for _ in range(8)]
        results = [wait(run) for run in runs]

    assert results == [SILENT] * 8
    assert backend.sessions == sent
    home.assert_done()


def test_reader_beside_a_run_finds_whole_records(home):
    home.append("usage", b"{}\n" * (250 * BATCH))
    reads = 0
    offsets = []
    with home.backend(keep=False):
        run = home.spawn()
        while run.poll() is None:
            if not home.state.exists() or home.state.read_bytes().strip() == b"":
                continue
            reads += 1
            # A read that overlaps the overwrite may see a part of each record.
            with contextlib.suppress(ValueError):
                offsets.append(home.offsets()["resume"]["usage"]["bytes"])

        assert wait(run) == SILENT

    assert len(offsets) > 0.99 * reads
    assert len(set(offsets)) > 5
    assert offsets == sorted(offsets)
    home.assert_done()


@pytest.fixture
def flushes(home, monkeypatch):
    """The names of what is flushed, each with the result that is recorded at that moment."""
    flushed = []

    def note(descriptor):
        for path in [home.analytics] + sorted(home.analytics.iterdir()):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                flushed.append((path.name, home.result))

    monkeypatch.setattr(os, "fsync", note)
    return flushed


def test_logs_are_flushed_before_the_record(home, flushes):
    """After a power cut, new lines could otherwise land below the saved offset.

    Records between the first and the last one need not be flushed.
    """
    home.fill(BATCH, 1)

    home.deliver()

    assert [flush for flush in flushes if flush[0] != "analytics"] == [
        # file, result in the state
        ("usage.jsonl", None),
        ("feedback.jsonl", None),
        (".sync-offsets", "network_error"),
        (".sync-offsets", "ok"),
    ]


def test_logs_are_flushed_before_they_are_skipped(home, flushes):
    home.fill(1, 1)

    home.main("--skip-pending")

    assert [flush for flush in flushes if flush[0] != "analytics"] == [
        # file, result in the state
        ("usage.jsonl", None),
        ("feedback.jsonl", None),
        (".sync-offsets", "skipped"),
    ]


@posix_only("Windows cannot open a folder")
def test_name_of_a_new_state_is_flushed(home, flushes):
    home.fill(1)

    home.deliver()

    assert [name for name, _ in flushes].index("analytics") == 0


def test_short_state_is_lengthened_before_it_is_overwritten(home, flushes):
    """A power cut may keep new bytes, but not the new length, and so leave half a record."""
    home.fill(1)
    home.write_state_of_reference_script(usage_bytes=0, last_sync_result="server_error")

    home.deliver()

    assert flushes[0] == (".sync-offsets", "server_error")


def test_full_record_is_not_lengthened(home, flushes):
    home.fill(1)
    home.deliver()
    home.log("usage", 1)
    del flushes[:]

    home.deliver()

    assert flushes[0] == ("usage.jsonl", "ok")


@posix_only("Windows cannot open a folder")
def test_folder_that_is_flushed_is_closed(home, monkeypatch):
    """The folder of a new state is opened to be flushed."""
    opened = []
    closed = []
    real_open = os.open
    real_close = os.close

    def note_open(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        if path == str(home.analytics):
            opened.append(descriptor)
        return descriptor

    def note_close(descriptor):
        closed.append(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "close", note_close)
    home.fill(1)

    home.deliver()

    assert len(opened) == 1
    assert opened[0] in closed


# Read: the logs, line by line.

@pytest.mark.parametrize("name", ["usage", "feedback"])
@pytest.mark.parametrize("cut", [
    pytest.param(1, id="after the first byte"),
    pytest.param(40, id="after 40 bytes"),
    pytest.param(-60, id="60 bytes too early"),
    pytest.param(-2, id="before the last brace"),
])
def test_torn_line_waits_for_its_rest(home, name, cut):
    logged = home.fill(1, 1)
    event = MAKERS[name](7, comment="x" * 80)
    home.append(name, line(event)[:cut])

    assert home.deliver().sessions == logged
    assert home.deliver().requests == []

    home.append(name, line(event)[cut:])
    assert home.deliver().sessions == [event["session"]]
    home.assert_done()


@pytest.mark.parametrize("rest, sessions", [
    # what is appended                  what arrives then
    pytest.param(b"\n", [], id="LF"),
    pytest.param(b"\r\n", [], id="CR LF"),
    pytest.param(b"\n\n", [], id="blank line"),
    pytest.param(b"\n" + line(usage(2)), ["s-2"], id="next line"),
    pytest.param(b"\n" + line(usage(2))[:-1], ["s-2"], id="next line without newline"),
])
def test_whole_event_without_newline_is_sent_once(home, rest, sessions):
    home.append("usage", line(usage(1))[:-1])
    assert home.deliver().sessions == ["s-1"]
    assert home.deliver().sessions == []

    home.append("usage", rest)
    assert home.deliver().sessions == sessions
    home.assert_done()


@pytest.mark.parametrize("text", [
    pytest.param(b'{"session": "bad", "outcome": NaN}', id="NaN"),
    pytest.param(b"\0" * 5000, id="NULs"),
    pytest.param(b"x" * 2 * secondme_sync.MAX_LINE_BYTES, id="too long"),
    pytest.param(b'{"session": "bad", ', id="half an object"),
])
def test_bad_last_line_keeps_nothing_back(home, text):
    logged = home.fill(2, 2)
    home.append("usage", text)
    assert home.deliver().sessions == logged
    assert home.deliver().sessions == []

    home.append("usage", b"\n")
    home.log("usage", 7)
    assert home.deliver().sessions == ["s-7"]
    home.assert_done()


@pytest.mark.parametrize("name, session", [("usage", "s-900"), ("feedback", "f-900")])
def test_line_logged_during_a_run_goes_next_time(home, name, session):
    logged = home.fill(BATCH + 20, BATCH + 20)

    during = home.deliver(answers.then(lambda: home.log(name, 900)))

    assert during.sessions == logged
    assert home.deliver().sessions == [session]
    home.assert_done()


def test_line_completed_during_a_run_is_sent_once(home):
    home.fill(BATCH + 1)
    home.append("usage", line(usage(900))[:40])

    during = home.deliver(answers.then(lambda: home.append("usage", line(usage(900))[40:])))

    assert (during.sessions + home.deliver().sessions).count("s-900") == 1
    home.assert_done()


class GrowingLog:
    """An open log that grows whenever its beginning is read."""

    def __init__(self, file, grow_before, grow_after):
        self.file = file
        self.grow_before = grow_before
        self.grow_after = grow_after

    def read(self, size):
        self.grow_before()
        head = self.file.read(size)
        self.grow_after()
        return head

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("grows", ["before its beginning is read", "afterwards"])
def test_log_that_grows_while_opened_is_the_same(home, monkeypatch, grows):
    """Its size and its first 256 bytes are not read at one moment."""
    logged = []
    real = secondme_sync.open_regular

    def grow():
        logged.append("s-%d" % len(logged))
        home.append("usage", line({"session": logged[-1]}))

    def no_growth():
        pass

    def open_regular(path):
        if not path.endswith("usage.jsonl"):
            return real(path)
        if grows == "afterwards":
            return GrowingLog(real(path), no_growth, grow)
        return GrowingLog(real(path), grow, no_growth)

    grow()
    monkeypatch.setattr(secondme_sync, "open_regular", open_regular)
    arrived = home.deliver().sessions + home.deliver().sessions
    monkeypatch.undo()
    arrived += home.deliver().sessions

    assert arrived == logged
    home.assert_done()


@pytest.mark.parametrize("opening", [1, 2])
def test_line_completed_while_its_log_is_opened_is_sent_once(home, monkeypatch, opening):
    """A run opens a log twice. It reads no further than the log was long at that moment."""
    home.append("usage", b'{"session": "s-0"}\n{"session": ')
    real = secondme_sync.open_regular
    openings = []

    def complete():
        openings.append(1)
        if len(openings) == opening:
            home.append("usage", b'"s-1"}\n')

    def open_regular(path):
        file = real(path)
        return GrowingLog(file, lambda: None, complete) if path.endswith("usage.jsonl") else file

    monkeypatch.setattr(secondme_sync, "open_regular", open_regular)
    arrived = home.deliver().sessions
    monkeypatch.undo()
    arrived += home.deliver().sessions

    assert arrived == ["s-0", "s-1"]
    home.assert_done()


@pytest.mark.parametrize("unlink", [
    pytest.param(True, id="replaced"), pytest.param(False, id="truncated")])
@posix_only("an open log can be neither replaced nor truncated there")
def test_log_rewritten_during_a_run_is_read_later(home, unlink):
    home.fill(BATCH + 50)
    home.deliver(answers.then(
        lambda: home.rewrite("usage", line(usage(901)), unlink=unlink)))

    assert times(home.deliver()) == [usage(901)["ts"]]
    home.assert_done()


@pytest.mark.parametrize("stale", [
    pytest.param(0, id="nothing"),
    pytest.param(1, id="a part"),
    pytest.param(10 ** 6, id="too much"),
])
def test_stale_usage_bytes_are_corrected(home, stale):
    """A run that was killed at its end leaves usage_bytes behind resume."""
    home.fill(2, 2)
    home.deliver()
    home.write(".sync-offsets", dict(
        home.offsets(), usage_bytes=stale, last_sync_result="network_error"))

    assert home.main("--pending").out == b"yes\n"
    assert home.deliver().requests == []
    home.assert_done()


# Read: lines that are passed over, and lines that look odd and are sent.

TOO_LONG = b'{"session": "bad", "x": "%s"}' % (b"x" * secondme_sync.MAX_LINE_BYTES)


def padded(session, size):
    """Return a line of so many bytes, newline aside, whose event has a session."""
    start = b'{"session": "%s"' % session
    return start + b" " * (size - len(start) - 1) + b"}"


def count_passed_over(backend):
    """Return how many lines the messages of a run count as passed over."""
    pattern = re.escape(secondme_sync.PASSED_OVER).replace(r"\{\}", r"(\d+)") + "$"
    found = [re.match(pattern, message) for message in backend.said]
    return sum(int(match.group(1)) for match in found if match)


def deliver_between_neighbours(home, text):
    """Log event 1, a line, and event 2; sync; return the backend."""
    home.log("usage", 1)
    home.append("usage", text + b"\n")
    home.log("usage", 2)
    return home.deliver()


@pytest.mark.parametrize("text", [
    pytest.param(b'[{"session": "bad"}]', id="array"),
    pytest.param(b'"session"', id="string"),
    pytest.param(b"7", id="number"),
    pytest.param(b"null", id="null"),
    pytest.param(b"{'session': 'bad'}", id="no JSON"),
    pytest.param(b'{"session": "bad", ', id="half an object"),
    pytest.param(b'{"session": "bad",}', id="comma too many"),
    pytest.param(b'{"session": "bad"} {"session": "bad"}', id="two objects"),
    pytest.param(b'{"session": "b\0d"}', id="NUL inside"),
    pytest.param(b'{"session": "b\x01d"}', id="control character inside"),
    pytest.param(bytes(range(128, 256)), id="bytes that are no text"),
    pytest.param(json.dumps(usage(9)).encode("utf-16"), id="UTF-16"),
    pytest.param(b"[" * 100000 + b"]" * 100000, id="deep array"),
    pytest.param(b'{"issues": ' + b"[" * 100000, id="deep and unclosed"),
    pytest.param(TOO_LONG, id="too long"),
    pytest.param(TOO_LONG.replace(b"x" * 9, b"\\" * 45), id="much too long"),
    pytest.param(padded(b"bad", secondme_sync.MAX_LINE_BYTES + 1), id="a byte too long"),
    pytest.param(b"x" * secondme_sync.MAX_LINE_BYTES + b'{"session": "bad"}',
                 id="object at the end of a long line"),
    pytest.param(b" " * (secondme_sync.MAX_LINE_BYTES + 9) + b'{"session": "bad"}',
                 id="object behind many blanks"),
    pytest.param(b'{"x": [' + b" " * (secondme_sync.MAX_LINE_BYTES - 7)
                 + padded(b"bad", secondme_sync.MAX_LINE_BYTES) + b"]}",
                 id="object within a long line"),
])
def test_line_without_an_event_is_passed_over(home, text):
    backend = deliver_between_neighbours(home, text)

    assert backend.sessions == ["s-1", "s-2"]
    assert count_passed_over(backend) == 1
    home.assert_done()


@pytest.mark.parametrize("rest", [
    pytest.param(b" ", id="blanks"),
    pytest.param(b' {"session": "bad"}', id="another object"),
])
def test_too_long_line_is_passed_over_as_a_whole(home, rest):
    """Even if its first 1 MiB is a JSON object already."""
    text = padded(b"bad", secondme_sync.MAX_LINE_BYTES) + rest

    backend = deliver_between_neighbours(home, text)

    assert backend.sessions == ["s-1", "s-2"]
    assert count_passed_over(backend) == 1
    home.assert_done()


@pytest.mark.parametrize("text", [
    pytest.param(b"", id="empty"),
    pytest.param(b" \t  ", id="blanks"),
    pytest.param(b"\r", id="CR"),
    pytest.param(b"\0" * 5000, id="NULs of a power cut"),
])
def test_blank_line_is_not_counted(home, text):
    backend = deliver_between_neighbours(home, text)

    assert backend.sessions == ["s-1", "s-2"]
    assert count_passed_over(backend) == 0
    home.assert_done()


@pytest.mark.parametrize("text, session", [
    # line                                     what arrives as its session
    pytest.param(b'{"session": "a\xffb"}', "a\ufffdb", id="bad UTF-8"),
    pytest.param(b'{"session": "a\xe4\xb8"}', "a\ufffd", id="character cut short"),
    pytest.param(br'{"session": "a\ud800b"}', "a?b", id="lone surrogate"),
    pytest.param(br'{"session": "a\udc00"}', "a?", id="low surrogate"),
    pytest.param(br'{"session": "\udc00\ud800"}', "??", id="surrogates in the wrong order"),
    pytest.param(br'{"session": "\ud83e\udde0"}', "\U0001f9e0", id="pair of surrogates"),
    pytest.param(br'{"session": "a\u0000b"}', "a\0b", id="escaped NUL"),
    pytest.param(b'\xef\xbb\xbf{"session": "s"}', "s", id="BOM"),
    pytest.param(b'{"session": "s"}\r', "s", id="CR LF"),
    pytest.param(b' \t{"session": "s"} ', "s", id="blanks around it"),
    pytest.param(b"\0" * 200 + b'{"session": "s"}', "s", id="behind NULs"),
    pytest.param(padded(b"s", secondme_sync.MAX_LINE_BYTES), "s", id="as long as may be"),
])
def test_odd_line_is_sent(home, text, session):
    backend = deliver_between_neighbours(home, text)

    assert backend.sessions == ["s-1", session, "s-2"]
    assert count_passed_over(backend) == 0
    home.assert_done()


def test_longest_line_needs_no_newline(home):
    home.append("usage", padded(b"long", secondme_sync.MAX_LINE_BYTES))

    assert home.deliver().sessions == ["long"]
    home.assert_done()


@pytest.mark.parametrize("script, result", [([], "ok"), ([answer(500)], "server_error")])
def test_passed_over_lines_are_recorded(home, script, result):
    """Many of them are a batch without events: recorded, and not posted."""
    home.append("usage", b"no event\n" * (3 * secondme_sync.BATCH_BYTES // 9))
    junk = home.size("usage")
    home.log("usage", 1)

    backend = home.deliver(*script)

    assert backend.sizes == [1]
    assert home.result == result
    recorded = home.offsets()["resume"]["usage"]["bytes"]
    assert recorded >= junk - secondme_sync.BATCH_BYTES


def test_log_without_events_needs_no_server(home):
    home.append("usage", b"no event\n")

    backend = home.deliver()

    assert backend.connections == 0
    assert count_passed_over(backend) == 1
    home.assert_done()


# Read: a log that was emptied, replaced or edited.

ORIGINAL = (0, 1, 2, 3, 4)


def text_of(*numbers):
    """Return the lines of usage events, each longer than a fingerprint.

    A note stands in front and is not sent, so that a byte of it can be changed.
    """
    text = b""
    for number in numbers:
        note = "%-*d" % (2 * secondme_sync.FINGERPRINT_BYTES, number)
        text += line(dict({"note": note}, **usage(number)))
    return text


def times_of(*numbers):
    return [usage(number)["ts"] for number in numbers]


def times(backend):
    """Return the ts of the events that arrived: what is left of anonymous ones to know them by."""
    return [event["ts"] for event in backend.events()]


def change_byte(text, index):
    return text[:index] + b"y" + text[index + 1:]


@pytest.fixture(params=["sent", "sent as anonymous", "skipped"])
def done_log(home, request):
    """The usage log, of five events that are done. The mode is community afterwards."""
    home.append("usage", text_of(*ORIGINAL))
    if request.param == "sent":
        home.deliver()
    elif request.param == "sent as anonymous":
        home.deliver(mode="anonymous")
        home.configure(telemetry="community")
    else:
        assert home.main("--skip-pending").code == 0
    return home.path_of("usage.jsonl")


@pytest.mark.parametrize("content, numbers", [
    # the new content                  the events that arrive
    pytest.param(text_of(5), [5], id="shorter log"),
    pytest.param(text_of(*range(10, 17)), range(10, 17), id="longer log"),
    pytest.param(text_of(1, 2, 3, 4), [1, 2, 3, 4], id="first line deleted"),
    pytest.param(text_of(9, *ORIGINAL), [9, 0, 1, 2, 3, 4], id="line put in front"),
    pytest.param(b"#" + text_of(*ORIGINAL)[1:], [1, 2, 3, 4], id="first byte changed"),
    pytest.param(change_byte(text_of(*ORIGINAL), secondme_sync.FINGERPRINT_BYTES - 1),
                 ORIGINAL, id="last byte of the fingerprint changed"),
])
def test_changed_beginning_means_a_new_log(home, done_log, content, numbers):
    """It may hold again what was sent as anonymous, or what was skipped."""
    done_log.write_bytes(content)

    backend = home.deliver()

    assert times(backend) == times_of(*numbers)
    assert backend.modes == [("anonymous", len(numbers))]
    home.assert_done()


def test_replaced_log_is_sent_once(home, done_log):
    done_log.write_bytes(text_of(5, 6))
    home.deliver()

    assert home.deliver().requests == []


def test_events_after_a_replaced_log_go_in_full(home, done_log):
    done_log.write_bytes(text_of(5, 6))
    home.deliver(answer(500))
    home.log("usage", 9)

    backend = home.deliver()

    assert backend.sessions == [None, None, "s-9"]
    assert backend.modes == [("anonymous", 2), ("community", 1)]
    home.assert_done()


def test_log_emptied_before_a_run_begins_anew(home, done_log):
    done_log.write_bytes(b"")
    assert home.deliver().requests == []

    home.log("usage", 9)
    assert home.deliver().sessions == ["s-9"]
    home.assert_done()


def test_log_emptied_between_runs_begins_anew(home, done_log):
    """No run has seen that it was empty, so the new event goes as anonymous."""
    done_log.write_bytes(b"")
    home.log("usage", 9)

    backend = home.deliver()

    assert times(backend) == times_of(9)
    assert backend.sessions == [None]
    home.assert_done()


def test_change_past_the_fingerprint_is_not_noticed(home, done_log):
    done_log.write_bytes(change_byte(text_of(*ORIGINAL), secondme_sync.FINGERPRINT_BYTES))
    assert home.deliver().requests == []

    home.log("usage", 9)
    assert home.deliver().sessions == ["s-9"]


SHORTENED = pytest.mark.parametrize("content", [
    pytest.param(text_of(0, 1, 3, 4), id="third line deleted"),
    pytest.param(text_of(0, 1, 2, 3), id="last line deleted"),
    pytest.param(text_of(*ORIGINAL)[:-9], id="cut in the last line"),
])


@SHORTENED
def test_shortened_log_is_not_sent_again(home, done_log, content):
    done_log.write_bytes(content)
    assert home.deliver().requests == []

    home.log("usage", 9)
    assert home.deliver().sessions == ["s-9"]
    home.assert_done()


@SHORTENED
def test_line_after_unseen_deletion_is_missed(home, done_log, content):
    """A known limit: no run has seen that the log was shorter than its offset for a while."""
    done_log.write_bytes(content + text_of(9))

    assert home.deliver().requests == []


def test_short_log_is_known_by_bytes_seen(home):
    home.append("usage", line({"session": "a", "ts": "first"}))
    home.deliver()
    home.append("usage", line({"session": "b", "ts": "second"}) * 20)
    assert home.deliver().sessions == ["b"] * 20

    home.rewrite("usage", line({"session": "c", "ts": "third"}))
    assert times(home.deliver()) == ["third"]
    home.assert_done()


# Read: files that are missing, broken or fail.


def sync_all(home):
    home.deliver()


def sync_by_the_reference_script(home):
    home.write_state_of_reference_script()


def skip_all(home):
    assert home.main("--skip-pending").code == 0


@pytest.mark.parametrize("finish", [sync_all, sync_by_the_reference_script, skip_all])
def test_missing_log_keeps_its_place(home, finish):
    home.fill(3)
    finish(home)
    log = home.path_of("usage.jsonl")
    away = home.path / "away"

    log.rename(away)
    assert home.deliver().requests == []
    home.log("feedback", 1)
    assert home.deliver().sessions == ["f-1"]

    away.rename(log)
    home.log("usage", 7)
    assert home.deliver().sessions == ["s-7"]
    home.assert_done()


def make_directory(path):
    path.mkdir()
    (path / "file").write_text("x")


NEEDS_LINKS = posix_only("symbolic links need a privilege there")
UNREADABLE = [
    # what stands in the place of a file
    pytest.param(make_directory, id="directory"),
    pytest.param(lambda path: path.symlink_to("/dev/null"), id="device", marks=NEEDS_LINKS),
    pytest.param(lambda path: path.symlink_to("/proc/self/mem"), id="file that fails",
                 marks=NEEDS_LINKS),
    pytest.param(lambda path: path.symlink_to(path), id="link to itself", marks=NEEDS_LINKS),
    pytest.param(lambda path: path.symlink_to(path.parent / "nowhere"), id="dangling link",
                 marks=NEEDS_LINKS),
]
NO_TEXT = [
    pytest.param(lambda path: path.write_bytes(bytes(range(256)) * 8), id="garbage"),
    pytest.param(lambda path: path.write_text(""), id="empty"),
]
OTHER_JSON = [
    pytest.param(lambda path: path.write_text('["community", 7]'), id="array"),
    pytest.param(lambda path: path.write_text("[" * 100000), id="deep array"),
]


def deliver_with_broken_file(home, name, break_file):
    """Put something else in the place of a file; sync; return the backend."""
    path = home.path_of(name)
    with home.backend() as backend:
        path.unlink()
        break_file(path)
        backend.said = home.sync()
    return backend


@pytest.mark.parametrize("name", ["config", "credentials"])
@pytest.mark.parametrize("break_file", UNREADABLE + NO_TEXT + OTHER_JSON)
def test_broken_config_or_login_sends_nothing(home, name, break_file):
    home.fill(1, 1)

    backend = deliver_with_broken_file(home, name, break_file)

    assert backend.connections == 0
    assert home.offsets() is None


@pytest.mark.parametrize("break_file", UNREADABLE + NO_TEXT)
def test_broken_device_id_counts_as_missing(home, break_file):
    logged = home.fill(1, 1)

    backend = deliver_with_broken_file(home, ".device-id", break_file)

    assert backend.sessions == logged
    assert "deviceId" not in backend.bodies()[0]
    home.assert_done()


@pytest.mark.parametrize("name, session", [("usage", "f-0"), ("feedback", "s-0")])
@pytest.mark.parametrize("break_file", UNREADABLE + NO_TEXT + OTHER_JSON)
def test_broken_log_does_not_hold_up_the_other(home, name, session, break_file):
    home.fill(1, 1)

    backend = deliver_with_broken_file(home, name + ".jsonl", break_file)

    assert backend.sessions == [session]
    assert home.result == "ok"


@pytest.mark.parametrize("name, sessions", [
    # the FIFO       what arrives
    ("config", []),
    ("credentials", []),
    (".device-id", ["s-0", "f-0"]),
    ("usage.jsonl", ["f-0"]),
    ("feedback.jsonl", ["s-0"]),
])
@posix_only("there are no FIFOs in folders")
def test_fifo_is_not_opened(home, name, sessions):
    """That would block, so a process of its own tries it."""
    home.fill(1, 1)
    with home.backend() as backend:
        home.path_of(name).unlink()
        os.mkfifo(str(home.path_of(name)))

        assert home.run() == SILENT

    assert backend.sessions == sessions


@pytest.mark.parametrize("folder", [".secondme", "analytics"])
@pytest.mark.parametrize("break_folder", [
    # what stands in the place of the folder
    pytest.param(lambda path: None, id="nothing"),
    pytest.param(lambda path: path.write_text("{}"), id="file"),
    pytest.param(lambda path: os.mkfifo(str(path)), id="FIFO",
                 marks=posix_only("there are no FIFOs in folders")),
    pytest.param(lambda path: path.symlink_to("/dev/null"), id="device", marks=NEEDS_LINKS),
    pytest.param(lambda path: path.symlink_to(path), id="link to itself", marks=NEEDS_LINKS),
    pytest.param(lambda path: path.symlink_to(path.parent / "nowhere"), id="dangling link",
                 marks=NEEDS_LINKS),
])
def test_broken_folder_is_silent(home, folder, break_folder):
    home.fill(1, 1)
    path = {".secondme": home.dir, "analytics": home.analytics}[folder]
    with home.backend() as backend:
        shutil.rmtree(str(path))
        break_folder(path)

        assert home.run() == SILENT

    assert backend.connections == 0


class FailingLog(io.BufferedReader):
    """An open log whose disk fails after some lines were read."""

    def __init__(self, file, lines):
        super().__init__(file.detach())
        self.lines_left = lines

    def readline(self, size=-1):
        self.lines_left -= 1
        if self.lines_left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readline(size)


@pytest.fixture
def fail_after(monkeypatch):
    """A function that lets reads of a log fail after so many lines; undo() mends that."""
    real = secondme_sync.open_regular

    def fail(name, lines):
        def open_regular(path):
            file = real(path)
            return FailingLog(file, lines) if path.endswith(name + ".jsonl") else file

        monkeypatch.setattr(secondme_sync, "open_regular", open_regular)

    fail.undo = monkeypatch.undo
    return fail


def test_log_that_fails_ends_the_run(home, fail_after):
    logged = home.fill(3 * BATCH, 1)
    # Each batch is read from its first line to the first one of the next batch.
    fail_after("usage", 2 * BATCH)

    backend = home.deliver()

    assert backend.sessions == logged[:BATCH]
    assert home.result == "network_error"
    assert "usage.jsonl" in backend.said[-1]
    assert "recorded" not in backend.said[-1]


def test_log_that_failed_loses_nothing(home, fail_after):
    logged = home.fill(3 * BATCH, 1)
    fail_after("usage", 2 * BATCH)
    home.deliver()

    fail_after.undo()

    assert home.deliver().sessions == logged[BATCH:]
    home.assert_done()


def test_second_log_that_fails_loses_nothing(home, fail_after):
    logged = home.fill(BATCH, 3)
    fail_after("feedback", 2)
    first = home.deliver()
    fail_after.undo()

    assert first.sessions == logged[:BATCH]
    assert home.deliver().sessions == logged[BATCH:]
    home.assert_done()


def test_log_that_fails_at_once_sends_nothing(home, fail_after):
    home.fill(2)
    fail_after("usage", 0)

    backend = home.deliver()

    assert backend.connections == 0
    assert "usage.jsonl" in backend.said[-1]
    assert home.offsets() is None


# Shape: what is sent of an event, and how much in a request.

LOGS_AND_MODES = [(name, mode) for name in secondme_sync.LOGS
                  for mode in ("anonymous", "community")]
# Names that skills log, or could, and that no mode sends.
NEVER_SENT = {"device_id", "deviceId", "accessToken", "telemetryMode", "installation_id",
              "Session", "number", "cwd"}


@pytest.mark.parametrize("name, mode", LOGS_AND_MODES)
def test_allowed_fields_are_sent_and_no_others(home, name, mode):
    """For each log that the script knows. README's table says which fields these are."""
    allowed = set(secondme_sync.FIELDS[mode][name])
    others = NEVER_SENT.union(*secondme_sync.COMMUNITY_FIELDS.values()) - allowed
    values = {field: ["value of " + field, 1.5, {"a": "b"}] for field in allowed}
    home.log(name, dict(dict.fromkeys(others, "unwanted"), type="unwanted", **values))

    backend = home.deliver(mode=mode)

    assert backend.events() == [dict(values, type=name)]
    assert b"unwanted" not in backend.requests[0].body


@pytest.mark.parametrize("field, logs", [
    # field             the logs that it is sent of, in community mode
    ("session",         ["usage", "feedback"]),
    ("user_intent",     ["usage", "feedback"]),
    ("error_message",   ["usage"]),
    ("actions_summary", ["feedback"]),
    ("error_summary",   ["feedback"]),
    ("comment",         ["feedback"]),
])
def test_anonymous_mode_removes_field(field, logs):
    """See Anonymous Mode Stripping in the contract."""
    assert logs_that_send(field, "community") == logs
    assert logs_that_send(field, "anonymous") == []


@pytest.mark.parametrize("field, logs", [
    # field               the logs that it is sent of, in both modes
    ("skill",             ["usage", "feedback"]),
    ("ts",                ["usage", "feedback"]),
    ("version",           ["usage", "feedback"]),
    ("os",                ["usage", "feedback"]),
    ("arch",              ["usage", "feedback"]),
    ("outcome",           ["usage", "feedback"]),
    ("phases_used",       ["usage", "feedback"]),
    ("event",             ["usage"]),
    ("duration_s",        ["usage"]),
    ("error_class",       ["usage"]),
    ("references_loaded", ["feedback"]),
    ("rating",            ["feedback"]),
    ("issues",            ["feedback"]),
])
def test_anonymous_mode_preserves_field(field, logs):
    assert logs_that_send(field, "community") == logs
    assert logs_that_send(field, "anonymous") == logs


def logs_that_send(field, mode):
    """Return which of usage and feedback send a field in a mode."""
    event = {field: "value"}
    return [name for name in ("usage", "feedback")
            if secondme_sync.shape_event(mode, name, event).get(field) == "value"]


@pytest.mark.parametrize("mode", ["anonymous", "community"])
@pytest.mark.parametrize("name, defaults", [
    # log         what is sent of {}, besides its type
    ("usage",    {"skill": secondme_sync.DEFAULTS["skill"], "ts": "", "phases_used": []}),
    ("feedback", {"skill": secondme_sync.DEFAULTS["skill"], "ts": "", "phases_used": [],
                  "references_loaded": [], "issues": []}),
])
def test_missing_fields_have_defaults(home, name, defaults, mode):
    home.log(name, {})

    assert home.deliver(mode=mode).events() == [dict(defaults, type=name)]


@pytest.mark.parametrize("name, mode", LOGS_AND_MODES)
def test_nulls_are_not_sent(home, name, mode):
    home.log(name, dict.fromkeys(secondme_sync.COMMUNITY_FIELDS[name]))

    assert home.deliver(mode=mode).events() == [{"type": name}]


@pytest.mark.parametrize("value", [0, False, "", [], {}], ids=repr)
def test_falsy_values_are_sent(home, value):
    home.log("usage", usage(1, outcome=value))

    event = home.deliver().events()[0]

    assert event["outcome"] == value
    assert type(event["outcome"]) is type(value)


def test_body_is_compact_and_not_escaped(home):
    home.log("usage", usage(1, user_intent="查看我的记忆 🧠"))

    backend = home.deliver()

    body = json.dumps(backend.bodies()[0], ensure_ascii=False, separators=(",", ":"))
    assert len(backend.requests[0].body) == len(body.encode("utf-8"))
    assert "查看我的记忆 🧠".encode("utf-8") in backend.requests[0].body


@pytest.mark.parametrize("content, sent", [
    # .device-id                    deviceId in the body
    pytest.param("device-42", "device-42", id="no newline"),
    pytest.param(" device-42\r\n", "device-42", id="blanks around it"),
    pytest.param("my laptop", "my laptop", id="blank inside"),
    pytest.param("\ufeffdevice-42\n", "device-42", id="BOM"),
    pytest.param("device-42\n\0\0\0", "device-42", id="NULs of a power cut"),
    pytest.param(" \n", None, id="blanks"),
    pytest.param(b"device\xff", None, id="no UTF-8"),
    pytest.param("device-42".encode("utf-16"), None, id="UTF-16"),
    pytest.param("device-42".encode("utf-16-le"), None, id="UTF-16 without BOM"),
    pytest.param("device\n42", None, id="two lines"),
    pytest.param("device\x1b42", None, id="control character"),
])
def test_device_id_is_sent_in_community_mode(home, content, sent):
    home.fill(1)
    home.write(".device-id", content)

    assert home.deliver().bodies()[0].get("deviceId") == sent


def test_missing_device_id_is_not_sent(home):
    home.fill(1)
    home.path_of(".device-id").unlink()

    backend = home.deliver()

    assert backend.sessions == ["s-0"]
    assert "deviceId" not in backend.bodies()[0]


def test_anonymous_mode_sends_no_device_id(home):
    home.fill(1, 1)

    backend = home.deliver(mode="anonymous")

    assert backend.sizes == [2]
    assert b"device" not in backend.requests[0].body


# Shape: values that JSON, or Python's encoder, cannot express.

UNENCODABLE = pytest.mark.parametrize("value", [
    pytest.param(b"NaN", id="NaN"),
    pytest.param(b"Infinity", id="Infinity"),
    pytest.param(b"-Infinity", id="-Infinity"),
    pytest.param(b"1e999", id="1e999"),
    pytest.param(b'[{"x": -1.5e999}]', id="-1.5e999 inside"),
])


@UNENCODABLE
def test_unencodable_event_is_passed_over(home, value):
    backend = deliver_between_neighbours(home, b'{"session": "bad", "outcome": %s}' % value)

    assert backend.sessions == ["s-1", "s-2"]
    assert count_passed_over(backend) == 1
    home.assert_done()


@UNENCODABLE
def test_unsent_field_may_hold_anything(home, value):
    backend = deliver_between_neighbours(home, b'{"session": "odd", "note": %s}' % value)

    assert backend.sessions == ["s-1", "odd", "s-2"]
    assert count_passed_over(backend) == 0
    home.assert_done()


def test_removed_field_may_hold_anything(home):
    home.append("usage", b'{"ts": "first", "session": NaN}\n')

    assert times(home.deliver(mode="anonymous")) == ["first"]
    home.assert_done()


@pytest.mark.parametrize("bad", [
    # which of 100 events cannot be encoded
    pytest.param([0], id="first"),
    pytest.param([49], id="middle"),
    pytest.param([99], id="last"),
    pytest.param([0, 1], id="first two"),
    pytest.param([98, 99], id="last two"),
    pytest.param([3, 50, 77], id="three"),
    pytest.param(range(0, 100, 2), id="every other"),
    pytest.param(range(100), id="all"),
])
def test_unencodable_event_costs_no_neighbour(home, bad):
    """The batch is halved until that event stands alone."""
    for number in range(100):
        home.log("usage", usage(number, outcome=float("nan" if number in bad else 1)))
    home.log("feedback", 0)

    backend = home.deliver()

    good = ["s-%d" % number for number in range(100) if number not in bad]
    assert backend.sessions == good + ["f-0"]
    assert count_passed_over(backend) == len(bad)
    home.assert_done()


def test_unencodable_event_is_counted(home):
    home.append("usage", b'no JSON\n[]\n{"outcome": NaN}\n')

    assert count_passed_over(home.deliver()) == 3


def test_unencodable_event_costs_few_requests(home):
    home.fill(BATCH - 1)
    home.append("usage", b'{"outcome": NaN}\n')
    home.log("usage", *range(900, 950))

    # Halving finds it soon. With one event in each request, it would be 100.
    assert len(home.deliver().requests) <= 10


def test_batch_is_full_after_unencodable_event(home):
    home.append("usage", b'{"outcome": NaN}\n')
    home.fill(3 * BATCH)

    assert home.deliver().sizes == [BATCH - 1, BATCH, BATCH, 1]


def test_unencodable_event_is_passed_over_in_a_search(home):
    """The server refuses event 1. The one that it is asked for next is event 2."""
    home.log("usage", 1)
    home.append("usage", b'{"session": "bad", "outcome": NaN}\n')
    home.log("usage", 2)

    with home.backend(default=answers.refuse_events(["s-1"])) as backend:
        home.sync()

    assert backend.sessions[-1] == "s-2"
    home.assert_done()


@pytest.mark.parametrize("digits", [300, 400, 4000])
def test_long_integer_is_sent_as_it_is(home, digits):
    number = b"7" * digits

    backend = deliver_between_neighbours(home, b'{"session": "long", "outcome": %s}' % number)

    assert backend.sessions == ["s-1", "long", "s-2"]
    assert backend.events()[1]["outcome"] == int(number)


def test_very_long_integer_costs_no_neighbour(home):
    """Python 3.11 and newer read integers of up to 4,300 digits."""
    backend = deliver_between_neighbours(home, b'{"outcome": %s}' % (b"7" * 5000))

    assert backend.sessions[0] == "s-1"
    assert backend.sessions[-1] == "s-2"
    home.assert_done()


@pytest.mark.parametrize("field", ["outcome", "note"])
def test_nested_value_goes(home, field):
    value = b"[" * 300 + b"]" * 300

    backend = deliver_between_neighbours(home, b'{"session": "deep", "%s": %s}' % (
        field.encode("ascii"), value))

    assert backend.sessions == ["s-1", "deep", "s-2"]


@pytest.mark.parametrize("field", ["outcome", "note"])
@pytest.mark.parametrize("depths", [
    pytest.param(range(850, 1000), id="near the recursion limit"),
    pytest.param([2000, 5000, 9990, 10000, 15000, 30000, 60000, 100000], id="beyond it"),
])
def test_deep_nesting_costs_no_neighbour(home, field, depths):
    """How deep Python decodes and encodes differs from version to version."""
    for depth in depths:
        home.append("usage", b'{"session": "deep", "%s": %s}\n' % (
            field.encode("ascii"), b"[" * depth + b"]" * depth))
        home.log("usage", depth)

    arrived = home.deliver().sessions

    shallow = [session for session in arrived if session != "deep"]
    assert shallow == ["s-%d" % depth for depth in depths]
    home.assert_done()


# Shape: batches.

@pytest.mark.parametrize("usage_events, feedback_events, sizes", [
    # logged                    events in each request
    (1,              0,          [1]),
    (BATCH - 1,      0,          [BATCH - 1]),
    (BATCH,          0,          [BATCH]),
    (BATCH + 1,      0,          [BATCH, 1]),
    (2 * BATCH,      0,          [BATCH, BATCH]),
    (BATCH - 1,      2,          [BATCH, 1]),
    (2 * BATCH - 30, BATCH + 40, [BATCH, BATCH, BATCH, 10]),
])
def test_batch_holds_100_events_of_both_logs(home, usage_events, feedback_events, sizes):
    logged = home.fill(usage_events, feedback_events)

    backend = home.deliver()

    assert backend.sizes == sizes
    assert backend.sessions == logged
    assert backend.connections == 1
    home.assert_done()


SIXTH = secondme_sync.BATCH_BYTES // 6 - 50  # room for the rest of the line


@pytest.mark.parametrize("count, text, sizes", [
    # lines, text in each                           events in each request
    pytest.param(13, b"a" * SIXTH, [6, 6, 1], id="ASCII"),
    pytest.param(13, "记".encode("utf-8") * (SIXTH // 3), [6, 6, 1], id="Chinese"),
    pytest.param(13, b"\\u0001" * (SIXTH // 6), [6, 6, 1], id="escapes"),
    pytest.param(13, b"\xff" * SIXTH, [6, 6, 1], id="bad UTF-8, which grows"),
    pytest.param(3, b"a" * 2 * secondme_sync.BATCH_BYTES, [1, 1, 1], id="longer lines"),
])
def test_batch_holds_128_kib_of_lines(home, count, text, sizes):
    for number in range(count):
        home.append("usage", b'{"session": "s-%d", "user_intent": "%s"}\n' % (number, text))

    backend = home.deliver()

    assert backend.sizes == sizes
    assert backend.sessions == ["s-%d" % number for number in range(count)]
    home.assert_done()


@pytest.mark.parametrize("more, sizes", [(0, [2]), (1, [1, 1])])
def test_batch_holds_exactly_128_kib_of_lines(home, more, sizes):
    home.append("usage", padded(b"first", 999) + b"\n")
    home.append("usage", padded(b"second", secondme_sync.BATCH_BYTES - 1001 + more) + b"\n")

    assert home.deliver().sizes == sizes


def test_batch_bytes_are_of_both_logs(home):
    home.append("usage", padded(b"first", secondme_sync.BATCH_BYTES - 1) + b"\n")
    home.log("feedback", 1, 2)

    assert home.deliver().sizes == [1, 2]


def test_long_line_after_a_short_one_is_sent(home):
    home.log("usage", 1)
    home.append("usage", padded(b"long", secondme_sync.MAX_LINE_BYTES) + b"\n")
    home.log("usage", 2)

    backend = home.deliver()

    assert backend.sessions == ["s-1", "long", "s-2"]
    assert backend.sizes == [1, 1, 1]


# What was anonymous stays anonymous, when consent is raised to community.

def log_more(home):
    """Log three usage events and a feedback event, which no run has seen."""
    home.log("usage", 10, 11, 12)
    home.log("feedback", 10)


@pytest.mark.parametrize("reply", [
    pytest.param(answer(500), id="500"),
    pytest.param(answer(401), id="401"),
    pytest.param(DROP, id="no answer"),
])
def test_pending_events_stay_anonymous(home, reply):
    home.fill(3, 1)
    home.deliver(reply, mode="anonymous")

    backend = home.deliver(mode="community")

    assert backend.modes == [("anonymous", 4)]
    home.assert_done()


def test_pending_events_lack_device_id_and_text(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")

    body = home.deliver(mode="community").bodies()[0]

    assert "deviceId" not in body
    assert [set(event) & {"session", "user_intent", "comment"} for event in body["events"]] == [
        set(), set(), set(), set()]


def test_events_pending_under_sm_tel_stay_anonymous(home):
    home.fill(3, 1)
    home.deliver(answer(500), environ={"SM_TEL": "anonymous"})

    assert home.deliver().modes == [("anonymous", 4)]
    home.assert_done()


def test_events_never_posted_stay_anonymous(home):
    home.fill(3, 1)
    home.configure(telemetry="anonymous", baseUrl="http://example.test")
    home.sync()

    assert home.deliver(mode="community").modes == [("anonymous", 4)]


def test_pending_events_stay_anonymous_after_off(home):
    home.fill(3, 1)
    home.deliver(DROP, mode="anonymous")
    home.deliver(mode="off")

    assert home.deliver(mode="community").modes == [("anonymous", 4)]
    home.assert_done()


def test_pending_events_stay_anonymous_over_several_runs(home):
    home.fill(3, 1)
    home.deliver(answer(401), mode="anonymous")
    home.deliver(answer(500), mode="community")
    home.deliver(answer(500))

    assert home.deliver().modes == [("anonymous", 4)]
    home.assert_done()


def test_second_anonymous_run_covers_later_events(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")
    log_more(home)
    home.deliver(answer(500))

    assert home.deliver(mode="community").modes == [("anonymous", 8)]
    home.assert_done()


def test_rest_of_a_backlog_stays_anonymous(home):
    home.fill(2 * BATCH)
    home.deliver(answers.then(lambda: home.configure(telemetry="community")), mode="anonymous")

    assert home.deliver().modes == [("anonymous", BATCH)]
    home.assert_done()


def test_later_events_go_in_full(home):
    """In bodies of their own, log by log."""
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")
    log_more(home)

    backend = home.deliver(mode="community")

    assert backend.modes == [
        ("anonymous", 3), ("community", 3), ("anonymous", 1), ("community", 1)]
    assert backend.sessions == [
        None, None, None, "s-10", "s-11", "s-12", None, "f-10"]
    home.assert_done()


def test_bodies_in_full_hold_the_device_id(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")
    log_more(home)

    bodies = home.deliver(mode="community").bodies()

    assert ["deviceId" in body for body in bodies] == [False, True, False, True]


def test_events_after_a_good_anonymous_run_go_in_full(home):
    home.fill(3, 1)
    home.deliver(mode="anonymous")
    log_more(home)

    assert home.deliver(mode="community").modes == [("community", 4)]
    home.assert_done()


def test_events_after_skip_pending_go_in_full(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")
    skip_all(home)
    log_more(home)

    assert home.deliver(mode="community").modes == [("community", 4)]
    home.assert_done()


def test_half_written_event_stays_anonymous(home):
    home.append("usage", line(usage(7))[:40])
    home.fill(0, 1)
    home.deliver(mode="anonymous")
    home.append("usage", line(usage(7))[40:])

    assert home.deliver(mode="community").modes == [("anonymous", 1)]
    home.assert_done()


def test_lowered_mode_covers_pending_events(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="community")

    assert home.deliver(mode="anonymous").modes == [("anonymous", 4)]
    assert home.deliver(mode="community").requests == []


def test_preview_shows_what_stays_anonymous(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")
    log_more(home)
    before = home.snapshot()

    shown = home.main("--dry-run", "community").out.splitlines()

    assert home.changed_since(before) == set()
    assert shown == [request.body for request in home.deliver(mode="community").requests]


def sync_as_anonymous(home):
    home.deliver(mode="anonymous")


def fail_as_anonymous(home):
    home.deliver(answer(500), mode="anonymous")


@pytest.mark.parametrize("name", secondme_sync.LOGS)
@pytest.mark.parametrize("finish", [sync_all, sync_as_anonymous, fail_as_anonymous, skip_all])
def test_log_without_first_line_is_anonymous(home, name, finish):
    """What was skipped, or sent as anonymous, must not arrive in full when a log is edited."""
    home.log(name, *range(5))
    finish(home)
    lines = home.path_of(name + ".jsonl").read_bytes().splitlines(True)
    home.rewrite(name, b"".join(lines[1:]))

    backend = home.deliver(mode="community")

    assert backend.modes == [("anonymous", 4)]
    allowed = {"type"} | set(secondme_sync.ANONYMOUS_FIELDS[name])
    for event in backend.events():
        assert set(event) - allowed == set()
    for field in ("session", "user_intent", "comment"):
        assert b'"%s"' % field.encode("ascii") not in backend.requests[0].body
    home.assert_done()


@pytest.mark.parametrize("finish", [sync_all, sync_as_anonymous, fail_as_anonymous, skip_all])
def test_replaced_log_is_anonymous_to_its_end(home, finish):
    """Also where it is longer than the one before."""
    home.fill(1)
    finish(home)
    home.rewrite("usage", b"".join(line(usage(number)) for number in range(90, 95)))

    backend = home.deliver(mode="community")

    assert backend.modes == [("anonymous", 5)]
    home.assert_done()


def test_cut_log_stays_anonymous(home):
    home.fill(3, 1)
    home.deliver(answer(500), mode="anonymous")
    home.rewrite("usage", line(usage(0)))
    home.deliver(answer(500), mode="community")
    log_more(home)

    assert home.deliver().modes == [
        ("anonymous", 1), ("community", 3), ("anonymous", 1), ("community", 1)]
    home.assert_done()


def test_log_as_long_as_its_offset_is_done(home):
    """The reference script records an offset for each log, and nothing else."""
    home.fill(2, 1)
    home.write_state_of_reference_script()

    assert home.deliver().requests == []


def test_log_shorter_than_its_offset_is_anonymous(home):
    """It is not the log that the reference script has sent."""
    home.log("usage", 1, 2)
    home.write_state_of_reference_script(usage_bytes=home.size("usage") + 1)

    assert home.deliver().modes == [("anonymous", 2)]
    home.assert_done()


# Send: what is posted, and what becomes of an answer.

def ok_in_pieces(handler):
    """OK, of as many bytes as are read of an answer, the last of them a little later."""
    size = secondme_sync.MAX_SMALL_BYTES
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (size, b'{"code": 0}'.ljust(size))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answers.raw(head, chunk[:-99], chunk[-99:], pause=0.02, close=False)(handler)


def reset_in_a_body(handler):
    """The connection is reset (not closed) when half an answer has been read."""
    answers.raw(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"code"', pause=0.1)(handler)
    at_once = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    for stream in (handler.rfile, handler.wfile, handler.connection):
        stream.close()


OK_THEN_CLOSED = answer(200, {"code": 0}, Connection="close")
WAIT_3 = answer(429, Retry_After=3)


@pytest.mark.parametrize("replies, sizes, waits, result, left", [
    # answers, sizes of the batches posted, waits, last_sync_result, events left for the next run
    pytest.param([OK, OK], [100, 1], [], "ok", 0, id="200 twice"),
    pytest.param([answer(401)], [100], [], "auth_failed", 101, id="401"),
    pytest.param([OK, answer(401)], [100, 1], [], "auth_failed", 1, id="200, 401"),
    pytest.param([answer(500)], [100], [], "server_error", 101, id="500"),
    pytest.param([OK, answer(500)], [100, 1], [], "server_error", 1, id="200, 500"),
    pytest.param([WAIT_3], [100, 100, 1], [3], "ok", 0, id="429, 200"),
    pytest.param([answer(429)], [100, 100, 1], [5], "ok", 0, id="429 without Retry-After"),
    pytest.param([answer(502)], [100, 100, 1], [2], "ok", 0, id="502, 200"),
    pytest.param([answer(503)], [100, 100, 1], [2], "ok", 0, id="503, 200"),
    pytest.param([answer(503, Retry_After=9)], [100, 100, 1], [2], "ok", 0, id="503, not 9 s"),
    pytest.param([answer(504)], [100, 100, 1], [2], "ok", 0, id="504, 200"),
    pytest.param([WAIT_3] * 2, [100, 100], [3], "server_error", 101, id="429 twice"),
    pytest.param([answer(502)] * 2, [100, 100], [2], "server_error", 101, id="502 twice"),
    pytest.param([answer(503)] * 2, [100, 100], [2], "server_error", 101, id="503 twice"),
    pytest.param([answer(504)] * 2, [100, 100], [2], "server_error", 101, id="504 twice"),
    pytest.param([WAIT_3, answer(503)], [100, 100], [3], "server_error", 101, id="429, 503"),
    pytest.param([answer(503), WAIT_3], [100, 100], [2], "server_error", 101, id="503, 429"),
    pytest.param([answer(503), answer(401)], [100, 100], [2], "auth_failed", 101, id="503, 401"),
    pytest.param([WAIT_3, answer(500)], [100, 100], [3], "server_error", 101, id="429, 500"),
    pytest.param([answer(503), OK, WAIT_3], [100, 100, 1, 1], [2, 3], "ok", 0, id="503, 200, 429"),
    pytest.param([DROP], [100], [], "network_error", 101, id="no answer"),
    pytest.param([OK, DROP], [100, 1, 1], [], "ok", 0, id="200, kept connection closed"),
    pytest.param([OK, DROP, DROP], [100, 1, 1], [], "network_error", 1, id="200, no answer"),
    pytest.param([answers.no_http], [100], [], "network_error", 101, id="no HTTP"),
    pytest.param([OK, answers.no_http], [100, 1], [], "network_error", 1, id="200, no HTTP"),
    pytest.param([answers.half_a_header], [100], [], "network_error", 101, id="half a header"),
    pytest.param([answers.half_a_body], [100], [], "network_error", 101, id="half a body"),
    pytest.param([answers.raw(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"code": 0}')],
                 [100], [], "network_error", 101, id="all but the last byte of a body"),
    pytest.param([OK, answers.half_a_body], [100, 1], [], "network_error", 1, id="200, half"),
    pytest.param([OK, reset_in_a_body], [100, 1], [], "network_error", 1, id="200, reset"),
    pytest.param([answers.cut_off(401)], [100], [], "auth_failed", 101, id="401, half a body"),
    pytest.param([answers.cut_off(503)], [100, 100, 1], [2], "ok", 0, id="503, half a body"),
    pytest.param([ok_in_pieces] * 2, [100, 1], [], "ok", 0, id="200 in pieces"),
    pytest.param([OK_THEN_CLOSED] * 2, [100, 1], [], "ok", 0, id="200, Connection: close"),
])
def test_answers_decide_what_is_posted(home, replies, sizes, waits, result, left):
    logged = home.fill(100, 1)  # two batches: of 100 events and of 1
    clock = FakeClock()

    backend = home.deliver(*replies, clock=clock)

    assert backend.sizes == sizes
    assert clock.slept == waits
    assert home.result == result
    # The next run sends what was not accepted, and no more.
    assert home.deliver().sessions == logged[101 - left:]
    home.assert_done()


def test_usage_bytes_stay_until_all_is_sent(home):
    """Older scripts read usage_bytes; contract: offsets are not updated if a batch fails."""
    home.log("usage", 900)
    home.deliver()
    before = home.completed
    home.fill(BATCH, 1)

    home.deliver(OK, answer(500))

    assert home.completed == before


PADDED = b'{"code": 0}'.ljust(secondme_sync.MAX_SMALL_BYTES)


@pytest.mark.parametrize("status, body, result", [
    # status, body, last_sync_result
    (200, {"code": 0}, "ok"),
    (201, {"code": 0, "message": "好", "data": None}, "ok"),
    (299, {"code": 0}, "ok"),
    (202, b' {"code":0}\r\n', "ok"),
    pytest.param(200, PADDED, "ok", id="200-as much as is read-ok"),
    (200, {"code": 1}, "server_error"),
    (200, {"code": -1}, "server_error"),
    (200, {"code": False}, "server_error"),
    (200, {"code": 0.0}, "server_error"),
    (200, {"code": "0"}, "server_error"),
    (200, {"code": None}, "server_error"),
    (200, {"code": []}, "server_error"),
    (200, {}, "server_error"),
    (200, {"data": {"code": 0}}, "server_error"),
    (199, b"", "server_error"),
    (300, {"code": 0}, "server_error"),
    (302, {"code": 0}, "server_error"),
    (304, b"", "server_error"),
    (399, b"", "server_error"),
    (402, {"code": 0}, "server_error"),
    (403, {"code": 0}, "server_error"),
    (404, b"", "server_error"),
    (408, b"", "server_error"),
    (409, b"", "server_error"),
    (425, b"", "server_error"),
    (428, b"", "server_error"),
    (418, b"", "server_error"),
    (500, {"code": 0}, "server_error"),
    (501, b"", "server_error"),
    (505, b"", "server_error"),
    (507, b"", "server_error"),
    (200, b"[0]", "network_error"),
    (200, b'[{"code": 0}]', "network_error"),
    (200, b"0", "network_error"),
    (200, b"null", "network_error"),
    (200, b"", "network_error"),
    (204, b"", "network_error"),
    (200, b"<html>OK</html>", "network_error"),
    (200, b'{"code": 0', "network_error"),
    (200, b'{"code": 0} {"code": 0}', "network_error"),
    (200, b"\xff\xfe", "network_error"),
    (200, b'{"code": 0, "message": "\xff"}', "network_error"),
    pytest.param(200, PADDED + b" " * 11, "network_error", id="200-more than is read"),
    (401, {"code": 0}, "auth_failed"),
])
def test_result_of_an_answer_without_retry(home, status, body, result):
    """And all else is not tried again; see the table above for what is."""
    home.fill(1)

    backend = home.deliver(answer(status, body))

    assert len(backend.requests) == 1
    assert home.result == result


def test_chunked_answer_longer_than_is_read_is_no_answer(home):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(data), data) for data in (PADDED, b" ", b""))
    home.fill(1)

    home.deliver(answers.raw(
        b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks))

    assert home.result == "network_error"


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_redirect_is_never_followed(home, status):
    home.fill(1)

    with FakeBackend(default=None) as elsewhere:
        location = "http://127.0.0.1:%d%s" % (elsewhere.port, PATH)
        backend = home.deliver(answer(status, {"code": 0}, Location=location))

    assert len(backend.requests) == 1
    assert elsewhere.connections == 0
    assert home.result == "server_error"


@pytest.fixture
def new_year(monkeypatch):
    """Let it be 2026-01-01T00:00:00Z, from which http_date counts."""
    monkeypatch.setattr(time, "time", lambda: 1767225600.0)


@pytest.mark.parametrize("header, seconds", [
    # Retry-After, seconds to wait
    ("7", 7),
    ("1", 1),
    ("0", 0),
    ("10", 10),
    ("11", 10),
    ("86400", 10),
    ("-3", 0),
    (None, 5),
    ("", 5),
    ("soon", 5),
    ("1.5", 5),
    ("0x3", 5),
    pytest.param("9" * 99, 10, id="99 digits"),
    (http_date(4), 4),
    (http_date(0), 0),
    (http_date(-60), 0),
    (http_date(3600), 10),
    (http_date(10**9), 10),
    ("Thursday, 01-Jan-26 00:00:06 GMT", 6),
    ("Thu Jan  1 00:00:03 2026", 3),
    ("5 Jan , 10", 5),
    ("Jan 3 , 2026 00:00:03 3 2026", 5),
    ("Thu, 99 Foo 2026 00:00:03 GMT", 5),
    ("Thu, 01 Jan 99999 00:00:03 GMT", 5),
    ("Wed, 3 Apr 2002 12.34.56.78 GMT", 5),  # UnboundLocalError in Python 3.6 to 3.8
])
def test_retry_after_is_clamped_to_10_seconds(home, new_year, header, seconds):
    home.fill(1)
    clock = FakeClock()
    headers = {} if header is None else {"Retry_After": header}

    home.deliver(answer(429, **headers), clock=clock)

    assert clock.slept == [seconds]
    home.assert_done()


@pytest.mark.parametrize("error", [IndexError, OverflowError, UnboundLocalError, RecursionError])
def test_any_error_of_the_date_parser_means_5_seconds(home, monkeypatch, error):
    def fail(text):
        raise error("trouble")

    monkeypatch.setattr(email.utils, "parsedate_tz", fail)
    home.fill(1)
    clock = FakeClock()

    home.deliver(answer(429, Retry_After=http_date(7)), clock=clock)

    assert clock.slept == [5]
    home.assert_done()


# Kept connections.

@pytest.mark.parametrize("tls", [False, True], ids=["http", "TLS"])
def test_connection_is_kept_for_the_next_batch(home, monkeypatch, tls):
    monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
    sent = home.fill(2 * BATCH, 1)

    backend = home.deliver(context=tls_context() if tls else None)

    assert backend.sessions == sent
    assert backend.connections == 1


@pytest.mark.parametrize("tls", [False, True], ids=["http", "TLS"])
def test_kept_connection_closed_by_the_server_fails_no_batch(home, monkeypatch, tls):
    """The last batch is posted twice: its answer may be what was lost with the connection."""
    monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
    sent = home.fill(4 * BATCH)

    backend = home.deliver(answers.ok_and_close, answers.ok_and_close_later, OK, DROP,
                           context=tls_context() if tls else None)

    assert backend.sessions == sent + sent[3 * BATCH:]
    home.assert_done()


def test_kept_connection_that_times_out_is_not_posted_to_again(home, hold, monkeypatch):
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.5)
    sent = home.fill(BATCH, 1)

    backend = home.deliver(OK, hold)

    assert backend.sizes == [BATCH, 1]
    assert home.result == "network_error"
    assert home.deliver().sessions == sent[BATCH:]
    home.assert_done()


def ok_and_more(handler):
    """OK, and right behind it another OK, which http.client does not read with the first.

    http.client reads 8 KiB at a time, and that is what the first takes. Over TLS both come in
    one record, so the second OK has left the socket by then.
    """
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    size = io.DEFAULT_BUFFER_SIZE - len(head % 9999)
    padded = head % size + b'{"code": 0}'.ljust(size)
    answers.raw(padded + head % 11 + b'{"code": 0}', close=False)(handler)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "TLS"])
def test_data_behind_an_answer_is_not_the_next_answer(home, monkeypatch, tls):
    """Otherwise a batch that the server refuses would count as accepted, and be lost."""
    monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
    sent = home.fill(BATCH, 1)

    backend = home.deliver(ok_and_more, answer(500), context=tls_context() if tls else None)

    assert backend.sizes == [BATCH, 1]
    assert home.result == "server_error"
    assert home.deliver().sessions == sent[BATCH:]


def test_answer_that_nobody_asked_for_is_not_the_next_answer(home):
    sent = home.fill(BATCH, 1)

    with home.backend(answers.ok_twice, answer(500)) as backend:
        # -v's messages come between two requests: let the second OK arrive meanwhile.
        run = secondme_sync.Run(str(home.dir), {}, say=lambda message: time.sleep(0.1))
        secondme_sync.sync(run)

    assert backend.sizes == [BATCH, 1]
    assert home.result == "server_error"
    assert home.deliver().sessions == sent[BATCH:]


MANY_DESCRIPTORS = """
import os, resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, most))
inherited = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
"""


@posix_only("Windows has no limit of 1,024 on the numbers of descriptors")
def test_1100_inherited_descriptors_do_not_matter(home):
    """select() fails for a socket whose number is above 1,023."""
    sent = home.fill(3 * BATCH)

    with home.backend() as backend:
        assert home.run(shim=MANY_DESCRIPTORS) == SILENT

    assert backend.sessions == sent
    assert backend.connections == 1
    home.assert_done()


# Answers that come early, and refusals whose body does not end.

@pytest.fixture
def small_send_buffer(monkeypatch):
    """Let most of a body wait in the client until the server reads."""
    create = socket.create_connection

    def create_connection(*args):
        sock = create(*args)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(socket, "create_connection", create_connection)


EARLY_ABOVE = 80000  # bytes: the server answers a larger body before it has read it


def log_100_kilobytes(home):
    home.log("usage", *[usage(number, user_intent="x" * 5000) for number in range(20)])


@posix_only("Windows drops what was received before a reset")
@pytest.mark.parametrize("tls", [False, True], ids=["http", "TLS"])
@pytest.mark.parametrize("replies, result, requests", [
    # answers, last_sync_result, requests
    pytest.param([answer(401)], "auth_failed", 1, id="401"),
    pytest.param([answer(403)], "server_error", 1, id="403"),
    pytest.param([answer(413)], "ok", 3, id="413"),
    pytest.param([answer(429, Retry_After=0)] * 2, "server_error", 2, id="429"),
    pytest.param([answers.without_length(401)], "auth_failed", 1, id="401 without length"),
    pytest.param([answers.without_length(413)], "ok", 3, id="413 without length"),
])
def test_answer_before_the_end_of_the_body_counts(
        home, monkeypatch, small_send_buffer, tls, replies, result, requests):
    monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
    log_100_kilobytes(home)

    backend = home.deliver(*replies, early_above=EARLY_ABOVE,
                           context=tls_context() if tls else None)

    assert home.result == result
    assert len(backend.requests) == requests


def nothing():
    pass


@pytest.mark.parametrize("body", [b"", b"{}"], ids=["without body", "with body"])
@pytest.mark.parametrize("status, result, requests", [
    # status, last_sync_result, requests
    (401, "auth_failed", 1),
    (413, "ok", 3),
    (429, "ok", 2),
])
def test_early_refusal_on_a_connection_left_open(home, status, result, requests, body):
    """The server must not take the body that it has not read for the next request."""
    log_100_kilobytes(home)

    backend = home.deliver(answers.then(nothing, answer(status, body)), early_above=EARLY_ABOVE)

    assert home.result == result
    assert len(backend.requests) == requests


def test_early_acceptance_on_a_connection_left_open(home, monkeypatch, small_send_buffer):
    """Nothing reads the rest of the body: the next request needs a connection of its own."""
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.5)
    # More than the system takes from a client before the server reads.
    home.log("usage", usage(1, user_intent="x" * 1000000), usage(2, user_intent="x" * 1000000))

    backend = home.deliver(answers.then(nothing), answers.then(nothing), early_above=EARLY_ABOVE)

    assert len(backend.requests) == 2
    assert backend.connections == 2
    home.assert_done()


def test_connection_with_an_unread_body_is_not_kept(home, hold, monkeypatch, small_send_buffer):
    """The server accepts early and never reads the rest: what follows would be taken for it."""
    def accept_unread(handler):
        handler.close_connection = False
        handler.reply(*OK)
        hold(handler)

    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.3)
    # More than the server's end of a connection takes in unread.
    home.log("usage", usage(0, user_intent="x" * 1000000), 1)

    backend = home.deliver(accept_unread, early_above=EARLY_ABOVE)

    assert len(backend.requests) == 2
    assert backend.connections == 2
    home.assert_done()


def test_answer_to_a_body_that_failed_is_waited_for_a_moment(home, monkeypatch):
    limits = []
    real_read_response = secondme_sync.Sender.read_response

    def fail(self, *args):
        raise OSError("refused by the test")

    def read_response(self):
        limits.append(self.connection.sock.gettimeout())
        return real_read_response(self)

    monkeypatch.setattr(secondme_sync.Sender, "read_response", read_response)
    monkeypatch.setattr("http.client.HTTPConnection.request", fail)
    home.fill(1)

    home.deliver()

    assert len(limits) == 1
    assert 0 < limits[0] < 1


def break_tls(handler):
    """Send something that is no TLS behind the handshake."""
    socket.socket.sendall(handler.connection, b"no TLS record" * 9)


def test_kept_connection_whose_tls_breaks_fails_no_batch(home, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
    logged = home.fill(BATCH, 1)

    backend = home.deliver(OK, break_tls, context=tls_context())

    assert backend.sessions == logged + logged[BATCH:]
    home.assert_done()


def test_answer_of_299_without_json_is_a_network_error(home):
    """299 is the last status of success, with the same rule for its body as 200."""
    home.fill(1)
    home.deliver(answer(299, b"accepted"))
    assert home.result == "network_error"


@pytest.mark.parametrize("status", [300, 399])
def test_redirect_is_called_that_from_300_to_399(status):
    assert "redirect" in secondme_sync.classify(status, None).words


def stalling(head):
    """Return an answer that begins, and never goes on."""
    def reply(handler):
        handler.wfile.write(head)
        handler.wfile.flush()
        handler.rfile.read(1)  # returns when the client has gone
    return reply


LONG_BODY = b"HTTP/1.1 %d X\r\nContent-Length: 999999999999\r\n\r\n"
CHUNKED_BODY = b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("status, sizes, result", [
    # status, sizes of the batches, last_sync_result
    (401, [2], "auth_failed"),
    (403, [2], "server_error"),
    (413, [2, 1, 1], "ok"),
    (429, [2, 2], "ok"),
    (503, [2, 2], "ok"),
])
@pytest.mark.parametrize("kind", ["stalls", "never ends", "never ends in chunks"])
def test_refusal_counts_whatever_becomes_of_its_body(
        home, monkeypatch, status, kind, sizes, result):
    """The run does not wait for the body, so it reaches no time limit."""
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 30)
    reply = {
        "stalls": stalling(LONG_BODY % status),
        "never ends": answers.endless(LONG_BODY % status, b"x" * 4096),
        "never ends in chunks": answers.endless(CHUNKED_BODY % status, b"1\r\nx\r\n" * 999),
    }[kind]
    home.fill(2)

    backend = home.deliver(reply)

    assert backend.sizes == sizes
    assert home.result == result


# TLS.

@pytest.mark.parametrize("trust, host, result, requests", [
    # SSL_CERT_FILE, host in baseUrl, last_sync_result, requests
    pytest.param(None, "127.0.0.1", "network_error", 0, id="self-signed"),
    pytest.param(CERTIFICATE, "localhost", "network_error", 0, id="of another host"),
    pytest.param(CERTIFICATE, "127.0.0.1", "ok", 2, id="trusted"),
])
def test_certificate_must_verify(home, tls_backend, trust, host, result, requests):
    home.fill(BATCH, 1)
    home.configure(baseUrl=tls_backend.url.replace("127.0.0.1", host))

    assert home.run(https_proxy=None, SSL_CERT_FILE=trust) == SILENT

    assert home.result == result
    assert len(tls_backend.requests) == requests


@pytest.mark.skipif(sys.version_info < (3, 8), reason="Python 3.8 began to read SSLKEYLOGFILE")
def test_tls_that_cannot_be_set_up_has_its_own_reason(home):
    """It was once reported as progress that cannot be recorded."""
    home.fill(1)
    home.configure(baseUrl="https://127.0.0.1:9")

    result = home.run("-v", SSLKEYLOGFILE=str(home.path / "missing" / "keys"))

    assert b"TLS" in result.err
    assert b"recorded" not in result.err
    assert home.result == "network_error"


@posix_only("Windows has no FIFO")
def test_blocked_openssl_does_not_keep_a_run(home):
    """OpenSSL waits for its configuration with the interpreter's lock held.

    No Python code can end such a run, and it holds the lock on the state.
    """
    sent = home.fill(1)
    home.configure(baseUrl="https://127.0.0.1:9")
    fifo = home.path / "openssl.cnf"
    os.mkfifo(str(fifo))

    blocked = home.run("--max-time", "0.5", OPENSSL_CONF=str(fifo))

    assert blocked.code == 1
    assert blocked.out == b""
    assert blocked.err == b""
    assert home.result == "network_error"
    assert home.deliver().sessions == sent
    home.assert_done()


# Proxies, and where the token must not go.

@pytest.mark.parametrize("variable, login, headers", [
    # variable that names the proxy, user and password in its URL, Proxy-Authorization headers
    ("https_proxy", "", []),
    ("HTTPS_PROXY", "", []),
    ("https_proxy", "me:w%40rd@", [b"Basic bWU6d0ByZA=="]),
    ("https_proxy", "me:a@:%25@", [b"Basic bWU6YUA6JQ=="]),
])
def test_token_stays_in_the_tunnel_of_a_proxy(home, tls_backend, variable, login, headers):
    sent = home.fill(BATCH, 1)
    home.configure(baseUrl=tls_backend.url)

    with Proxy() as proxy:
        url = proxy.url(login).replace("127.0.0.1", "localhost")
        environ = {"https_proxy": None, "no_proxy": "", variable: url}
        home.run(SSL_CERT_FILE=CERTIFICATE, **environ)

    assert tls_backend.sessions == sent
    head, = proxy.heads
    assert head.startswith(b"CONNECT 127.0.0.1:%d HTTP/1." % tls_backend.port)
    assert re.findall(b"Proxy-Authorization: (.*)\r\n", head) == headers
    assert b"Bearer" not in head
    assert TOKEN.encode() not in head
    assert len(proxy.seen) > 1000
    assert TOKEN.encode() not in bytes(proxy.seen)
    request = tls_backend.requests[0]
    assert request.headers["Authorization"] == "Bearer " + TOKEN
    assert not [name for name in request.headers if name.lower().startswith("proxy")]


def test_localhost_is_reached_without_a_proxy(home, tls_backend):
    """A proxy would take it for its own machine."""
    home.fill(1)
    home.configure(baseUrl=tls_backend.url.replace("127.0.0.1", "localhost"))

    with Proxy() as proxy:
        home.run(https_proxy=proxy.url(), no_proxy="")

    assert proxy.heads == []


def test_tunnel_leads_to_port_443_without_another(home):
    home.fill(1)
    home.configure(baseUrl="https://127.0.0.1/gate/lab")

    with Proxy(refusal=b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        home.run(https_proxy=proxy.url(), no_proxy="")

    head, = proxy.heads
    assert head.startswith(b"CONNECT 127.0.0.1:443 HTTP/1.")


@pytest.mark.parametrize("no_proxy, tunnels", [
    # no_proxy, tunnels opened
    ("", 1),
    ("example.com", 1),
    ("127.0.0.1", 0),
    ("*", 0),
    ("example.com, 127.0.0.1", 0),
])
def test_no_proxy_is_honoured(home, tls_backend, no_proxy, tunnels):
    sent = home.fill(1)
    home.configure(baseUrl=tls_backend.url)

    with Proxy() as proxy:
        home.run(https_proxy=proxy.url(), no_proxy=no_proxy, SSL_CERT_FILE=CERTIFICATE)

    assert tls_backend.sessions == sent
    assert len(proxy.heads) == tunnels


@pytest.mark.parametrize("begin", ["", "//"])
def test_proxy_without_a_scheme_is_used(home, tls_backend, begin):
    sent = home.fill(1)
    home.configure(baseUrl=tls_backend.url)

    with Proxy() as proxy:
        url = proxy.url().replace("http://", begin)
        home.run(https_proxy=url, no_proxy="", SSL_CERT_FILE=CERTIFICATE)

    assert tls_backend.sessions == sent
    assert len(proxy.heads) == 1


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:1",
    "http://",
    "http://:x",
    "http://a b",
    "://",
    "http://127.0.0.1:99999",
    "socks5://127.0.0.1:1",
    "http://[::1",
])
def test_unusable_proxy_is_a_network_error(home, tls_backend, url):
    home.fill(1)
    home.configure(baseUrl=tls_backend.url)

    assert home.run(https_proxy=url, no_proxy="") == SILENT

    assert tls_backend.connections == 0
    assert home.result == "network_error"


@pytest.mark.parametrize("refusal, digits", [
    # answer to CONNECT, digits that -v prints
    (b"HTTP/1.1 407 tok-PROXY\r\nX-Text: tok-PROXY\r\n\r\ntok-PROXY", b"407"),
    (b"HTTP/1.0 503 tok-PROXY\r\n\r\n", b"503"),
], ids=["407", "503"])
def test_verbose_names_the_status_that_a_proxy_refuses_with(home, tls_backend, refusal, digits):
    """And none of the proxy's text, which may hold anything."""
    home.fill(1)
    home.configure(baseUrl=tls_backend.url)

    with Proxy(refusal) as proxy:
        result = home.run("-v", https_proxy=proxy.url(), no_proxy="")

    assert digits in re.sub(b":[0-9]+", b"", result.err)  # ports aside
    assert b"tok-PROXY" not in result.err
    assert tls_backend.connections == 0
    assert home.result == "network_error"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_plain_http_on_this_machine_goes_through_no_proxy(home, host):
    sent = home.fill(1)

    with Proxy() as proxy, home.backend() as backend:
        home.configure(baseUrl=backend.url.replace("127.0.0.1", host))
        home.run(no_proxy="", http_proxy=proxy.url(), https_proxy=proxy.url(),
                 all_proxy=proxy.url())

    assert backend.sessions == sent
    assert proxy.heads == []


# What is neither sent in anonymous mode nor shown: what the contract strips, and unknown fields.
PRIVATE = [
    "session", "error_message", "user_intent", "actions_summary", "error_summary", "comment",
    "device_id", "installation_id", "future_field",
]
SHOWN_NOWHERE = [TOKEN.encode(), b"PRIVATE", b"device-42", b"Traceback"]


def log_private_fields(home):
    secrets = {field: "PRIVATE-" + field for field in PRIVATE}
    home.configure(telemetry="anonymous")
    home.log("usage", usage(1, **secrets))
    home.log("feedback", feedback(1, **secrets))


def assert_nothing_private(home, result, backend):
    """Look through what was shown, recorded and sent."""
    recorded = home.state.read_bytes() if home.state.exists() else b""
    for text in SHOWN_NOWHERE:
        assert text not in result.out + result.err
        assert text not in recorded
        for request in backend.requests:
            assert text not in request.body


@pytest.mark.parametrize("reply", [
    pytest.param(OK, id="ok"),
    pytest.param(answer(200, {"code": TOKEN}), id="code"),
    pytest.param(answer(200, b"<html>" + TOKEN.encode()), id="html"),
    pytest.param(answer(302, Location=NOWHERE + "/" + TOKEN), id="redirect"),
    pytest.param(answer(400, TOKEN.encode()), id="400"),
    pytest.param(answer(401, TOKEN.encode()), id="401"),
    pytest.param(answer(429, Retry_After="0", X_Token=TOKEN), id="429"),
    pytest.param(answer(500, TOKEN.encode()), id="500"),
    pytest.param(answers.raw(b"HTTP/1.1 500 " + TOKEN.encode() + b"\r\n\r\n"), id="reason"),
    pytest.param(answers.raw(b"HTTP/1.1 " + TOKEN.encode() + b" OK\r\n\r\n"), id="status"),
    pytest.param(answers.raw(b"HTTP/" + TOKEN.encode() + b" 200 OK\r\n\r\n"), id="version"),
    pytest.param(answers.raw(TOKEN.encode() + b"\r\n\r\n"), id="no HTTP"),
])
def test_token_that_a_server_echoes_is_not_shown(home, reply):
    log_private_fields(home)

    with home.backend(default=reply) as backend:
        result = home.run("-v")

    assert backend.requests
    assert_nothing_private(home, result, backend)


@pytest.mark.parametrize("flag", ["--dry-run", "--status", "--pending"])
def test_no_flag_shows_token_or_private_fields(home, flag):
    log_private_fields(home)

    with home.backend(default=None) as backend:
        result = home.run("-v", flag)

    assert result.out
    assert_nothing_private(home, result, backend)


# A refused event: 400, 413 and 422.

REFUSALS = [400, 413, 422]


def sync_with(home, default, *script, **options):
    """Sync with a backend that answers by default so; return it."""
    with home.backend(*script, default=default) as backend:
        backend.said = home.sync(**options)
    return backend


def accepted_sessions(backend, refused):
    """Return the sessions of all events that came in bodies without a refused one."""
    accepted = []
    for body in backend.bodies():
        sessions = [event["session"] for event in body["events"]]
        if not set(refused) & set(sessions):
            accepted += sessions
    return accepted


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("refused, most_requests", [
    # sessions of the refused events, requests at most; 3 where nothing is refused
    pytest.param(["s-0"], 16, id="first"),
    pytest.param(["s-123"], 17, id="in the middle"),
    pytest.param(["s-199"], 17, id="last of a batch"),
    pytest.param(["f-29"], 17, id="last"),
    pytest.param(["f-7"], 15, id="in the feedback log"),
    pytest.param(["s-120", "s-121"], 22, id="two neighbours"),
    pytest.param(["s-30", "s-130", "f-3"], 45, id="three scattered"),
])
def test_refused_events_are_left_out(home, status, refused, most_requests):
    logged = home.fill(250, 30)

    backend = sync_with(home, answers.refuse_events(refused, status))

    others = [session for session in logged if session not in refused]
    assert accepted_sessions(backend, refused) == others
    assert len(backend.requests) <= most_requests
    home.assert_done()
    assert home.deliver().requests == []


def test_lines_to_pass_over_do_not_change_what_is_left_out(home):
    """They make a batch without events, which is not posted and proves nothing."""
    home.log("usage", 0)
    home.append("usage", b'{"outcome": NaN}\n')
    home.log("usage", 1)

    backend = sync_with(home, answers.refuse_events(["s-1"]))

    assert accepted_sessions(backend, ["s-1"]) == ["s-0"]
    assert backend.sizes == [2, 1, 1]
    home.assert_done()


def test_refused_event_among_1000_costs_at_most_40_requests(home):
    logged = home.fill(1000)

    backend = sync_with(home, answers.refuse_events(["s-450"]))

    assert accepted_sessions(backend, ["s-450"]) == logged[:450] + logged[451:]
    assert len(backend.requests) <= 40
    home.assert_done()


def test_event_larger_than_the_server_takes_is_left_out(home):
    home.log("usage", *[usage(number, user_intent="x" * (90000 if number == 150 else 100))
                        for number in range(250)])

    backend = sync_with(home, answers.refuse_above(80000))

    arrived = [event["session"] for request, body in zip(backend.requests, backend.bodies())
               if len(request.body) <= 80000 for event in body["events"]]
    assert arrived == ["s-%d" % number for number in range(250) if number != 150]
    assert len(backend.requests) <= 40
    home.assert_done()


def test_batches_have_100_events_again_behind_a_refused_batch(home):
    home.fill(250)

    backend = sync_with(home, answers.refuse_events(["s-0"]))

    # s-0 stands alone, s-1 and s-2 are the proof. The other halves follow.
    assert backend.sizes == [100, 50, 25, 12, 6, 3, 1, 2, 3, 6, 13, 25, 50, 100, 50]


def test_a_refused_batch_goes_in_halves_and_the_next_one_is_full_again(home):
    home.fill(250)

    backend = home.deliver(answer(413), answer(413), answer(413))

    # 25 refused events are 12 and 13.
    assert backend.sizes == [100, 50, 25, 12, 13, 25, 50, 100, 50]
    home.assert_done()


def refuse_more_events_than(limit):
    def reply(handler):
        handler.close_connection = False
        is_refused = handler.server.sizes[-1] > limit
        handler.reply(*(answer(413) if is_refused else OK))
    return reply


def test_limit_on_the_number_of_events_halves_each_batch(home):
    sent = home.fill(250)

    backend = sync_with(home, refuse_more_events_than(30))

    of_hundred = [100, 50, 25, 25, 50, 25, 25]
    assert backend.sizes == of_hundred + of_hundred + [50, 25, 25]
    assert [session for body in backend.bodies() if len(body["events"]) <= 30
            for session in (event["session"] for event in body["events"])] == sent
    home.assert_done()


def test_limit_on_the_size_of_a_body_halves_each_batch(home):
    sent = home.fill(250)

    backend = sync_with(home, answers.refuse_above(20000))

    accepted = [event["session"] for request, body in zip(backend.requests, backend.bodies())
                if len(request.body) <= 20000 for event in body["events"]]
    assert accepted == sent
    assert len(backend.requests) <= 20
    home.assert_done()


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("script, accepted", [
    # answers before the server refuses everything, events they accept
    pytest.param([], 0, id="from the start"),
    pytest.param([OK], 100, id="from the second batch on"),
])
def test_server_that_refuses_everything_costs_no_event(home, status, script, accepted):
    """A server that is misconfigured for a day must not make a user lose that day."""
    logged = home.fill(250)
    requests = []
    for script_of_run in (script, [], []):
        backend = sync_with(home, answer(status), *script_of_run)
        requests.append(len(backend.requests) - len(script_of_run))
        assert home.result == "server_error"

    assert max(requests) <= 10
    assert home.deliver().sessions == logged[accepted:]
    home.assert_done()


@pytest.mark.parametrize("status", REFUSALS)
def test_lone_refused_event_stays_pending(home, status):
    home.fill(1)

    for _ in range(2):
        backend = sync_with(home, answer(status))
        assert backend.sessions == ["s-0"]
        assert home.result == "server_error"

    assert home.deliver().sessions == ["s-0"]
    home.assert_done()


def test_refused_event_stays_pending_before_lines_without_events(home):
    """So many that they are a batch of their own, which is not posted and proves nothing."""
    home.log("usage", 0)
    home.append("usage", b"broken line\n" * 20000)

    sync_with(home, answer(400))

    assert home.result == "server_error"
    assert home.deliver().sessions == ["s-0"]
    home.assert_done()


@pytest.mark.parametrize("reply, result", [
    pytest.param(answer(401), "auth_failed", id="401"),
    pytest.param(answer(500), "server_error", id="500"),
    pytest.param(DROP, "network_error", id="no answer"),
])
def test_refused_event_stays_pending_where_the_run_ends_before_a_proof(home, reply, result):
    logged = home.fill(4)

    backend = home.deliver(answer(400), answer(400), answer(400), reply)

    assert backend.sizes == [4, 2, 1, 1]
    assert home.result == result
    assert home.deliver().sessions == logged
    home.assert_done()


def test_lone_refused_event_is_left_out_once_another_is_accepted(home):
    home.fill(1)
    sync_with(home, answers.refuse_events(["s-0"]))
    home.log("usage", 1)

    backend = sync_with(home, answers.refuse_events(["s-0"]))

    assert accepted_sessions(backend, ["s-0"]) == ["s-1"]
    home.assert_done()


def test_two_refused_events_at_the_front_stay(home):
    """A known limit, see README: nothing proves that it is not the server."""
    logged = home.fill(250)

    for _ in range(2):
        backend = sync_with(home, answers.refuse_events(["s-0", "s-1"]))
        assert accepted_sessions(backend, ["s-0", "s-1"]) == []
        assert home.result == "server_error"

    assert home.deliver().sessions == logged


def test_acceptance_before_the_search_proves_nothing(home):
    """Of 101 events, the last is refused alone, though 100 were accepted before."""
    logged = home.fill(101)

    backend = home.deliver(OK, answer(400))

    assert backend.sizes == [100, 1]
    assert home.result == "server_error"
    assert home.deliver().sessions == logged[100:]


def test_acceptance_proves_once(home):
    """Of four events the half s-0, s-1 is accepted: s-2 is left out for it, and s-3 is not."""
    home.fill(4)

    backend = home.deliver(answer(400), OK, answer(400), answer(400), answer(400))

    assert backend.sizes == [4, 2, 2, 1, 1]
    assert home.result == "server_error"
    assert home.deliver().sessions == ["s-3"]


def write_large_event(home):
    home.log("usage", usage(1, user_intent="x" * secondme_sync.BATCH_BYTES))


def write_in_feedback(home):
    home.log("feedback", feedback(1, session="s-1"))


def write_behind(data):
    def write(home):
        home.append("usage", data)
        home.log("usage", 1)
    return write


@pytest.mark.parametrize("write_next", [
    pytest.param(write_behind(b""), id="directly behind"),
    pytest.param(write_in_feedback, id="in the feedback log"),
    pytest.param(write_behind(b"\n\n"), id="behind blank lines"),
    pytest.param(write_behind(b"broken\n"), id="behind a broken line"),
    pytest.param(write_behind(b'{"duration_s": NaN}\n'), id="behind an event with NaN"),
    pytest.param(write_behind(b"broken line\n" * 20000), id="behind many broken lines"),
    pytest.param(write_large_event, id="larger than a batch"),
])
def test_next_event_decides_wherever_it_is(home, write_next):
    """The first event is refused: the next that can be sent, posted alone, is the proof."""
    home.log("usage", 0)
    write_next(home)
    home.log("feedback", 2)

    backend = sync_with(home, answers.refuse_events(["s-0"]))

    assert accepted_sessions(backend, ["s-0"]) == ["s-1", "f-2"]
    home.assert_done()


def test_next_event_of_another_mode_decides(home):
    """What was logged in anonymous mode goes as anonymous, what came later in full."""
    home.log("usage", 0)
    home.deliver(answer(500), mode="anonymous")
    home.log("usage", 1)

    backend = home.deliver(answer(400), OK, mode="community")

    assert backend.modes == [("anonymous", 1), ("community", 1)]
    home.assert_done()


def test_retry_within_a_search(home):
    """The status that counts is the last: s-0 is refused alone, and s-1 is the proof."""
    home.fill(2)

    backend = home.deliver(answer(413), answer(503), answer(413), OK)

    assert backend.sizes == [2, 1, 1, 1]
    home.assert_done()


# A search among four events is interrupted in one of two places.
HALF_ACCEPTED = [answer(400), OK_THEN_CLOSED]  # all four refused, s-0 and s-1 accepted
FIRST_SET_ASIDE = [answer(400)] * 3  # all four refused, s-0 and s-1 refused, s-0 refused


@pytest.mark.parametrize("interruption, result", [
    # answers that interrupt the search, last_sync_result
    pytest.param([answer(401)], "auth_failed", id="401"),
    pytest.param([answer(403)], "server_error", id="403"),
    pytest.param([answer(429)] * 2, "server_error", id="429"),
    pytest.param([answer(503)] * 2, "server_error", id="503"),
    pytest.param([DROP], "network_error", id="no answer"),
    pytest.param([answers.half_a_body], "network_error", id="half an answer"),
    pytest.param([answer(200, {"code": 1})], "server_error", id="code 1"),
])
@pytest.mark.parametrize("search, left", [
    # answers before, sessions left for the next run
    pytest.param(HALF_ACCEPTED, ["s-2", "s-3"], id="a half is accepted"),
    pytest.param(FIRST_SET_ASIDE, ["s-0", "s-1", "s-2", "s-3"], id="an event is set aside"),
])
def test_answers_that_interrupt_a_search(home, interruption, result, search, left):
    home.fill(4)

    backend = home.deliver(*search + interruption)

    assert len(backend.requests) == len(search) + len(interruption)
    assert home.result == result
    assert home.deliver().sessions == left
    home.assert_done()


def withdraw_consent(home, clock):
    home.configure(telemetry="off")


def log_out(home, clock):
    home.log_out()


def use_up_time(home, clock):
    clock.passed += 25


@pytest.mark.parametrize("interrupt", [withdraw_consent, log_out, use_up_time])
@pytest.mark.parametrize("search, left", [
    # answers before, sessions left for the next run
    pytest.param(HALF_ACCEPTED, ["s-2", "s-3"], id="a half is accepted"),
    pytest.param(FIRST_SET_ASIDE, ["s-0", "s-1", "s-2", "s-3"], id="an event is set aside"),
])
def test_events_that_interrupt_a_search(home, interrupt, search, left):
    home.fill(4)
    clock = FakeClock()
    last = answers.then(lambda: interrupt(home, clock), search[-1])

    backend = home.deliver(*search[:-1] + [last], clock=clock)

    assert len(backend.requests) == len(search)
    assert home.result == "network_error"
    home.configure(telemetry="community")
    home.write("credentials", {"accessToken": TOKEN})
    assert home.deliver().sessions == left
    home.assert_done()


@posix_only("Windows has no signal that kills")
@pytest.mark.parametrize("refused, killed_at", [
    # session of the refused event; the search for s-3 among eight takes 7 requests, for s-0 6
    ("s-3", 1),
    ("s-3", 2),
    ("s-3", 3),
    ("s-3", 4),
    ("s-3", 5),
    ("s-3", 6),
    ("s-3", 7),
    ("s-0", 1),
    ("s-0", 2),
    ("s-0", 3),
    ("s-0", 4),
    ("s-0", 5),
    ("s-0", 6),
])
def test_run_killed_during_a_search_loses_no_event(home, refused, killed_at):
    logged = home.fill(8)
    others = [session for session in logged if session != refused]
    refuse = answers.refuse_events([refused])
    runs = []

    def kill(handler):
        until(lambda: runs)
        runs[0].kill()

    with home.backend(*[refuse] * (killed_at - 1) + [kill], default=None) as backend:
        runs.append(home.spawn())
        assert wait(runs[0]).code == -signal.SIGKILL
    later = sync_with(home, refuse)

    in_flight = backend.bodies()[-1]["events"]
    arrived = accepted_sessions(backend, [refused]) + accepted_sessions(later, [refused])
    assert sorted(set(arrived)) == others
    # Only the batch in flight may come twice.
    assert len(arrived) - len(others) <= len(in_flight)
    home.assert_done()


@pytest.mark.parametrize("status", REFUSALS)
def test_verbose_says_which_events_were_left_out(home, status):
    """By log and byte, so that the author of a logger finds them; never by content."""
    home.fill(10)
    begin = home.size("usage")
    home.log("usage", usage(10, user_intent="PRIVATE"))
    home.log("feedback", 0, 1)
    refused = ["s-10", "f-1"]
    second = home.size("feedback") - len(json.dumps(feedback(1), ensure_ascii=False).encode()) - 1

    with home.backend(default=answers.refuse_events(refused, status)):
        lines = home.run("-v").err.decode().splitlines()

    left_out = [line for line in lines if "left out" in line]
    assert len(left_out) == 2
    assert "byte %d of usage.jsonl" % begin in left_out[0]
    assert "byte %d of feedback.jsonl" % second in left_out[1]
    assert "PRIVATE" not in "".join(lines)


def test_proof_of_a_settled_refusal_is_forgotten(home):
    """All events of the first batch are accepted, in halves: that says nothing of event 101."""
    logged = home.fill(BATCH + 1)

    home.deliver(answer(413), OK, OK, answer(413))

    assert home.result == "server_error"
    assert home.deliver().sessions == logged[BATCH:]


# Time: of a run, of a request, of a connect.

@pytest.mark.parametrize("answering, max_time, begun, result", [
    # seconds of each answer, seconds of the run, requests begun of 5, last_sync_result
    (1, 10, 5, "ok"),
    (3, 10, 3, "network_error"),
    (9, 30, 3, "network_error"),
    (5, 30, 5, "ok"),
    (5.1, 30, 4, "network_error"),
    (20, 30, 2, "network_error"),
    (20.1, 30, 1, "network_error"),
    (40, 30, 1, "network_error"),
])
def test_no_request_is_begun_in_the_last_third_of_a_run(
        home, answering, max_time, begun, result):
    sent = home.fill(4 * BATCH, 1)
    clock = FakeClock()

    def pass_time():
        clock.passed += answering

    backend = home.deliver(*[answers.then(pass_time)] * 5, clock=clock, max_time=max_time)

    assert len(backend.requests) == begun
    assert home.result == result
    assert home.deliver().sessions == sent[begun * BATCH:]
    home.assert_done()


def make_connects_take(monkeypatch, clock, seconds):
    create = socket.create_connection

    def create_slowly(*args):
        clock.passed += seconds
        return create(*args)

    monkeypatch.setattr(socket, "create_connection", create_slowly)


def test_first_request_of_a_run_is_always_begun(home, monkeypatch):
    """Where to connect takes most of a run, all runs would otherwise send nothing."""
    clock = FakeClock()
    make_connects_take(monkeypatch, clock, 29)
    home.fill(BATCH, 1)

    backend = home.deliver(clock=clock)

    assert backend.sizes == [BATCH]
    assert home.result == "network_error"


def test_time_is_looked_at_after_a_connect(home, monkeypatch):
    clock = FakeClock()
    make_connects_take(monkeypatch, clock, 11)
    home.fill(BATCH, 1)

    backend = home.deliver(OK_THEN_CLOSED, clock=clock)

    assert backend.connections == 2
    assert backend.sizes == [BATCH]
    assert home.result == "network_error"


@pytest.mark.parametrize("first, max_time, waits, result", [
    # first answer, seconds of the run, waits, last_sync_result
    pytest.param(answer(429, Retry_After=9), 13.5, [9], "ok", id="429 in time"),
    pytest.param(answer(429, Retry_After=9), 13, [], "server_error", id="429 too late"),
    pytest.param(answer(503), 3, [2], "ok", id="503 in time"),
    pytest.param(answer(503), 2.9, [], "server_error", id="503 too late"),
])
def test_wait_that_the_time_does_not_allow_is_not_begun(home, first, max_time, waits, result):
    home.fill(1)
    clock = FakeClock()

    backend = home.deliver(first, clock=clock, max_time=max_time)

    assert clock.slept == waits
    assert home.result == result
    assert len(backend.requests) == 1 + len(waits)


# What ends a run from outside: its time is up, whatever it is doing.

SHORT_RUN = "1.5" if POSIX else "5"  # seconds; Windows needs some to start a Python

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
STREAMS = {
    # name: (how an answer begins, what then comes again and again)
    "status line": (b"HTTP/1.1 200 ", b"x"),
    "headers": (HEAD, b"X-Many: x\r\n"),
    "header": (HEAD + b"X-Long: ", b"x"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (HEAD + b"\r\n", b" "),
    "body of 10 TB": (HEAD + b"Content-Length: 9999999999999\r\n\r\n", b" "),
    "chunks": (CHUNKED, b"1\r\n \r\n"),
    "chunk of 2 GB": (CHUNKED + b"7fffffff\r\n", b" "),
    "chunk of -1": (CHUNKED + b"-1\r\n", b" "),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "trailers": (CHUNKED + b'b\r\n{"code": 0}\r\n0\r\n', b"X-Many: x\r\n"),
}


def test_trickling_answer_ends_with_the_run(tmp_path):
    """All at once, for each takes the time of a run."""
    homes = {}
    sent = {}
    runs = {}
    with contextlib.ExitStack() as stack:
        for name, (head, piece) in dict(STREAMS, nothing=(b"", b"")).items():
            trickle = answers.endless(head, piece, pause=0.05)
            backend = stack.enter_context(FakeBackend(OK, trickle))
            homes[name] = Home(tmp_path / name, backend.url)
            sent[name] = homes[name].fill(BATCH, 1)
            runs[name] = homes[name].spawn("-v", "--max-time", SHORT_RUN)
        results = {name: wait(runs[name]) for name in runs}

    assert {name: results[name].code for name in runs} == dict.fromkeys(runs, 0)
    assert [name for name in runs if b"time is up" not in results[name].err] == []
    assert {name: homes[name].result for name in runs} == dict.fromkeys(runs, "network_error")
    for name in runs:
        # What was accepted is not sent again, the rest is.
        assert {name: homes[name].deliver().sessions} == {name: sent[name][BATCH:]}


# Prints the most memory that the process has used, in KiB, when it ends.
# (On Linux, getrusage counts what the process that started this one has used.)
SHOW_MEMORY = r"""
import os, re, resource, sys
end = os._exit
def show_and_end(code):
    if sys.platform == "linux":
        used = int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read()).group(1))
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used //= 1024 if sys.platform == "darwin" else 1
    os.write(1, str(used).encode())
    end(code)
os._exit = show_and_end
"""


@posix_only("Windows has no figure of the memory used")
@pytest.mark.parametrize("name", sorted(STREAMS))
def test_endless_answer_takes_little_memory(home, name):
    home.fill(1)
    head, piece = STREAMS[name]

    with home.backend(answers.endless(head, piece * 10000)):
        result = home.run("--max-time", "0.5", shim=SHOW_MEMORY)

    assert result.code == 0
    assert result.err == b""
    assert int(result.out) < 100 * 1024
    assert home.result == "network_error"


@pytest.fixture
def full_pipe():
    """The end of a pipe that takes nothing more, and that nobody reads."""
    begin, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)
    yield end
    os.close(end)
    os.close(begin)


@posix_only("Windows has pipes of another kind")
def test_stderr_that_nobody_reads_does_not_keep_a_run(home, hold, full_pipe):
    """The watch that says so waits for the pipe; the one behind it ends the run with 1."""
    home.fill(1)

    with home.backend(hold):
        run = home.spawn("-v", "--max-time", "0.5", options={"stderr": full_pipe})
        result = wait(run, 20)

    assert result.code == 1
    assert home.result == "network_error"


NO_SLEEP = """
import time
def sleep(seconds):
    raise PermissionError(1, "Operation not permitted")
time.sleep = sleep
"""


def test_run_is_limited_where_a_sandbox_refuses_to_sleep(home, hold):
    home.fill(1)

    with home.backend(hold):
        assert home.run("--max-time", "0.5", shim=NO_SLEEP) == SILENT

    assert home.result == "network_error"


def test_run_is_silent_where_a_sandbox_refuses_to_sleep(home):
    sent = home.fill(1)

    with home.backend(answer(503)):
        assert home.run(shim=NO_SLEEP) == SILENT

    assert home.result == "server_error"
    assert home.deliver().sessions == sent


HANGING_LOOK_UP = """
import socket, time
socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)
"""
HANGING_PROXY_BYPASS = """
import time, urllib.request
urllib.request.proxy_bypass = lambda host: time.sleep(60)
"""
HANGING_PROXIES = """
import time, urllib.request
urllib.request.getproxies = lambda: time.sleep(60)
"""


def test_run_that_hangs_before_its_first_request_ends(tmp_path):
    """All at once, for each takes the time of a run."""
    shims = {"look-up": HANGING_LOOK_UP, "bypass": HANGING_PROXY_BYPASS,
             "proxies": HANGING_PROXIES, "lines": ""}
    homes = {name: Home(tmp_path / name, "https://127.0.0.1:9") for name in shims}
    for name in shims:
        if name == "lines":
            homes[name].append("usage", b"x\n" * 3000000)
        homes[name].log("usage", 1)
    runs = {name: homes[name].spawn("-v", "--max-time", SHORT_RUN, shim=shims[name], no_proxy="")
            for name in shims}
    results = {name: wait(runs[name]) for name in runs}

    assert {name: results[name].code for name in runs} == dict.fromkeys(runs, 0)
    assert [name for name in runs if b"time is up" not in results[name].err] == []
    assert {name: homes[name].result for name in runs} == dict.fromkeys(runs, "network_error")
    assert homes["look-up"].deliver().sessions == ["s-1"]


# Waiting for a server: a connect, and then no progress.

@pytest.fixture
def dead_addresses(monkeypatch):
    """Let each host have eight addresses that swallow packets, and then a good one."""
    with contextlib.ExitStack() as stack:
        dead = stack.enter_context(socket.socket())
        dead.bind(("127.0.0.1", 0))
        dead.listen(0)
        for _ in range(4):  # its queue is full: on Linux, it swallows what comes then
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(dead.getsockname())

        def getaddrinfo(host, port, *args, **kwargs):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                    for address in [dead.getsockname()] * 8 + [("127.0.0.1", port)]]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def test_connect_has_its_seconds_for_each_address(home, monkeypatch, dead_addresses):
    """A network whose IPv6 leads nowhere must leave time for IPv4."""
    monkeypatch.setattr(secondme_sync, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 2)
    timeouts = []
    create = socket.create_connection

    def create_connection(address, timeout):
        timeouts.append(timeout)
        return create(address, timeout)

    monkeypatch.setattr(socket, "create_connection", create_connection)
    sent = home.fill(1)

    backend = home.deliver()

    assert backend.sessions == sent
    assert timeouts == [0.05]
    home.assert_done()


def test_eight_dead_addresses_leave_time_for_the_good_one():
    assert 8 * secondme_sync.CONNECT_SECONDS < secondme_sync.RUN_SECONDS


class LateBackend(FakeBackend):
    """A backend that looks at a connection 0.3 s after the system has accepted it."""

    def get_request(self):
        time.sleep(0.3)
        return super().get_request()


@pytest.fixture
def short_connect(monkeypatch):
    """Limit a TCP connect to much less than the servers of these tests take later on."""
    monkeypatch.setenv("SSL_CERT_FILE", CERTIFICATE)
    monkeypatch.setattr(secondme_sync, "CONNECT_SECONDS", 0.1)


def test_slow_answer_is_waited_for(home, short_connect):
    sent = home.fill(1)

    assert home.deliver(answers.after(0.3)).sessions == sent
    home.assert_done()


def test_slow_tls_handshake_is_waited_for(home, short_connect):
    sent = home.fill(1)

    with LateBackend(context=tls_context()) as backend:
        home.configure(baseUrl=backend.url)
        home.sync()

    assert backend.sessions == sent
    home.assert_done()


def test_slow_tunnel_of_a_proxy_is_waited_for(home, short_connect, monkeypatch):
    sent = home.fill(1)

    with Proxy(delay=0.3) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url())
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "")
        backend = home.deliver(context=tls_context())

    assert len(proxy.heads) == 1
    assert backend.sessions == sent
    home.assert_done()


def test_request_without_progress_ends(home, hold, monkeypatch):
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.3)
    home.fill(1)

    backend = home.deliver(hold)

    assert len(backend.requests) == 1
    assert home.result == "network_error"


def test_tls_handshake_without_progress_ends(home, monkeypatch):
    """The limit holds from the first moment after the connect."""
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.3)
    home.fill(1)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        home.configure(baseUrl="https://127.0.0.1:%d" % silent.getsockname()[1])
        home.sync()

    assert home.result == "network_error"


def test_answer_that_makes_progress_has_no_limit(home, monkeypatch):
    """It takes more than IDLE_SECONDS in all."""
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.4)
    sent = home.fill(1)
    pieces = [b"HTTP/1.1 200 OK\r\n", b"X-A: a\r\n", b"X-B: b\r\n", b"X-C: c\r\n", b"X-D: d\r\n",
              b"Content-Length: 11\r\n", b"\r\n", b"{", b'"code', b'":', b"0", b"}", b" "]

    backend = home.deliver(answers.raw(*pieces, pause=0.04))

    assert backend.sessions == sent
    home.assert_done()


def read_slowly(handler):
    """Read a body by 16 KiB in 0.03 s, then reply."""
    left = int(handler.headers["Content-Length"])
    while left:
        time.sleep(0.03)
        left -= len(handler.rfile.read(min(left, 16384)))
    handler.reply(*OK)


def test_body_that_makes_progress_has_no_limit(home, monkeypatch, small_send_buffer):
    """A slow uplink must be able to deliver: this body takes more than IDLE_SECONDS in all."""
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.4)
    home.log("usage", usage(1, user_intent="x" * 350000))

    with home.backend(read_slowly) as backend:
        backend.early_above = 0  # read_slowly reads it
        backend.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        home.sync()

    assert len(backend.requests) == 1
    home.assert_done()


# Killed, and calls that fail.

@pytest.mark.parametrize("is_answered, repeated", [
    # is the request answered before the kill, how many events may arrive twice
    pytest.param(False, [BATCH], id="before the answer"),
    pytest.param(True, [0, BATCH], id="after the answer"),
])
def test_killed_run_repeats_one_batch_at_most(home, is_answered, repeated):
    logged = home.fill(3 * BATCH)
    runs = []

    def kill(handler):
        if is_answered:
            handler.reply(*OK)
        until(lambda: runs)
        runs[0].kill()

    with home.backend(OK, kill) as backend:
        runs.append(home.spawn())
        wait(runs[0])
        result = home.run()

    assert result == SILENT
    assert set(backend.sessions) == set(logged)
    assert len(backend.sessions) - len(logged) in repeated
    home.assert_done()


def trouble(call, nth, how):
    """Count the calls of a function, and let one fail or be the last of its process.

    This is executed in the process of the script. Each call that is counted, or that fails,
    adds a byte to the file "noted" in the working directory.

    call  "builtins.open", "os.fsync", ...; "state.write" and "state.truncate" are the system
          calls that change .sync-offsets
    how   "count": count all calls; "fail": let the nth raise OSError; "fail from then on";
          "kill": end the process before the nth
    """
    import builtins
    import errno
    import importlib
    import io
    import os
    import signal

    real_open = open
    calls = []

    class StateFile(io.FileIO):
        pass

    def open_state(file, *args, **kwargs):
        if isinstance(file, int):
            return StateFile(file, "r+")
        return real_open(file, *args, **kwargs)

    def note():
        with real_open("noted", "ab") as noted:
            noted.write(b".")

    def troubled(*args, **kwargs):
        if str(args[0] if args else "").endswith(".py"):
            return real(*args, **kwargs)
        calls.append(args)
        if how == "count":
            note()
        elif how == "fail from then on" and len(calls) >= nth or len(calls) == nth:
            if how.startswith("fail"):
                note()
                raise OSError(errno.ENOSPC if nth % 2 else errno.EIO, "trouble")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    builtins.open = open_state
    owner, name = call.split(".")
    owner = StateFile if owner == "state" else importlib.import_module(owner)
    real = getattr(owner, name)
    setattr(owner, name, troubled)


def shim_failing(call, nth, how):
    """Return lines for Home.run(shim=...); see trouble()."""
    return inspect.getsource(trouble) + "trouble(%r, %r, %r)\n" % (call, nth, how)


def no_state(home):
    """Nothing is logged and nothing recorded before the run: it makes .sync-offsets."""


def usual_state(home):
    """Two earlier events are sent, and one of them was skipped."""
    home.log("usage", 9000)
    home.main("--skip-pending")
    home.log("usage", 9001)
    home.deliver()


def state_of_reference_script(home):
    """Two earlier events were sent by the contract's script, which left a shorter file."""
    home.log("usage", 9000, 9001)
    home.write_state_of_reference_script()


def restore(home, files):
    """Let a home's analytics hold these files, by name, and nothing else."""
    for path in home.analytics.iterdir():
        path.unlink()
    for name, content in files.items():
        (home.analytics / name).write_bytes(content)


def take_note(home):
    """Return how many calls trouble() has noted, and forget them."""
    path = home.path / "noted"
    size = path.stat().st_size if path.exists() else 0
    if path.exists():
        path.unlink()
    return size


# where: which call it was, for messages. pending, arrived: sessions, before and after.
Trial = collections.namedtuple("Trial", "where result noted pending arrived")


def try_each_call(home, prepare, call, how, stride=1):
    """Yield a Trial for each call of a run: in a run of its own, that call is in trouble.

    Each trial begins with the same two pending batches, and ends with a second run, which is
    well. With a stride, only every stride-th call is tried.
    """
    prepare(home)
    pending = home.fill(BATCH, 20)
    files = {path.name: path.read_bytes() for path in home.analytics.iterdir()}
    with home.backend() as backend:
        assert home.run(shim=shim_failing(call, 0, "count")) == SILENT
        counted = take_note(home)
        assert counted > 0, "a run does not call %s" % call
        for nth in range(1, counted + 1, stride):
            restore(home, files)
            del backend.requests[:]
            result = home.run(shim=shim_failing(call, nth, how))
            home.sync()
            where = "%s: call %d of %d" % (call, nth, counted)
            yield Trial(where, result, take_note(home), pending, backend.sessions)


calls_of_a_run = pytest.mark.parametrize("call, prepare", [
    # call, state before the run
    pytest.param("builtins.open", usual_state, id="open"),
    pytest.param("os.stat", usual_state, id="stat"),
    pytest.param("os.fstat", usual_state, id="fstat"),
    pytest.param("fcntl.flock", usual_state, id="flock"),
    pytest.param("os.open", no_state, id="os.open, first run"),
    pytest.param("os.fsync", no_state, id="fsync, first run"),
    pytest.param("os.fsync", state_of_reference_script, id="fsync, after reference script"),
    pytest.param("state.write", usual_state, id="write of the state"),
    pytest.param("state.write", state_of_reference_script, id="write, after reference script"),
    pytest.param("state.truncate", usual_state, id="truncate of the state"),
])


@posix_only("Windows has no SIGKILL and no flock")
@calls_of_a_run
def test_failing_call_costs_nothing(home, call, prepare):
    """Each call that a run makes fails once. That run is silent, and the next sends the rest."""
    for trial in try_each_call(home, prepare, call, "fail"):
        assert trial.result == SILENT, trial.where
        assert trial.noted == 1, trial.where
        assert sorted(trial.arrived) == sorted(trial.pending), trial.where
        home.assert_done()


@posix_only("Windows has no SIGKILL and no flock")
@calls_of_a_run
def test_kill_at_a_call_loses_nothing(home, call, prepare):
    """Every fifth call that a run makes is its last. At most one batch arrives twice."""
    for trial in try_each_call(home, prepare, call, "kill", stride=5):
        assert trial.result == Result(-signal.SIGKILL, b"", b""), trial.where
        assert set(trial.arrived) == set(trial.pending), trial.where
        assert len(trial.arrived) - len(trial.pending) <= BATCH, trial.where
        home.assert_done()


@posix_only("Windows has no SIGKILL and no flock")
@pytest.mark.parametrize("call", ["state.write", "os.fsync"])
def test_full_disk_repeats_one_batch_at_most(home, call):
    """From some call on, each of its kind fails in a run."""
    for trial in try_each_call(home, usual_state, call, "fail from then on"):
        assert trial.result == SILENT, trial.where
        assert trial.noted >= 1, trial.where
        assert set(trial.arrived) == set(trial.pending), trial.where
        assert len(trial.arrived) - len(trial.pending) <= BATCH, trial.where
        home.assert_done()


# Consent withdrawn in mid-run.

def change(home, file, content):
    """Change keys of config, write another file anew, or delete a file: content is None."""
    if content is None:
        home.path_of(file).unlink()
    elif isinstance(content, dict) and file == "config":
        home.configure(**content)
    else:
        home.write(file, content)


def agree_again(home):
    """Agree to community mode, logged in and with the device id as before."""
    home.write("config", {"telemetry": "community"})
    home.write("credentials", {"accessToken": TOKEN})
    home.write(".device-id", "device-42\n")


changes_of_agreement = pytest.mark.parametrize("file, content", [
    # file, keys to change or new content or None
    pytest.param("config", {"telemetry": "off"}, id="switched off"),
    pytest.param("config", {"telemetry": None}, id="key removed"),
    pytest.param("config", {"telemetry": "anonymous"}, id="lowered"),
    pytest.param("config", None, id="config deleted"),
    pytest.param("config", b'{"telemetry": "comm', id="config broken"),
    pytest.param("credentials", None, id="logged out"),
    pytest.param("credentials", b"{", id="credentials broken"),
    pytest.param("credentials", {"accessToken": "other"}, id="another login"),
    pytest.param(".device-id", "device-43\n", id="device id changed"),
    pytest.param(".device-id", None, id="device id deleted"),
])


@changes_of_agreement
def test_change_during_a_request_ends_the_run(home, file, content):
    home.fill(BATCH + 50)

    backend = home.deliver(answers.then(lambda: change(home, file, content)))

    assert backend.sizes == [BATCH]
    assert backend.connections == 1
    assert home.result == "network_error"
    assert home.completed == [0, 0]


@changes_of_agreement
def test_change_during_the_wait_stops_the_retry(home, file, content):
    home.fill(BATCH + 50)
    clock = FakeClock()
    clock.sleep = lambda seconds: change(home, file, content)

    backend = home.deliver(answer(503), clock=clock)

    assert backend.sizes == [BATCH]
    assert home.result == "network_error"


@changes_of_agreement
def test_change_during_the_connect_ends_a_run(home, monkeypatch, file, content):
    home.fill(1)
    real_connect = http.client.HTTPConnection.connect
    connected = []

    def connect(connection):
        real_connect(connection)
        connected.append(connection)
        change(home, file, content)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    backend = home.deliver()

    assert len(connected) == 1
    assert backend.requests == []
    assert home.result == "network_error"


@changes_of_agreement
def test_rest_arrives_after_agreeing_again(home, file, content):
    logged = home.fill(BATCH + 50, 50)
    home.deliver(answers.then(lambda: change(home, file, content)))
    agree_again(home)

    backend = home.deliver()

    assert backend.sessions == logged[BATCH:]
    home.assert_done()


@pytest.mark.parametrize("file, content, modes", [
    # file, keys to change or new content or None, mode and events of the next run's requests
    pytest.param("config", {"telemetry": "off"}, [], id="switched off"),
    pytest.param("config", {"telemetry": None}, [], id="key removed"),
    pytest.param("config", None, [], id="config deleted"),
    pytest.param("config", b'{"telemetry": "comm', [], id="config broken"),
    pytest.param("config", {"telemetry": "anonymous"}, [("anonymous", 50)], id="lowered"),
    pytest.param("credentials", None, [], id="logged out"),
    pytest.param("credentials", b"{", [], id="credentials broken"),
    pytest.param("credentials", {"accessToken": "other"}, [("community", 50)], id="other login"),
    pytest.param(".device-id", "device-43\n", [("community", 50)], id="device id changed"),
    pytest.param(".device-id", None, [("community", 50)], id="device id deleted"),
])
def test_next_run_does_what_is_agreed_to_now(home, file, content, modes):
    home.fill(BATCH + 50)
    with home.backend(answers.then(lambda: change(home, file, content))) as backend:
        home.sync()
        del backend.requests[:]

        home.sync()

    assert backend.modes == modes


def test_next_run_uses_the_new_login(home):
    home.fill(BATCH + 50)
    home.deliver(answers.then(lambda: home.write("credentials", {"accessToken": "other"})))

    backend = home.deliver()

    assert [request.headers["Authorization"] for request in backend.requests] == ["Bearer other"]


@pytest.mark.parametrize("content, sent", [
    # new .device-id or None, deviceId of the next run's request
    pytest.param("device-43\n", "device-43", id="changed"),
    pytest.param(None, None, id="deleted"),
])
def test_next_run_uses_the_new_device_id(home, content, sent):
    home.fill(BATCH + 50)
    home.deliver(answers.then(lambda: change(home, ".device-id", content)))

    backend = home.deliver()

    assert [body.get("deviceId") for body in backend.bodies()] == [sent]


def test_device_id_does_not_matter_in_anonymous_mode(home):
    """It is not sent, so a run need not end where it changes."""
    home.fill(BATCH + 50)
    delete = answers.then(lambda: change(home, ".device-id", None))

    backend = home.deliver(delete, mode="anonymous")

    assert backend.modes == [("anonymous", BATCH), ("anonymous", 50)]
    home.assert_done()


def test_change_ends_the_search_for_a_refused_event(home):
    home.fill(BATCH)
    switch_off = answers.then(lambda: home.configure(telemetry="off"), answer(400))

    backend = home.deliver(switch_off)

    assert backend.sizes == [BATCH]
    assert home.result == "network_error"


def test_change_before_the_connect_ends_the_run(home):
    home.fill(1)
    with home.backend() as backend:
        run = secondme_sync.Run(str(home.dir), {})
        home.configure(telemetry="off")

        with pytest.raises(secondme_sync.Stop):
            secondme_sync.sync(run)

    assert backend.connections == 0


def test_logout_before_the_connect_ends_the_run(home, monkeypatch):
    """The run has found a token, and has flushed its first record, when the user logs out."""
    home.fill(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: home.write("credentials", {}))

    backend = home.deliver()

    assert backend.connections == 0


def test_reconnect_needs_consent(home):
    """A server that closes a kept connection is asked again, but not after a change."""
    logged = home.fill(BATCH + 1)

    backend = home.deliver(OK, lambda handler: home.configure(telemetry="off"))

    assert backend.sizes == [BATCH, 1]
    assert home.deliver(mode="community").sessions == logged[BATCH:]


def test_reconnect_needs_time(home):
    """In the last third of a run, no request begins."""
    logged = home.fill(BATCH + 1)
    clock = FakeClock()

    backend = home.deliver(OK, lambda handler: clock.sleep(25), clock=clock)

    assert backend.sizes == [BATCH, 1]
    assert home.deliver().sessions == logged[BATCH:]


# Power cuts.

def state_of_another_program(home):
    """The last record, indented and with a key that makes it longer than a sector."""
    record = dict(home.offsets(), other="x" * 2 * secondme_sync.RECORD_BYTES)
    home.write(".sync-offsets", json.dumps(record, indent=1))


def last_record(home):
    """The state as the last run has left it."""


@pytest.mark.parametrize("earlier_runs, prepare, replies", [
    # runs before, each of one event; the state before the run; what it is answered
    pytest.param(1, last_record, [OK, OK, OK], id="usual run"),
    pytest.param(0, last_record, [OK, OK, OK], id="first run"),
    pytest.param(3, last_record, [OK, OK, OK], id="run after others"),
    pytest.param(1, last_record, [OK, OK, answer(500)], id="run that is not accepted midway"),
    pytest.param(1, last_record, [OK, OK, DROP, DROP], id="run without an answer midway"),
    pytest.param(1, Home.write_state_of_reference_script, [OK, OK, OK],
                 id="run after the reference script"),
    pytest.param(1, state_of_another_program, [OK, OK, OK], id="run after another program"),
])
def test_power_cut_loses_nothing(home, monkeypatch, earlier_runs, prepare, replies):
    """Whenever the power goes, the next run sends the rest and repeats no earlier run's events."""
    for number in range(earlier_runs):
        home.log("usage", 9000 + number)
        home.deliver()
    prepare(home)
    logged = home.fill(3 * BATCH)
    with monkeypatch.context() as patches, home.backend() as backend:
        disk = Disk(patches, home.state, lambda: backend.sessions)
        backend.script = [reply if reply == DROP else answers.then(disk.crash, reply)
                          for reply in replies]
        home.sync()
        disk.crash()

    assert len(disk.crashes) > 2
    assert len(set().union(*[contents for arrived, contents in disk.crashes])) > 2
    for arrived, contents in disk.crashes:
        for content in contents:
            if home.state.exists():
                home.state.unlink()
            if content is not None:
                home.write(".sync-offsets", content)

            again = home.deliver().sessions

            assert set(arrived + again) == set(logged)
            assert again == logged[len(logged) - len(again):]
            state = secondme_sync.read_state(str(home.analytics))
            assert state.completed["usage"] == home.size("usage")


@posix_only("Windows cannot flush a folder")
def test_new_state_has_a_name_after_a_power_cut(home, monkeypatch):
    """Without one, later runs would lose their records too, for they flush no folder."""
    home.fill(1)
    disk = Disk(monkeypatch, home.state, lambda: None)

    home.deliver()
    disk.crash()

    progress, contents = disk.crashes[-1]
    assert None not in contents


# Fuzz and model.

def spoil(chance, data):
    """Change, drop and add some bytes of data, but add no newline."""
    data = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(data) + 1)
        junk = bytes(chance.choice(b'\0\t "\\{}[]:,0-9eEuNI\x7f\x80\xc3\xed\xff')
                     for _ in range(chance.randrange(4)))
        data[place:place + chance.randrange(4)] = junk
    return bytes(data)


@pytest.mark.parametrize("seed", range(10))
def test_spoiled_lines_cost_no_other_line(home, seed):
    chance = random.Random(seed)
    for number in range(0, 150, 2):
        spoiled = spoil(chance, line(usage(number + 1))[:-1]) + b"\n"
        home.append("usage", line(usage(number)) + spoiled)
    whole = ["s-%d" % number for number in range(0, 150, 2)]

    backend = home.deliver()

    assert [session for session in backend.sessions if session in whole] == whole
    home.assert_done()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["config", "credentials", ".device-id"])
def test_spoiled_file_costs_no_event(home, name, seed):
    """What is sent meanwhile is right, and the rest arrives when the file is mended."""
    logged = home.fill(3, 3)
    with home.backend() as backend:
        content = home.path_of(name).read_bytes()
        home.write(name, spoil(random.Random(seed), content))
        home.sync()
        modes_meanwhile = [mode for mode, size in backend.modes]
        home.write(name, content)
        home.sync()

    assert set(modes_meanwhile) <= {"community"}
    assert backend.sessions == logged
    assert all(TOKEN.encode() not in request.body for request in backend.requests)
    home.assert_done()


@pytest.mark.parametrize("seed", range(10))
def test_spoiled_state_is_made_whole(home, seed):
    """Its offsets may be lost, and events be repeated; what is logged next arrives."""
    logged = home.fill(3, 3)
    home.deliver()
    home.write(".sync-offsets", spoil(random.Random(seed), home.state.read_bytes()))

    repeated = home.deliver().events()
    home.log("usage", 7)
    backend = home.deliver()

    assert {event.get("session") for event in repeated} <= {None}.union(logged)
    assert backend.events()[-1]["ts"] == usage(7)["ts"]
    home.assert_done()


@pytest.mark.parametrize("seed", range(int(os.environ.get("SECONDME_MODEL_RUNS", 6))))
def test_random_history_keeps_the_promise(home, seed):
    """See fixtures/model.py. SECONDME_MODEL_RUNS=100 tries a hundred histories."""
    Model(home, seed).play()


def test_same_seed_repeats_a_history(tmp_path):
    models = [Model(Home(tmp_path / name), seed=7) for name in ("first", "second")]
    for model in models:
        model.play(steps=25)

    assert models[0].history == models[1].history
    assert models[0].backend.bodies() == models[1].backend.bodies()


def test_failing_model_shows_event_and_history(home):
    model = Model(home, seed=0)
    model.limits["usage-0"] = "community"  # it is not logged, so it cannot arrive

    with pytest.raises(AssertionError) as failure:
        model.play(steps=2)

    message = str(failure.value)
    assert message.startswith("usage-0 was lost")
    assert "The history of seed 0:\n" + "\n".join(model.history) in message


# Command line.

ENDPOINT = NOWHERE + "/gate/lab" + secondme_sync.EVENTS_PATH  # of the fixture home
PASSED_OVER = "lines that hold no event and are ignored: %d"


def counted(**numbers):
    """Return how messages count events, such as "usage events: 2, feedback events: 0"."""
    return ", ".join("%s events: %d" % (name, numbers.get(name, 0)) for name in secondme_sync.LOGS)


def replace_usage_log_by_folder(home):
    with contextlib.suppress(FileNotFoundError):
        home.path_of("usage.jsonl").unlink()
    home.path_of("usage.jsonl").mkdir()


def log_in_both_modes(home):
    """Log three events that a run in anonymous mode sees, and four in community mode."""
    home.fill(2, 1)
    home.deliver(answer(500), mode="anonymous")
    home.log("usage", 50, 51, 52)
    home.log("feedback", 50)
    home.configure(telemetry="community", baseUrl=NOWHERE + "/gate/lab")


def test_dry_run_prints_the_bodies_of_the_next_run(home):
    home.fill(BATCH + 30)
    home.log("feedback", *[feedback(number, comment="记" * 20000) for number in range(5)])
    home.append("feedback", b'{"comment": "\\ud83d \xff \\u2028"}\nno event\n{"torn')
    home.deliver(OK, answer(500))

    printed = home.main("--dry-run").out.split(b"\n")
    backend = home.deliver()

    assert len(backend.requests) > 2
    assert printed == [request.body for request in backend.requests] + [b""]


@pytest.mark.parametrize("flags", [
    ["--dry-run"], ["--dry-run", "anonymous"], ["--status"], ["--pending"]], ids=" ".join)
def test_looking_changes_nothing(home, flags):
    home.fill(2, 1)
    home.deliver(answer(500))
    before = home.snapshot()

    home.main(*flags)

    assert home.snapshot() == before


@pytest.mark.parametrize("config, logged_in, environ", [
    # config                       logged_in  environ
    ({"telemetry": "community"},   True,      {}),
    ({"telemetry": "off"},         True,      {}),
    ({"telemetry": None},          False,     {}),
    ({"telemetry": "community"},   True,      {"SM_TEL": "off"}),
    ({"telemetry": "community"},   True,      {"DO_NOT_TRACK": "1"}),
    ({"baseUrl": "ftp://refused"}, True,      {}),
], ids=["agreed", "off", "new user", "SM_TEL", "DO_NOT_TRACK", "refused baseUrl"])
@pytest.mark.parametrize("mode", ["anonymous", "community"])
def test_dry_run_previews_a_mode(home, mode, config, logged_in, environ):
    """A person can look before agreeing, whatever is set."""
    home.log("usage", 7)
    home.log("feedback", 8)
    home.configure(**config)
    if not logged_in:
        home.log_out()

    result = home.main("--dry-run", mode, **environ)

    body = json.loads(result.out.decode("utf-8"))
    assert result.code == 0
    assert body["telemetryMode"] == mode
    assert body.get("deviceId") == {"anonymous": None, "community": "device-42"}[mode]
    assert body["events"] == [secondme_sync.shape_event(mode, "usage", usage(7)),
                              secondme_sync.shape_event(mode, "feedback", feedback(8))]


def test_preview_keeps_anonymous_what_was_seen_as_anonymous(home):
    log_in_both_modes(home)

    bodies = [json.loads(text) for text in
              home.main("--dry-run", "community").out.decode("utf-8").splitlines()]

    assert [(body["telemetryMode"], len(body["events"])) for body in bodies] == [
        ("anonymous", 2), ("community", 3), ("anonymous", 1), ("community", 1)]


@pytest.mark.parametrize("change, flags, environ, said", [
    # change: what differs from three pending events, flags, environment, said on stderr
    pytest.param(
        None, [], {},
        "the mode is community; the server is {endpoint}; pending: "
        + counted(usage=2, feedback=1),
        id="community"),
    pytest.param(
        None, [], {"SM_TEL": "anonymous"},
        "the mode is anonymous; the server is {endpoint}; pending: "
        + counted(usage=2, feedback=1),
        id="anonymous"),
    pytest.param(
        lambda home: home.append("usage", b'no event\n\n{"torn'), [], {},
        "the mode is community; the server is {endpoint}; pending: "
        + counted(usage=2, feedback=1)
        + "; " + PASSED_OVER % 1 + "; half-written lines: 1", id="passed over"),
    pytest.param(
        None, ["anonymous"], {},
        'a preview of anonymous mode; the mode that is set is community (config says "community"); '
        "pending: " + counted(usage=2, feedback=1), id="preview"),
    pytest.param(
        None, ["community"], {"DO_NOT_TRACK": "1"},
        'a preview of community mode; the mode that is set is off (DO_NOT_TRACK is "1"; '
        'config says "community"); pending: ' + counted(usage=2, feedback=1),
        id="preview where off"),
])
def test_dry_run_says_what_it_prints(home, change, flags, environ, said):
    home.fill(2, 1)
    if change:
        change(home)

    result = home.main("--dry-run", *flags, **environ)

    assert result.code == 0
    assert result.err.decode("utf-8") == "secondme_sync: " + said.format(endpoint=ENDPOINT) + "\n"


@pytest.mark.parametrize("change, reason", [
    # change of a home with an event, part of the reason
    pytest.param(lambda home: home.configure(telemetry="off"), "telemetry is off", id="off"),
    pytest.param(Home.log_out, "not logged in", id="not logged in"),
    pytest.param(Home.deliver, "nothing is pending", id="nothing pending"),
    pytest.param(lambda home: home.configure(baseUrl="ftp://x"), "is refused", id="refused"),
])
def test_dry_run_says_why_it_prints_nothing(home, change, reason):
    home.fill(1)
    change(home)

    result = home.main("--dry-run")

    assert result.code == 0
    assert result.out == b""
    assert result.err.startswith(b"secondme_sync: nothing would be sent: ")
    assert reason in result.err.decode("utf-8")


def test_dry_run_names_the_preview_where_telemetry_is_off(home):
    home.configure(telemetry="off")

    result = home.main("--dry-run")

    assert b"(--dry-run anonymous or --dry-run community shows what it would send)" in result.err


def test_dry_run_counts_what_goes_as_anonymous(home):
    log_in_both_modes(home)

    assert home.main("--dry-run").err.decode("utf-8").endswith(
        ": " + counted(usage=5, feedback=2) + "; of these, to be sent as anonymous only: 3\n")


def show_on_terminal(home, *flags, **env):
    """Run the script with a terminal as its stdout; return what the terminal gets."""
    import pty

    ours, theirs = pty.openpty()
    process = home.spawn(*flags, options={"stdout": theirs}, **env)
    os.close(theirs)
    shown = b""
    # At the end, Linux raises EIO and macOS returns nothing.
    with contextlib.suppress(OSError):
        for data in iter(lambda: os.read(ours, 65536), b""):
            shown += data
    os.close(ours)
    assert wait(process).code == 0
    return shown.decode("utf-8").replace("\r\n", "\n")


@posix_only("Windows has no pseudo-terminals")
@pytest.mark.parametrize("encoding, intent", [
    # encoding  how "很好 👍" is shown
    ("utf-8",   "很好 👍"),
    ("ascii",   "\\u5f88\\u597d \\U0001f44d"),
])
def test_dry_run_is_indented_on_a_terminal(home, encoding, intent):
    home.log("usage", usage(7, user_intent="很好 👍"))

    shown = show_on_terminal(home, "--dry-run", PYTHONIOENCODING=encoding)

    assert '\n  "telemetryMode": "community"' in shown
    assert '"user_intent": "%s"' % intent in shown


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_body_that_cannot_be_indented_is_shown_as_it_is(monkeypatch):
    """As with very deep nesting; how deep depends on the Python."""
    def fail(*args, **kwargs):
        raise RecursionError

    terminal = Terminal(io.BytesIO(), "utf-8", newline="\n")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(json, "dumps", fail)

    secondme_sync.print_body(b'{"events":[]}')

    assert terminal.buffer.getvalue() == b'{"events":[]}\n'


# Characters that a terminal would obey or reorder, and how they are shown.
UNPRINTABLE = [
    ("C1 control", "\u009b2J", "\\u009b2J"),
    ("escape", "\u001b[2J", "\\u001b[2J"),
    ("bidi override", "\u202e", "\\u202e"),
    ("bidi isolate", "\u2066", "\\u2066"),
    ("line separator", "\u2028", "\\u2028"),
    ("beyond 16 bits", "\U000e0041", "\\udb40\\udc41"),
]


@posix_only("Windows has no pseudo-terminals")
def test_terminal_shows_unprintable_characters_as_escapes(home):
    """A log must not be able to hide from the person who looks what will be posted."""
    home.log("usage", *[usage(number, user_intent="<%s>" % raw)
                        for number, (_, raw, _) in enumerate(UNPRINTABLE)])

    shown = show_on_terminal(home, "--dry-run", PYTHONIOENCODING="utf-8")

    for name, raw, escape in UNPRINTABLE:
        assert raw not in shown, name
        assert "<%s>" % escape in shown, name
    assert [char for char in shown if not char.isprintable()] == ["\n"] * shown.count("\n")
    assert json.loads(shown) == json.loads(home.run("--dry-run").out.decode("utf-8"))


@pytest.mark.parametrize("raw", [
    pytest.param(raw, id=name) for name, raw, _ in UNPRINTABLE if raw >= " " and name != "escape"])
def test_pipe_gets_unprintable_characters_as_they_are(home, raw):
    home.log("usage", usage(0, user_intent="<%s>" % raw))

    assert "<%s>".encode() % raw.encode("utf-8") in home.run("--dry-run").out


def status(home, **environ):
    """Run --status; return what it shows by label, such as {"mode": "off (...)", ...}."""
    result = home.main("--status", **environ)
    assert result.code == 0
    assert result.err == b""
    lines = result.out.decode("utf-8").splitlines()
    return dict(re.split(r": +", text, maxsplit=1) for text in lines)


def test_status_prints_six_lines(home):
    home.fill(2, 1)

    result = home.main("--status")

    assert result.code == 0
    assert result.err == b""
    assert result.out.decode("utf-8") == (
        "directory: %s\n"
        "mode:      community (config says \"community\")\n"
        "endpoint:  %s\n"
        "login:     a token in credentials\n"
        "pending:   %s\n"
        "last sync: never\n" % (home.dir, ENDPOINT + " (baseUrl in config)", counted(usage=2, feedback=1)))


# Changes of a home with 2 usage events and 1 feedback event, for --status.

def append_useless_lines(home):
    home.append("usage", b"no event\n[1]\n\n" + b"x" * secondme_sync.MAX_LINE_BYTES + b"x\n{")


def replace_state_directory_by_file(home):
    remove_state_directory(home)
    home.dir.write_bytes(b"")


def remove_state_directory(home):
    shutil.rmtree(str(home.dir))


UNFIT_TOKEN = "CREDENTIALS holds no accessToken, or one with blanks or characters beyond ASCII"


@pytest.mark.parametrize("change, environ, shown", [
    # change, environment, what --status shows
    pytest.param(
        lambda home: home.configure(telemetry="off"), {},
        {"mode": 'off (config says "off")',
         "pending": counted(usage=2, feedback=1)}, id="off"),
    pytest.param(
        lambda home: home.configure(telemetry="Community"), {},
        {"mode": 'off (config says "Community", which is no mode)'}, id="unknown mode"),
    pytest.param(
        lambda home: home.configure(telemetry=True), {},
        {"mode": "off (config says true, which is no mode)"}, id="mode of another type"),
    pytest.param(
        lambda home: home.configure(telemetry="\u202e\u009b"), {},
        {"mode": 'off (config says "\\u202e\\u009b", which is no mode)'}, id="unprintable mode"),
    pytest.param(
        lambda home: home.configure(telemetry=None), {},
        {"mode": "off (config names no mode)"}, id="no mode"),
    pytest.param(
        lambda home: home.path_of("config").unlink(), {},
        {"mode": "off (CONFIG is missing or empty)"}, id="no config"),
    pytest.param(
        lambda home: home.write("config", '{"telemetry": "community",}'), {},
        {"mode": "off (config is not a valid JSON object)"}, id="broken config"),
    pytest.param(
        None, {"SM_TEL": "on"},
        {"mode": 'off (SM_TEL is "on", which is no mode; config says "community")'}, id="SM_TEL unknown"),
    pytest.param(
        None, {"SM_TEL": "off"},
        {"mode": 'off (SM_TEL is "off"; config says "community")'}, id="SM_TEL off"),
    pytest.param(
        None, {"SM_TEL": "anonymous"},
        {"mode": 'anonymous (SM_TEL is "anonymous"; config says "community")',
         "pending": counted(usage=2, feedback=1)}, id="SM_TEL anonymous"),
    pytest.param(
        None, {"DO_NOT_TRACK": "1"},
        {"mode": 'off (DO_NOT_TRACK is "1"; config says "community")'}, id="DO_NOT_TRACK"),
    pytest.param(
        None, {"DISABLE_TELEMETRY": "yes"},
        {"mode": 'off (DISABLE_TELEMETRY is "yes"; config says "community")'}, id="DISABLE_TELEMETRY"),
    pytest.param(
        None, {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
        {"mode": 'off (CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC is "1"; '
                 'config says "community")'}, id="nonessential"),
    pytest.param(
        Home.log_out, {},
        {"login": "no, CREDENTIALS does not exist"}, id="not logged in"),
    pytest.param(
        lambda home: home.write("credentials", "token"), {},
        {"login": "no, CREDENTIALS is not a valid JSON object"}, id="broken credentials"),
    pytest.param(
        lambda home: home.write("credentials", {"accessToken": "two words"}), {},
        {"login": "no, " + UNFIT_TOKEN}, id="unfit token"),
    pytest.param(
        lambda home: home.configure(baseUrl=None), {},
        {"endpoint": secondme_sync.BASE_URL + secondme_sync.EVENTS_PATH
         + " (built in; a skill may pass another)"}, id="no baseUrl"),
    pytest.param(
        append_useless_lines, {},
        {"pending": counted(usage=2, feedback=1)
         + "; " + PASSED_OVER % 3 + "; half-written lines: 1"}, id="passed over"),
    pytest.param(
        Home.deliver, {},
        {"pending": counted(usage=0)}, id="all is sent"),
    pytest.param(
        remove_state_directory, {},
        {"mode": "off (CONFIG is missing or empty)",
         "login": "no, CREDENTIALS does not exist",
         "pending": counted(usage=0),
         "last sync": "never"}, id="no directory"),
])
def test_status_shows_how_things_stand(home, change, environ, shown):
    home.fill(2, 1)
    if change:
        change(home)

    found = status(home, **environ)
    path = str(home.path_of("credentials"))
    found["login"] = found["login"].replace(path, "CREDENTIALS")
    found["mode"] = found["mode"].replace(str(home.path_of("config")), "CONFIG")

    assert {label: found[label] for label in shown} == shown


@pytest.mark.parametrize("base_url, shown", [
    # baseUrl in config     how it is shown
    ("http://example.test", '"http://example.test"'),
    ("https://\u202e\u001b", '"https://\\u202e\\u001b"'),
    (["https://x"],         '["https://x"]'),
    (7,                     "7"),
    ("",                    '""'),
], ids=["http", "unprintable", "list", "number", "empty"])
def test_status_shows_a_refused_base_url(home, base_url, shown):
    home.configure(baseUrl=base_url)

    assert status(home)["endpoint"].startswith("baseUrl in config is refused: %s; it must be " % shown)


@pytest.mark.parametrize("mode, said", [
    # mode, what is pending; the event has a bad value in a field that only community sends
    ("community", counted(usage=0) + "; " + PASSED_OVER % 1),
    ("anonymous", counted(usage=1)),
    ("off",       counted(usage=0) + "; " + PASSED_OVER % 1),
])
def test_status_counts_in_the_mode_that_is_set(home, mode, said):
    home.append("usage", b'{"error_message": NaN}\n')
    home.configure(telemetry=mode)

    assert status(home)["pending"] == said


def test_status_counts_what_goes_as_anonymous(home):
    log_in_both_modes(home)

    assert status(home)["pending"] == counted(usage=5, feedback=2) + "; of these, to be sent as anonymous only: 3"


@pytest.mark.parametrize("reply, result, hint", [
    # answer, the result, what --status adds
    pytest.param(OK, "ok", "", id="ok"),
    pytest.param(answer(401), "auth_failed",
                 " (the server does not accept the token: log in again)", id="auth_failed"),
    pytest.param(answer(500), "server_error",
                 " (what the server did not accept stays pending)", id="server_error"),
    pytest.param(DROP, "network_error",
                 " (not finished, for one of these reasons: it is still at work; it ended early; "
                 "config, token or device id changed; no usable answer came; the base URL is "
                 "refused)", id="no answer"),
])
def test_status_shows_last_result_and_time(home, reply, result, hint):
    home.fill(1)
    home.deliver(reply)

    assert status(home)["last sync"] == result + " " + home.offsets()["last_sync_ts"] + hint


@pytest.mark.parametrize("value, shown", [
    ("https://me:word@example.test/path", '"https://(hidden)@example.test/path"'),
    ("http://me:word@example.test",       '"(hidden)@example.test"'),
])
def test_host_behind_a_hidden_password_is_shown(home, value, shown):
    home.configure(baseUrl=value)

    said = status(home)["endpoint"]

    assert said.startswith("baseUrl in config is refused: %s; " % shown)


@pytest.mark.parametrize("base_url", [
    "http://me:word@example.test", "https://me:word@example.test/path",
    "https://word@example.test",
    "https://me:wo@rd:word@example.test", "https://me:word@",
    ["https://me:word@example.test"],
], ids=str)
def test_user_and_password_are_never_shown(home, base_url):
    home.fill(1)
    home.configure(baseUrl=base_url)

    shown = [status(home)["endpoint"], home.sync()[-1], home.main("--dry-run").err.decode("utf-8")]

    for text in shown:
        assert "is refused" in text
        assert "word" not in text
        assert "me:" not in text
        assert "wo@" not in text


def test_long_refused_base_url_is_cut(home):
    home.configure(baseUrl="ftp://" + "x" * 10000)

    assert len(status(home)["endpoint"]) < 500


def test_token_is_never_shown(home):
    home.fill(1)

    for flags in (["--status"], ["--dry-run"], ["--pending", "-v"], ["--skip-pending", "-v"]):
        result = home.main(*flags)
        assert TOKEN.encode() not in result.out + result.err


NOT_REGULAR = "%s cannot be read (not a regular file)"


@pytest.mark.parametrize("name, label, shown", [
    # file, which line of --status tells, how it begins
    ("config", "mode", "off (" + NOT_REGULAR),
    ("credentials", "login", "no, " + NOT_REGULAR),
])
def test_status_names_a_small_file_that_cannot_be_read(home, name, label, shown):
    path = home.path_of(name)
    path.unlink()
    path.mkdir()

    assert status(home)[label].startswith(shown % path)


def test_status_says_that_the_state_holds_no_record(home):
    """Then everything in the logs is pending again, what was skipped included."""
    home.fill(1)
    home.write(".sync-offsets", "garbage")

    shown = status(home)["last sync"]

    assert shown == "unknown: %s holds no record; everything in the logs is pending" % home.state


def test_blank_state_is_that_of_no_sync(home):
    home.write(".sync-offsets", " " * secondme_sync.RECORD_BYTES)

    assert status(home)["last sync"] == "never"


def test_status_names_files_that_cannot_be_read(home):
    home.fill(2, 1)
    replace_usage_log_by_folder(home)
    home.state.mkdir()

    shown = status(home)

    others = counted(feedback=1).replace("usage events: 0, ", "")
    assert shown["pending"] == others + "; " + NOT_REGULAR % home.path_of("usage.jsonl")
    assert shown["last sync"] == "unknown: " + NOT_REGULAR % home.state


# Takes away root's rights. What the script imports must be loaded before, for the folders of
# Python may be closed to others.
AS_NOBODY = """
import argparse, gettext, os, secondme_sync, shutil, signal, urllib.parse
secondme_sync.build_parser().format_help()
with open(sys.argv[0], encoding="ascii") as file:
    source = file.read()
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
exec(compile(source, sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})
"""


@posix_only("Windows has no file modes")
@pytest.mark.parametrize("closed", ["analytics", "files"])
def test_status_names_what_is_closed_to_the_user(open_home, closed):
    """After a first run under sudo, files of root's lie in the user's folder."""
    home = open_home
    home.fill(1, 1)
    home.write(".sync-offsets", {})
    paths = [home.analytics] if closed == "analytics" else list(home.analytics.iterdir())
    for path in paths:
        path.chmod(0)

    result = home.run("--status", shim=AS_NOBODY, PYTHONPATH=str(ROOT))
    home.analytics.chmod(0o700)

    text = result.out.decode("utf-8")
    denied = os.strerror(errno.EACCES)
    assert result.err == b""
    assert "usage.jsonl cannot be read (%s)" % denied in text
    assert "feedback.jsonl cannot be read (%s)" % denied in text
    assert "last sync: unknown: %s cannot be read (%s)" % (home.state, denied) in text


@posix_only("Windows has no file modes")
def test_closed_credentials_are_not_called_missing(open_home):
    home = open_home
    path = home.path_of("credentials")
    home.dir.chmod(0)

    result = home.run("--status", shim=AS_NOBODY, PYTHONPATH=str(ROOT))
    home.dir.chmod(0o700)

    shown = "login:     no, %s cannot be read (%s)\n" % (path, os.strerror(errno.EACCES))
    assert shown in result.out.decode("utf-8")


@pytest.mark.parametrize("encoding, shown", [
    # encoding   the folder's name, in which U+202E is not printable
    ("utf-8",    "家\\u202eb"),
    ("ascii",    "\\u5bb6\\u202eb"),
])
def test_status_shows_any_directory_on_any_terminal(home, encoding, shown):
    folder = home.path / "家\u202eb"
    folder.mkdir()

    result = home.run("--status", "--dir", str(folder), PYTHONIOENCODING=encoding, PYTHONUTF8="1")

    assert result.code == 0
    assert result.err == b""
    assert result.out.decode("utf-8").splitlines()[0].endswith(shown)


# Changes of a home with 1 usage event, for --pending.

def leave_unfinished_line_only(home):
    home.rewrite("usage", b'{"event": "skill_r')


@pytest.mark.parametrize("change, environ, word", [
    # change, environment, what --pending prints
    pytest.param(None, {}, "yes", id="nothing was sent yet"),
    pytest.param(lambda home: home.deliver(answer(500)), {}, "yes", id="last run failed"),
    pytest.param(lambda home: home.write(".sync-offsets", {"usage_bytes": 0}), {}, "yes",
                 id="state of the reference script"),
    pytest.param(Home.deliver, {}, "no", id="all is sent"),
    pytest.param(Home.write_state_of_reference_script, {}, "no",
                 id="all is sent by the reference script"),
    pytest.param(lambda home: home.path_of("usage.jsonl").unlink(), {}, "no", id="no log"),
    pytest.param(lambda home: home.rewrite("usage"), {}, "no", id="empty log"),
    pytest.param(leave_unfinished_line_only, {}, "no", id="unfinished line only"),
    pytest.param(None, {"DO_NOT_TRACK": "1"}, "no", id="off"),
    pytest.param(Home.log_out, {}, "no", id="not logged in"),
])
def test_pending_prints_yes_or_no(home, change, environ, word):
    home.log("usage", 1)
    if change:
        change(home)

    assert home.main("--pending", **environ) == Result(0, word.encode() + b"\n", b"")


@pytest.mark.parametrize("mode, word", [("community", b"yes\n"), ("off", b"no\n")])
def test_pending_prints_a_word_in_a_process_of_its_own(home, mode, word):
    """On Windows too, a shell reads the word without a CR."""
    home.log("usage", 1)
    home.configure(telemetry=mode)

    assert home.run("--pending") == Result(0, word, b"")


def test_pending_says_why_with_verbose(home):
    result = home.main("--pending", "-v")

    assert result == Result(0, b"no\n", b"secondme_sync: a run would end: nothing is pending\n")


@pytest.mark.parametrize("mode", ["off", "anonymous", "community"])
@pytest.mark.parametrize("logged_in", [False, True], ids=["logged out", "logged in"])
def test_skipped_events_are_never_sent(home, mode, logged_in):
    home.fill(2, 1)
    home.configure(telemetry=mode)
    if not logged_in:
        home.log_out()
    before = home.snapshot()

    assert home.main("--skip-pending").code == 0

    assert home.changed_since(before) == {".sync-offsets"}
    assert home.result == "skipped"
    home.write("credentials", {"accessToken": TOKEN})
    assert home.deliver(mode="community").requests == []
    home.log("usage", 7)
    home.log("feedback", 5)
    assert home.deliver().sessions == ["s-7", "f-5"]
    home.assert_done()


@pytest.mark.parametrize("length", [1, 40, -1])
def test_line_that_was_begun_before_a_skip_is_not_sent(home, length):
    """It is part of what was logged so far, and its rest alone is no event."""
    unfinished = line(usage(7))
    home.append("usage", unfinished[:length])
    home.main("--skip-pending")

    home.append("usage", unfinished[length:])
    home.log("usage", 8)

    assert home.deliver().sessions == ["s-8"]
    home.assert_done()


@pytest.mark.parametrize("change, said", [
    # change: what differs from 2 usage events and 1 feedback event
    pytest.param(None, counted(usage=2, feedback=1), id="pending"),
    pytest.param(Home.deliver, counted(usage=0), id="all is sent"),
    pytest.param(
        lambda home: home.append("usage", b"no event\n"),
        counted(usage=2, feedback=1) + "; " + PASSED_OVER % 1,
        id="passed over"),
    pytest.param(
        lambda home: home.append("usage", b"{") or home.append("feedback", b"{"),
        counted(usage=2, feedback=1) + "; half-written lines: 2",
        id="half-written lines"),
])
def test_skip_pending_says_how_much(home, change, said):
    home.fill(2, 1)
    if change:
        change(home)

    result = home.main("--skip-pending")

    assert result == Result(0, b"never to be sent: " + said.encode() + b"\n", b"")


def test_skipping_twice_finds_nothing_the_second_time(home):
    home.fill(2, 1)
    home.main("--skip-pending")

    said = home.main("--skip-pending").out.decode()

    assert said == "never to be sent: " + counted(usage=0) + "\n"


@pytest.mark.parametrize("remove", [
    pytest.param(lambda home: None, id="no logs"),
    pytest.param(lambda home: home.analytics.rmdir(), id="no analytics"),
    pytest.param(remove_state_directory, id="no directory"),
])
def test_skip_pending_without_logs_says_so(home, remove):
    remove(home)
    before = home.snapshot()

    result = home.main("--skip-pending")

    said = "nothing is logged yet in %s\n" % home.analytics
    assert result == Result(0, said.encode("utf-8"), b"")
    assert home.snapshot() == before


@pytest.mark.parametrize("change, reason", [
    # change: what differs from a home with 1 usage event
    pytest.param(lambda home: home.state.mkdir(),
                 "{home.state} cannot be read (not a regular file)\n", id="state is a folder"),
    pytest.param(replace_usage_log_by_folder,
                 "{usage_log} cannot be read (not a regular file)\n", id="log is a folder"),
    pytest.param(replace_state_directory_by_file,
                 "{usage_log} cannot be read (Not a directory)\n", id="directory is a file",
                 marks=posix_only("Windows says that there is no such file")),
])
def test_skip_pending_that_fails_says_why(home, change, reason):
    home.fill(1)
    change(home)
    before = home.snapshot()

    result = home.main("--skip-pending")

    expected = reason.format(home=home, usage_log=home.path_of("usage.jsonl"))
    assert result.code == 1
    assert result.out == b""
    assert result.err.decode("utf-8").startswith("secondme_sync: nothing is skipped: " + expected)
    assert result.err.count(b"\n") == 1
    assert home.snapshot() == before


@posix_only("Windows has no file modes")
def test_skip_pending_fails_where_logs_are_closed_to_the_user(open_home):
    home = open_home
    home.fill(1)
    home.analytics.chmod(0)

    result = home.run("--skip-pending", shim=AS_NOBODY, PYTHONPATH=str(ROOT))
    home.analytics.chmod(0o700)

    assert result.code == 1
    assert result.out == b""
    assert b"usage.jsonl cannot be read (" in result.err


@pytest.mark.parametrize("directory", [os.path.join("other", ".secondme"), "~/other/.secondme"])
def test_dir_names_another_directory(home, directory):
    other = Home(home.path / "other")
    other.log("usage", 2)
    home.fill(1)

    with other.backend(OK, default=None) as backend:
        assert home.run("--dir", directory) == SILENT

    assert backend.sessions == ["s-2"]
    other.assert_done()
    assert home.offsets() is None


def test_base_url_is_used_where_config_has_none(home):
    home.fill(1)
    home.configure(baseUrl=None)

    with FakeBackend() as backend:
        assert home.run("--base-url", backend.url) == SILENT

    assert backend.sessions == ["s-0"]


def test_base_url_of_config_wins(home):
    home.fill(1)

    with home.backend() as backend:
        assert home.run("--base-url", NOWHERE) == SILENT

    assert backend.sessions == ["s-0"]


def test_base_url_of_command_line_obeys_the_same_rules(home):
    home.fill(1)
    home.configure(baseUrl=None)

    result = home.main("--status", "--base-url", "http://example.test")

    assert b'endpoint:  --base-url is refused: "http://example.test"; ' in result.out
    assert home.run("--base-url", "http://example.test") == SILENT
    assert home.result == "network_error"


def read_messages(backend):
    """Return what -v says, with BATCH for mode, size and URL of a batch, and URL for the URL."""
    url = backend.url + secondme_sync.EVENTS_PATH
    said = [text.replace(url, "URL") for text in backend.said]
    return [re.sub(r"batch of \d+ \(\w+ mode, \d+ bytes\) to URL", "BATCH", text) for text in said]


STAYS = "; what is not accepted stays pending"


@pytest.mark.parametrize("script, said", [
    # answers, what -v says
    pytest.param([OK], ["BATCH: HTTP 200, code 0 (ok)", "the run ends: ok"], id="ok"),
    pytest.param([answer(200, {"code": 1001})],
                 ["BATCH: HTTP 200, code 1001 (server_error)",
                  "the run ends: server_error" + STAYS], id="code"),
    pytest.param([answer(200, {"code": "0"})],
                 ["BATCH: HTTP 200, the answer has no whole number as code (server_error)",
                  "the run ends: server_error" + STAYS], id="no code"),
    pytest.param([answer(200, b"<html>")],
                 ["BATCH: HTTP 200, not a complete JSON object of 64 KiB at most (network_error)",
                  "the run ends: network_error" + STAYS],
                 id="no JSON"),
    pytest.param([answers.cut_off(200)],
                 ["BATCH: HTTP 200, not a complete JSON object of 64 KiB at most (network_error)",
                  "the run ends: network_error" + STAYS], id="half a body"),
    pytest.param([answer(302, Location="https://example.test")],
                 ["BATCH: HTTP 302, a redirect, which is not followed (server_error)",
                  "the run ends: server_error" + STAYS],
                 id="redirect"),
    pytest.param([answer(500)],
                 ["BATCH: HTTP 500, not accepted (server_error)",
                  "the run ends: server_error" + STAYS], id="500"),
    pytest.param([answer(401)],
                 ["BATCH: HTTP 401, the token is not accepted (auth_failed)",
                  "the run ends: auth_failed" + STAYS],
                 id="401"),
    pytest.param([answer(429, Retry_After=7), OK],
                 ["BATCH: HTTP 429, not accepted (server_error)",
                  "retry in 7 s",
                  "BATCH: HTTP 200, code 0 (ok)",
                  "the run ends: ok"], id="retry"),
    pytest.param([DROP],
                 ["network_error: BATCH: no usable answer (RemoteDisconnected)"], id="no answer"),
    pytest.param([answers.no_http],
                 ["network_error: BATCH: the answer is not HTTP (BadStatusLine)"], id="no HTTP"),
])
def test_verbose_says_what_was_answered(home, script, said):
    home.fill(1)

    backend = home.deliver(*script)

    assert read_messages(backend) == said


def test_verbose_says_which_event_is_left_out(home):
    """It says where the event is, never what it holds."""
    home.fill(2)

    backend = home.deliver(*[answers.refuse_events({"s-1"}, status=422)] * 9)

    begin = len(line(usage(0)))
    assert read_messages(backend) == [
        "BATCH: HTTP 422, the server refuses this body (refused)",
        "the refused batch is sent in two halves",
        "BATCH: HTTP 200, code 0 (ok)",
        "BATCH: HTTP 422, the server refuses this body (refused)",
        "the server refuses the event at byte %d of usage.jsonl, "
        "but accepts others; it is left out for good" % begin,
        "the run ends: ok"]


def test_verbose_says_that_the_first_event_is_left_out(home):
    """The event behind it is the proof, and needs a request of its own."""
    home.fill(2)

    backend = home.deliver(*[answers.refuse_events({"s-0"})] * 9)

    left_out = ("the server refuses the event at byte 0 of usage.jsonl, "
                "but accepts others; it is left out for good")
    assert backend.said.count(left_out) == 1
    home.assert_done()


def test_verbose_says_which_refused_event_is_still_pending(home):
    home.fill(1)

    backend = home.deliver(answer(413))

    assert read_messages(backend) == [
        "BATCH: HTTP 413, the server refuses this body (refused)",
        "the server refuses the event at byte 0 of usage.jsonl; "
        "it stays pending, and all behind it (--skip-pending skips them all)",
        "the run ends: server_error" + STAYS]


def allow_100_bytes():
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


@posix_only("Windows has no such limit")
def test_record_of_which_a_part_is_written_stops_the_run(home):
    home.fill(1)

    with home.backend(default=None) as backend:
        result = home.run("-v", options={"preexec_fn": allow_100_bytes})

    assert b"only a part could be written\n" in result.err
    assert backend.connections == 0


def test_verbose_counts_lines_passed_over_around_a_refused_event(home):
    home.append("usage", b"no event\n")
    home.log("usage", 0)
    home.append("usage", b"no event\n" * 2 + b'{"outcome": NaN}\n')
    home.log("usage", 1)

    backend = home.deliver(*[answers.refuse_events({"s-0"})] * 9)

    assert count_passed_over(backend) == 4
    home.assert_done()


def test_run_without_a_readable_log_says_so(home):
    home.fill(1)
    replace_usage_log_by_folder(home)

    assert home.sync() == [NOT_REGULAR % home.path_of("usage.jsonl")]


def test_verbose_names_a_log_that_cannot_be_read_beside_one_that_is_sent(home):
    home.fill(1, 1)
    replace_usage_log_by_folder(home)

    backend = home.deliver()

    assert read_messages(backend) == [
        NOT_REGULAR % home.path_of("usage.jsonl"),
        "BATCH: HTTP 200, code 0 (ok)",
        "the run ends: ok"]


def test_verbose_counts_lines_passed_over(home):
    home.append("usage", b"no event\n\n[1]\n" + line(usage(0)))

    backend = home.deliver()

    assert read_messages(backend) == [
        "BATCH: HTTP 200, code 0 (ok)",
        PASSED_OVER % 2,
        "the run ends: ok"]


def test_verbose_adds_up_the_lines_passed_over(home):
    home.append("usage", b"no event\n" + line(usage(0)))
    home.fill(BATCH)
    home.append("usage", b"no event\n" * 3)

    backend = home.deliver()

    assert read_messages(backend) == [
        "BATCH: HTTP 200, code 0 (ok)",
        "BATCH: HTTP 200, code 0 (ok)",
        PASSED_OVER % 4,
        "the run ends: ok"]


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_prints_to_stderr(home, flag):
    home.fill(1)

    with home.backend() as backend:
        result = home.run(flag)

    said = (
        "secondme_sync: batch of 1 (community mode, %d bytes) to %s: HTTP 200, code 0 (ok)\n"
        "secondme_sync: the run ends: ok\n"
        % (len(backend.requests[0].body), backend.url + secondme_sync.EVENTS_PATH))
    assert result == Result(0, b"", said.encode())


@pytest.mark.parametrize("change, reason", [
    # change of a home with 1 usage event, why a run stops
    pytest.param(lambda home: home.configure(telemetry="off"),
                 'telemetry is off: config says "off"', id="off"),
    pytest.param(Home.log_out,
                 "not logged in: CREDENTIALS does not exist", id="not logged in"),
    pytest.param(lambda home: home.rewrite("usage"),
                 "nothing is pending", id="nothing pending"),
    pytest.param(lambda home: home.configure(baseUrl="http://example.test"),
                 'baseUrl in config is refused: "http://example.test"; '
                 "it must be https://HOST, or http:// with localhost, 127.x.x.x or [::1]; a port "
                 'must be valid; it must have no user, blanks, "?", "#" and no '
                 'characters beyond ASCII', id="refused baseUrl"),
    pytest.param(lambda home: None,
                 "network_error: batch of 1 (community mode, 379 bytes) to %s: the connection "
                 "was refused (ConnectionRefusedError)" % ENDPOINT,
                 id="nothing listens"),
])
def test_verbose_says_why_a_run_stops(home, change, reason):
    home.fill(1)
    change(home)

    result = home.run("-v")

    reason = reason.replace("CREDENTIALS", str(home.path_of("credentials")))
    assert result == Result(0, b"", ("secondme_sync: the run ends: " + reason + "\n").encode())


def test_verbose_says_that_another_run_is_at_work(home, hold):
    home.fill(1)

    with home.backend(hold):
        first = home.spawn()
        assert hold.arrived.wait(20)
        sync = home.run("-v")
        skip = home.run("--skip-pending")
        hold.over.set()
        wait(first)

    assert sync == Result(0, b"", b"secondme_sync: the run ends: another run is at work\n")
    assert skip == Result(1, b"", b"secondme_sync: nothing is skipped: another run is at work\n")


@needs_links
def test_verbose_says_where_progress_cannot_be_recorded(home):
    home.fill(1)
    home.state.symlink_to(home.analytics / "nowhere" / "x")

    with home.backend(default=None):
        result = home.run("-v")

    said = "secondme_sync: the run ends: progress cannot be recorded in %s: %s\n" % (
        home.state, os.strerror(errno.ENOENT))
    assert result == Result(0, b"", said.encode())


@pytest.mark.parametrize("flags, words", [
    # flags, how the message begins
    (["-v"],                     "the run ends"),
    (["--pending", "-v"],        "a run would end"),
    (["--dry-run"],              "nothing would be sent"),
    (["--dry-run", "anonymous"], "nothing would be sent"),
])
def test_state_that_cannot_be_read_is_named(home, flags, words):
    """Else, --dry-run would show what was sent or skipped long ago as pending."""
    home.fill(1)
    home.state.mkdir()

    with home.backend(default=None):
        result = home.run(*flags)

    said = "secondme_sync: %s: %s\n" % (words, NOT_REGULAR % home.state)
    assert result == Result(0, b"no\n" if "--pending" in flags else b"", said.encode())


def test_verbose_says_that_a_log_cannot_be_read(home, monkeypatch):
    """A failing disk under a log is no failure to record."""
    home.fill(1)
    home.deliver(answer(500))
    real_open = open

    class BadDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def readline(self, size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open_badly(path, *args, **kwargs):
        file = real_open(path, *args, **kwargs)
        return BadDisk(file) if str(path).endswith("usage.jsonl") else file

    monkeypatch.setattr("builtins.open", open_badly)
    said = home.sync()
    monkeypatch.undo()

    assert said == ["usage.jsonl cannot be read (%s)" % os.strerror(errno.EIO)]
    assert home.offsets()["usage_bytes"] == 0


@pytest.mark.parametrize("change, words", [
    # what changes while a request is on, what -v says
    pytest.param(Home.log_out, "the token is missing", id="no token"),
    pytest.param(lambda home: home.write("credentials", {"accessToken": "new"}),
                 "the token has changed; what is not accepted stays pending", id="token"),
    pytest.param(lambda home: home.configure(other=1),
                 "config has changed; what is not accepted stays pending", id="config"),
    pytest.param(lambda home: home.write(".device-id", "new"),
                 "the device id has changed; what is not accepted stays pending", id="device id"),
])
def test_verbose_says_what_has_changed(home, change, words):
    home.fill(BATCH + 1)

    backend = home.deliver(answers.then(lambda: change(home)))

    assert backend.said[-1] == words
    assert len(backend.requests) == 1


def test_verbose_says_that_too_little_time_is_left(home):
    home.fill(BATCH + 1)
    clock = FakeClock()

    backend = home.deliver(answers.then(lambda: clock.sleep(25)), clock=clock)

    assert backend.said[-1] == "too little time is left for a request; the next run goes on"
    assert len(backend.requests) == 1


def test_verbose_says_that_time_is_up(home, hold):
    home.fill(1)

    with home.backend(hold):
        result = home.run("-v", "--max-time", "0.5")

    said = b"the run ends: time is up; what got no answer stays pending"
    assert result == Result(0, b"", b"secondme_sync: " + said + b"\n")


def test_verbose_says_that_no_answer_came_in_time(home, hold, monkeypatch):
    home.fill(1)
    monkeypatch.setattr(secondme_sync, "IDLE_SECONDS", 0.2)

    backend = home.deliver(hold)

    name = "TimeoutError" if sys.version_info >= (3, 10) else "timeout"
    assert read_messages(backend) == [
        "network_error: BATCH: no progress for too long (%s)" % name]


def test_verbose_says_that_a_host_was_not_found(home, monkeypatch):
    home.fill(1)
    home.configure(baseUrl="https://nowhere.test")
    monkeypatch.setenv("no_proxy", "*")

    assert home.sync() == [
        "network_error: the host nowhere.test was not found"]


def test_host_that_is_no_name_is_a_network_error(home, monkeypatch):
    """Python cannot even encode it, and raises a ValueError."""
    home.fill(1)
    home.configure(baseUrl="https://no..name.test")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: host.encode("idna"))

    said = home.sync()

    assert re.search(r": no usable answer \(Unicode\w*Error\)$", said[-1])
    assert home.result == "network_error"


def test_verbose_says_that_tls_failed(home, tls_backend):
    home.fill(1)
    home.configure(baseUrl=tls_backend.url)

    said = home.sync()[-1]

    reason = "the certificate of the server is refused: self[ -]signed certificate$"
    if sys.version_info < (3, 7):
        reason = r"TLS failed \(SSLError\)$"
    assert re.search(": " + reason, said)
    assert tls_backend.requests == []


def test_verbose_says_that_a_proxy_refused(home, monkeypatch):
    home.fill(1)
    home.configure(baseUrl="https://example.test")

    with Proxy(refusal=b"HTTP/1.1 407 me:word\r\n\r\n") as proxy:
        monkeypatch.setenv("https_proxy", proxy.url("me:word@"))
        said = home.sync()

    assert said == [
        "network_error: batch of 1 (community mode, 379 bytes) to https://example.test"
        + secondme_sync.EVENTS_PATH + " through the proxy 127.0.0.1:%d: the proxy refused the "
        "tunnel with HTTP 407" % proxy.server_address[1]]


@pytest.mark.parametrize("proxy, name", [
    # https_proxy            what Python raises
    ("http://127.0.0.1:port", "InvalidURL"),
    ("http://",               "ValueError"),
])
def test_verbose_says_that_the_proxy_cannot_be_used(home, monkeypatch, proxy, name):
    home.fill(1)
    home.configure(baseUrl="https://example.test")
    monkeypatch.setenv("https_proxy", proxy)

    assert home.sync() == ["TLS or the proxy cannot be set up (%s)" % name]


def test_verbose_says_that_tls_cannot_be_set_up(home, monkeypatch):
    """As with SSLKEYLOGFILE in a folder that does not exist."""
    home.fill(1)
    home.configure(baseUrl="https://example.test")

    def fail(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, TOKEN)

    monkeypatch.setattr("ssl._create_default_https_context", fail)

    assert home.sync() == ["TLS or the proxy cannot be set up (FileNotFoundError)"]
    assert home.result == "network_error"


# Without a home, ~ or a relative HOME would name a folder of the working directory.

def log_below(folder):
    """Make a .secondme with an event below a folder of any name."""
    home = Home(folder)
    home.fill(1)
    return home


@pytest.mark.parametrize("value, folder", [
    # HOME, the folder that must not be believed
    ("",         "."),
    ("",         "~"),
    ("relative", "relative"),
    (".",        "."),
])
def test_home_that_is_no_absolute_path_is_not_used(tmp_path, value, folder):
    home = log_below(tmp_path / folder)

    with home.backend(default=None):
        process = home.start([sys.executable, str(SCRIPT), "-v"], {"HOME": value},
                             cwd=str(tmp_path))
        result = wait(process)

    said = b"the run ends: there is no home directory: HOME must be an absolute path"
    assert result == Result(0, b"", b"secondme_sync: " + said + b"\n")
    assert home.offsets() is None


def test_status_without_a_home_says_why_it_shows_nothing(home):
    result = wait(home.start([sys.executable, str(SCRIPT), "--status"], {"HOME": ""}))

    assert result == Result(0, b"", b"secondme_sync: nothing can be shown: "
                            b"there is no home directory: HOME must be an absolute path\n")


# Gives the process a user id that has no name.
AS_NAMELESS = AS_NOBODY.replace("65534", "54321")


@pytest.mark.skipif(not POSIX or os.geteuid() != 0, reason="only root can be somebody else")
def test_user_without_home_and_name_is_silent(open_home):
    home = Home(open_home.path / "~")
    home.fill(1)

    result = home.run("-v", shim=AS_NAMELESS, PYTHONPATH=str(ROOT), HOME=None)

    said = b"the run ends: there is no home directory: HOME must be an absolute path"
    assert result == Result(0, b"", b"secondme_sync: " + said + b"\n")


@posix_only("Windows has USERPROFILE")
def test_home_of_the_account_is_used_where_home_is_not_set(home):
    home.fill(1)
    shim = "import pwd, types\npwd.getpwuid = lambda uid: types.SimpleNamespace(pw_dir=%r)"

    with home.backend() as backend:
        assert home.run(shim=shim % str(home.path), HOME=None) == SILENT

    assert backend.sessions == ["s-0"]


def test_home_wins_over_userprofile(home, tmp_path):
    """On Windows, the shell of a skill writes its logs below HOME, which Git Bash sets."""
    home.fill(1)
    other = tmp_path / "profile"
    other.mkdir()

    with home.backend() as backend:
        assert home.run(USERPROFILE=str(other)) == SILENT

    assert backend.sessions == ["s-0"]


# Make os.fstat, which is called for each log, raise an error whose text holds the token.
FAILING_FSTAT = """
import os
def fail(*args):
    raise ValueError("token %s")
os.fstat = fail
""" % TOKEN
UNEXPECTED = b"secondme_sync: an unexpected error (ValueError)\n"


@pytest.mark.parametrize("flags, code, out, said", [
    # flags              code  stdout   said
    ([],                 0,    b"",     b""),
    (["-v"],             0,    b"",     UNEXPECTED),
    (["--background"],   0,    b"",     b""),
    (["--pending"],      0,    b"no\n", b""),
    (["--dry-run"],      0,    b"",     UNEXPECTED),
    (["--status"],       0,    b"",     UNEXPECTED),
    (["--skip-pending"], 1,    b"",     UNEXPECTED),
], ids=lambda value: " ".join(value) or "sync" if isinstance(value, list) else None)
def test_unexpected_error_is_named_by_its_type(home, flags, code, out, said):
    home.fill(1)

    result = home.run(*flags, shim=FAILING_FSTAT)

    assert result == Result(code, out, said)


@pytest.mark.parametrize("error, name", [
    # what a connect raises, what -v names
    ("OSError('{token}')",                         "no usable answer (OSError)"),
    ("OSError(5, '{token}')",                      "no usable answer (OSError)"),
    ("OSError(errno.ENETUNREACH, '{token}')",      "the network cannot be reached (OSError)"),
    ("OSError(errno.EHOSTUNREACH, '{token}')",     "the network cannot be reached (OSError)"),
    ("OSError('Tunnel connection failed {token}')", "no usable answer (OSError)"),
    ("http.client.HTTPException('{token}')",       "no usable answer (HTTPException)"),
    ("ssl.SSLError(1, '{token}')",                 "TLS failed (SSLError)"),
    ("RuntimeError('{token}')",                    "an unexpected error (RuntimeError)"),
    ("UnicodeError('{token}')",                    "no usable answer (UnicodeError)"),
])
def test_text_of_a_foreign_exception_is_not_printed(home, error, name):
    home.fill(1)
    shim = "\n".join([
        "import errno, http.client, socket, ssl",
        "def fail(*args):",
        "    raise " + error.format(token=TOKEN),
        "socket.create_connection = fail"])

    result = home.run("-v", shim=shim)

    assert result.code == 0
    assert TOKEN.encode() not in result.err
    assert result.err.decode().endswith(name + "\n")
    assert result.err.count(b"\n") == 1


def test_version_is_printed(home):
    assert home.run("--version").out.split() == [b"secondme_sync", secondme_sync.VERSION.encode()]


@pytest.fixture
def help_text(home):
    result = home.main("--help", COLUMNS="80")
    assert result.code == 0
    assert result.err == b""
    return result.out.decode("ascii").replace("\r\n", "\n")


def test_help_begins_with_the_name_of_the_program(help_text):
    assert help_text.startswith("usage: secondme_sync [flags]")


def test_help_says_where_events_are_sent(help_text):
    description = help_text.split("\n\n")[1]

    assert description.startswith("Send the usage and feedback events")
    assert secondme_sync.BASE_URL + secondme_sync.EVENTS_PATH in description


@pytest.mark.parametrize("flag", [
    "--dry-run [MODE]", "--status", "--pending", "--skip-pending", "--background", "--max-time S",
    "--dir DIR", "--base-url URL", "-v, --verbose", "--version", "-h, --help"])
def test_help_names_each_flag(help_text, flag):
    assert re.search(r"(?m)^  %s( |$)" % re.escape(flag), help_text)


def test_help_names_the_exit_codes(help_text):
    paragraph, = re.findall(r"(?ms)^exit code.*?$\n\n", help_text)

    assert sorted(re.findall(r"\b\d+\b", paragraph)) == ["0", "1", "2"]


def test_help_names_the_environment(help_text):
    names = re.findall(r'environ\.get\("(\w+)"', SCRIPT.read_text(encoding="ascii"))

    assert "SM_TEL" in names
    assert [name for name in names if name not in help_text + "HOME, which is ~"] == []


@pytest.mark.parametrize("flags", [
    ["--unknown"], ["word"], ["--max-time", "soon"], ["--max-time", "0"], ["--max-time", "-5"],
    ["--max-time", "nan"], ["--max-time", "inf"], ["--max-time", "-inf"],
    ["--max-time", str(secondme_sync.MAX_RUN_SECONDS + 1)], ["--max-time"], ["--dir"],
    ["--dir", ""], ["--dir="], ["--base-url"], ["--skip"], ["--dry"], ["--stat"], ["--pend"],
    ["--back"], ["--verb"], ["--max", "5"], ["--pending", "--status"],
    ["--background", "--skip-pending"], ["--dry-run", "off"], ["--dry-run", "--skip-pending"],
], ids=" ".join)
def test_misuse_exits_with_2_and_does_nothing(home, flags):
    home.fill(1)
    before = home.snapshot()

    result = home.main(*flags)

    assert result.code == 2
    assert result.out == b""
    assert b"usage: " in result.err
    assert home.snapshot() == before


@pytest.mark.parametrize("flags, words", [
    # flags, what is said
    (["--max-time", "0"], b"error: --max-time must be above 0, and 86400 (a day) at most\n"),
    (["--dir", ""], b"error: --dir must name a directory\n"),
])
def test_misuse_says_what_is_wrong(home, flags, words):
    assert words in home.main(*flags).err


def test_max_time_of_a_day_is_taken(home):
    assert secondme_sync.MAX_RUN_SECONDS == 24 * 60 * 60
    assert home.main("--status", "--max-time", "86400").code == 0


# In the background.

# Runs the script as if it had been pasted, after a shim: it has no __file__.
AS_PASTED = """
with open(sys.argv[0], encoding="ascii") as file:
    source = file.read()
exec(compile(source, "<stdin>", "exec"), {"__name__": "__main__"})
"""
FORMS = [
    pytest.param("", id="file"),
    pytest.param(AS_PASTED, id="pasted",
                 marks=posix_only("pasted on Windows, it works in the foreground")),
]
needs_bash = pytest.mark.skipif(not POSIX or not shutil.which("bash"), reason="no bash")


def heredoc(flags):
    """Return a shell command that runs the script out of a heredoc."""
    return "%s -I - %s <<'SYNC_EOF'\n%sSYNC_EOF\n" % (
        shlex.quote(sys.executable), flags, SCRIPT.read_text(encoding="ascii"))


@pytest.mark.parametrize("form", FORMS)
def test_background_returns_before_the_answer(home, hold, form):
    home.fill(1)

    def answer_late(handler):
        hold(handler)
        handler.reply(*OK)

    with home.backend(answer_late) as backend:
        assert home.run("--background", shim=form) == SILENT
        assert hold.arrived.wait(20)
        assert home.result == "network_error"
        hold.over.set()
        until(lambda: home.result == "ok")

    assert backend.sessions == ["s-0"]


@posix_only("Windows has no process groups")
@pytest.mark.parametrize("form", FORMS)
def test_background_works_for_the_leader_of_a_session(home, form):
    """As a program is that a terminal has started. Such a process cannot make a session."""
    home.fill(1)

    with home.backend() as backend:
        assert home.run("--background", shim=form, options={"start_new_session": True}) == SILENT
        until(lambda: home.result == "ok")

    assert backend.sessions == ["s-0"]


@pytest.mark.parametrize("form", FORMS)
def test_verbose_says_that_a_run_is_started_in_the_background(home, form):
    home.fill(1)

    with home.backend() as backend:
        result = home.run("--background", "-v", shim=form)
        until(lambda: home.result == "ok")

    assert result.err == b"secondme_sync: a new process goes on; --status shows the last result\n"
    assert backend.sessions == ["s-0"]


@posix_only("Windows has no descriptors to inherit")
@pytest.mark.parametrize("form", FORMS)
def test_background_keeps_no_pipe_of_its_caller(home, hold, form):
    """Else a caller that reads the pipe to its end would wait for the upload."""
    home.fill(1)
    begin, end = os.pipe()

    with home.backend(hold):
        home.run("--background", shim=form, options={"pass_fds": [end]})
        os.close(end)
        assert hold.arrived.wait(20)
        os.set_blocking(begin, False)
        # BlockingIOError: the new process has the other end.
        assert os.read(begin, 1) == b""
        hold.over.set()
        until(lambda: home.result == "network_error")
    os.close(begin)


# Two callers of a hook, which end what they have started the moment it returns: one kills its
# process group, one closes its terminal by leaving the session that owns it.
CALLERS = {
    "kills its group": """
import os, signal, subprocess, sys
os.setsid()
subprocess.call(sys.argv[1:])
os.killpg(0, signal.SIGKILL)
""",
    "closes its terminal": """
import os, pty, subprocess, sys
child, terminal = pty.fork()
if child == 0:
    subprocess.call(sys.argv[1:])
    os._exit(0)
os.waitpid(child, 0)
os.close(terminal)
""",
}


@posix_only("Windows has no process groups")
@pytest.mark.parametrize("command", [
    pytest.param([sys.executable, "-I", str(SCRIPT), "--background"], id="from Python"),
    pytest.param(["sh", "-c", '"$0" -I "$1" --background 2>/dev/null || true',
                  sys.executable, str(SCRIPT)], id="from sh"),
    pytest.param(["bash", "-c", heredoc("--background")], id="pasted", marks=needs_bash),
])
@pytest.mark.parametrize("caller", sorted(CALLERS))
def test_background_outlives_its_caller(tmp_path, caller, command):
    """Agents end a hook's process group, or close its terminal, when the hook returns."""
    names = ["s-%d" % number for number in range(5)]

    with FakeBackend() as backend:
        homes = [Home(tmp_path / name, backend.url) for name in names]
        for number, home in enumerate(homes):
            home.log("usage", number)
        callers = [home.start([sys.executable, "-c", CALLERS[caller]] + command)
                   for home in homes]
        for process in callers:
            wait(process)
        # If some are lost, the assertion below says which.
        with contextlib.suppress(AssertionError):
            until(lambda: [home.result for home in homes] == ["ok"] * 5)

    assert sorted(backend.sessions) == names


# The new process is slow to make its session.
SLOW_SETSID = """
import os, time
real_setsid = os.setsid
def setsid():
    time.sleep(0.3)
    real_setsid()
os.setsid = setsid
"""


@posix_only("Windows has no fork")
def test_pasted_background_waits_for_its_session(home):
    """Else a caller that ends its group at once would end the new process too."""
    home.fill(1)
    command = [sys.executable, "-c", LAUNCH % (SLOW_SETSID + AS_PASTED), str(SCRIPT),
               "--background"]

    with home.backend() as backend:
        wait(home.start([sys.executable, "-c", CALLERS["kills its group"]] + command))
        until(lambda: home.result == "ok")

    assert backend.sessions == ["s-0"]


@needs_bash
@pytest.mark.parametrize("text", [
    pytest.param('"$0" -I /dev/stdin --background < "$1"', id="/dev/stdin"),
    pytest.param('"$0" -I <(cat "$1") --background', id="process substitution"),
    pytest.param('(exec -a nowhere "$0" -I "$1" --background)', id="python has no path"),
    pytest.param('mkdir gone && cd gone && rmdir ../gone && "$0" -I - --background < "$1"',
                 id="working directory is gone"),
])
def test_background_works_however_it_is_started(home, text):
    home.fill(1)

    with home.backend() as backend:
        process = home.start(["bash", "-c", text, sys.executable, str(SCRIPT)])
        assert wait(process) == SILENT
        until(lambda: home.result == "ok")

    assert backend.sessions == ["s-0"]


# Writes what a process is like to the file that RECORDING names.
RECORD = """
import json, os, sys
facts = {
    "arguments": sys.argv[1:],
    "session": os.getsid(0),
    "process": os.getpid(),
    "folder": os.path.realpath(os.getcwd()),
    "null streams": [os.path.samestat(os.fstat(number), os.stat(os.devnull))
                     for number in range(3)],
}
with open(os.environ["RECORDING"] + ".new", "w") as file:
    json.dump(facts, file)
os.rename(os.environ["RECORDING"] + ".new", os.environ["RECORDING"])
"""

RECORD_AT_CONNECT = """
import socket
record = %r
socket.create_connection = lambda *args: exec(record, {})
"""


def record_background(home, form, *flags):
    """Run --background; return the facts of RECORD about the new process.

    The file starts a Python, for which a recorder stands in. Pasted, the new process is a copy
    of the first; it records where it would connect.
    """
    recording = home.path / "recording"
    if form == AS_PASTED:
        shim = RECORD_AT_CONNECT % RECORD + AS_PASTED
    else:
        recorder = home.path / "recorder.py"
        recorder.write_text(RECORD)
        python = home.path / "python3"
        python.write_text('#!/bin/sh\nexec %s %s "$@"\n' % (
            shlex.quote(sys.executable), shlex.quote(str(recorder))))
        python.chmod(0o755)
        shim = "sys.executable = %r" % str(python)
    home.fill(1)
    result = home.run("--background", *flags, shim=shim, RECORDING=str(recording),
                      options={"stdin": subprocess.PIPE})
    assert result == SILENT
    until(recording.exists)
    return json.loads(recording.read_text())


@posix_only("Windows has no sessions")
@pytest.mark.parametrize("form", FORMS)
def test_background_process_lets_go_of_its_caller(home, form):
    facts = record_background(home, form)

    assert facts["session"] != os.getsid(0)
    assert facts["null streams"] == [True, True, True]
    assert facts["folder"] == os.path.realpath(str(home.dir))


@posix_only("Windows has no fork")
def test_pasted_background_process_does_not_lead_its_session(home):
    """Only a leader that opens a terminal would get it as its own."""
    facts = record_background(home, AS_PASTED)

    assert facts["session"] != facts["process"]


@posix_only("needs /bin/sh")
def test_background_passes_its_flags_on(home):
    facts = record_background(
        home, "", "--max-time", "7", "--base-url", "https://example.test", "--dir", ".secondme")

    assert facts["arguments"] == [
        "-I", str(SCRIPT), "--dir", str(home.dir), "--base-url", "https://example.test",
        "--max-time", "7.0"]


@pytest.mark.parametrize("form", FORMS)
def test_background_uses_dir_and_base_url(home, form):
    other = Home(home.path / "other")
    other.configure(baseUrl=None)
    other.log("usage", 3)

    with FakeBackend() as backend:
        assert home.run("--background", "--dir", str(other.dir), "--base-url", backend.url,
                        shim=form) == SILENT
        until(lambda: other.result == "ok")

    assert backend.sessions == ["s-3"]


@pytest.mark.parametrize("form", FORMS)
def test_background_run_ends_with_max_time(home, hold, form):
    """A watched lock tells that the process has gone."""
    home.fill(1)

    with home.backend(hold, OK) as backend:
        assert home.run("--background", "--max-time", "0.5", shim=form) == SILENT
        assert hold.arrived.wait(20)
        until(lambda: home.run() == SILENT and len(backend.requests) == 2)

    assert backend.sessions == ["s-0", "s-0"]


# A thread that runs from the start, as some sitecustomize has it. Python 3.12 and newer warn of a
# fork beside it; let the others do so too.
RUNNING_THREAD = """
import os, threading, time, warnings
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
real_fork = os.fork if hasattr(os, "fork") else None
def fork():
    warnings.warn("a fork beside threads", DeprecationWarning, stacklevel=2)
    return real_fork()
os.fork = fork
"""


@pytest.mark.parametrize("warnings", ["default", "error"])
@pytest.mark.parametrize("form", FORMS)
def test_background_beside_a_running_thread_is_silent(home, form, warnings):
    home.fill(1)

    with home.backend() as backend:
        result = home.run("--background", shim=RUNNING_THREAD + form, PYTHONWARNINGS=warnings)
        assert result == SILENT
        until(lambda: home.result == "ok")

    assert backend.sessions == ["s-0"]


# Prints, at the end of the script, which costly modules it has loaded, and whether it forked.
REPORT_MODULES = """
import os
costly = {"argparse", "http.client", "socket", "ssl", "subprocess", "urllib.request"}
costly -= set(sys.modules)
end = os._exit
def report(code):
    os.write(1, " ".join(sorted(costly & set(sys.modules))).encode())
    end(code)
os._exit = report
os.fork = lambda: os.write(1, b"forked ")
"""


@pytest.mark.parametrize("change", [
    pytest.param(lambda home: home.configure(telemetry="off"), id="off"),
    pytest.param(Home.log_out, id="not logged in"),
    pytest.param(Home.write_state_of_reference_script, id="nothing pending"),
])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [[], ["--background"]], ids=["sync", "background"])
def test_start_with_nothing_to_do_is_cheap(home, flags, form, change):
    home.fill(1)
    change(home)

    assert home.run(*flags, shim=REPORT_MODULES + form) == SILENT


@pytest.fixture
def started_on_windows(monkeypatch):
    """What start_detached() would start on Windows: (arguments, creation flags) of each call."""
    calls = []

    class Popen:
        def __init__(self, command, cwd, creationflags):
            calls.append((command, creationflags))
            if creationflags & BREAKAWAY and JOB_FORBIDS_BREAKAWAY in command:
                raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "Popen", Popen)
    return calls


BREAKAWAY = 0x1000000  # CREATE_BREAKAWAY_FROM_JOB
DETACHED = 0x8 | 0x200  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
JOB_FORBIDS_BREAKAWAY = "--in-a-job-that-forbids-it"


def test_background_leaves_the_job_of_its_caller_on_windows(started_on_windows):
    """An agent may keep a hook in a job object that kills all its processes when it is closed."""
    secondme_sync.start_detached(["python"], ".")

    assert started_on_windows == [(["python"], DETACHED | BREAKAWAY)]


def test_background_stays_in_a_job_that_forbids_to_leave(started_on_windows):
    secondme_sync.start_detached(["python", JOB_FORBIDS_BREAKAWAY], ".")

    assert [flags for command, flags in started_on_windows] == [DETACHED | BREAKAWAY, DETACHED]


@needs_bash
def test_pasted_background_lets_go_of_inherited_descriptors(home):
    """Whoever reads what it has inherited sees the end before the answer comes."""
    home.fill(1)
    released = threading.Event()
    with home.backend(lambda handler: released.wait(30) and handler.reply(*OK)):
        home.paste("- --background 3>&1 <<'SYNC_EOF'")
        released.set()
        until(lambda: home.result == "ok")


# Streams, locale, warnings, signals.

@posix_only("Windows has no /bin/sh to close streams")
@pytest.mark.parametrize("closed, flags, sent", [
    # streams         flags           sent
    ("<&-",           "",             ["s-0"]),
    ("2>&-",          "-v",           ["s-0"]),
    ("<&- >&- 2>&-",  "",             ["s-0"]),
    ("<&- >&- 2>&-",  "-v",           ["s-0"]),
    ("<&- >&- 2>&-",  "--background", ["s-0"]),
    (">&-",           "--dry-run",    []),
    ("2>&-",          "--dry-run",    []),
    (">&-",           "--status",     []),
    (">&-",           "--pending",    []),
])
def test_closed_streams_do_no_harm(home, closed, flags, sent):
    home.fill(1)

    with home.backend() as backend:
        command = ["sh", "-c", 'exec "$0" "$@" ' + closed, sys.executable, str(SCRIPT)]
        result = wait(home.start(command + flags.split()))
        if sent:
            until(lambda: home.result == "ok")

    assert result.code == 0
    assert b"Traceback" not in result.err
    assert backend.sessions == sent


@contextlib.contextmanager
def unwritable(kind):
    """Yield the descriptor of a stream that takes nothing."""
    if kind == "closed pipe":
        begin, end = os.pipe()
        os.close(begin)
    elif os.path.exists("/dev/full"):
        end = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("no /dev/full here")
    yield end
    os.close(end)


@pytest.mark.parametrize("kind, unbuffered", [
    ("closed pipe", ""),
    ("closed pipe", "1"),
    ("full disk",   ""),
])
@pytest.mark.parametrize("stream, flag", [
    ("stderr", "-v"),
    ("stderr", "--dry-run"),
    ("stdout", "--dry-run"),
    ("stdout", "--status"),
    ("stdout", "--pending"),
    ("stdout", "--skip-pending"),
])
def test_stream_that_takes_nothing_does_no_harm(home, stream, flag, kind, unbuffered):
    home.fill(1)

    with unwritable(kind) as end, home.backend() as backend:
        result = home.run(flag, options={stream: end}, PYTHONUNBUFFERED=unbuffered)

    assert result.code == 0
    assert b"Traceback" not in (result.err or b"")
    assert b"Exception" not in (result.err or b"")
    assert backend.sessions == (["s-0"] if flag == "-v" else [])


@posix_only("there is no /dev/full")
def test_dry_run_into_a_full_disk_says_so(home):
    home.fill(1)

    with unwritable("full disk") as end:
        result = home.run("--dry-run", options={"stdout": end})

    assert result.err.decode().splitlines()[-1] == (
        "secondme_sync: an unexpected error (%s)" % os.strerror(errno.ENOSPC))


def test_dry_run_into_head_prints_no_error(home):
    home.fill(50 * BATCH)

    process = home.spawn("--dry-run")
    process.stdout.read(10)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()

    assert process.wait(20) == 0
    assert said.count(b"\n") == 1


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--status"], ["-v"]],
                         ids=lambda flags: " ".join(flags) or "sync")
def test_locale_without_utf8_does_no_harm(home, flags):
    home.fill(1, 1)
    locale = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    with home.backend() as backend:
        result = home.run(*flags, **locale)
        assert home.run(**locale) == SILENT

    assert result.code == 0
    assert b"Error" not in result.err
    assert backend.events()[0]["user_intent"] == usage(0)["user_intent"]
    home.assert_done()


STRICT = [sys.executable, "-X", "dev", "-W", "error", str(SCRIPT)]


@pytest.mark.parametrize("reply", [
    pytest.param(OK, id="ok"),
    pytest.param(answer(500), id="500"),
    pytest.param(answer(429, Retry_After=0), id="retried"),
    pytest.param(answer(200, b" " * 200000), id="long answer"),
    pytest.param(DROP, id="no answer"),
    pytest.param(answer(401), id="401"),
    pytest.param(answer(400), id="refused"),
])
def test_strictest_python_prints_nothing(home, reply):
    sent = home.fill(BATCH + 50, 1)

    with home.backend(OK, reply) as backend:
        for _ in range(2):
            process = home.start(STRICT, {"PYTHONWARNDEFAULTENCODING": "1"})
            assert wait(process) == SILENT

    assert set(backend.sessions) == set(sent)
    home.assert_done()


@pytest.mark.parametrize("flags", [
    ["--pending"], ["--background"], ["--dry-run"], ["--dry-run", "anonymous"], ["--status"],
    ["--skip-pending"], ["--version"], ["--help"]], ids=" ".join)
def test_strictest_python_warns_of_no_action(home, flags):
    home.fill(1)

    with home.backend():
        result = wait(home.start(STRICT + flags, {"PYTHONWARNDEFAULTENCODING": "1"}))
        if flags == ["--background"]:
            until(lambda: home.result == "ok")

    assert result.code == 0
    assert b"Warning" not in result.err
    assert b"Error" not in result.err


def reset_signals():
    """Undo what a CI may have done: signals have their default action."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@posix_only("Windows has no signals to end a process by")
@pytest.mark.parametrize("names, code", [
    (["SIGINT"],            -2),
    (["SIGINT", "SIGINT"],  -2),
    (["SIGTERM"],           -15),
    (["SIGHUP"],            -1),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
@pytest.mark.parametrize("phase", ["answer", "retry"])
def test_signal_ends_a_waiting_run_silently(home, hold, names, code, phase):
    sent = home.fill(BATCH + 50)
    reply = hold
    if phase == "retry":
        reply = answers.then(hold.arrived.set, answer(429, Retry_After=10))

    with home.backend(OK, reply) as backend:
        run = home.spawn(options={"preexec_fn": reset_signals})
        assert hold.arrived.wait(20)
        if phase == "retry":
            # Until the answer is read, and the wait has begun.
            time.sleep(0.2)
        for name in names:
            run.send_signal(getattr(signal, name))
        assert wait(run, 8) == (code, b"", b"")
        assert len(backend.requests) == 2

    assert home.result == "network_error"
    assert home.completed == [0, 0]
    assert home.deliver().sessions == sent[BATCH:]
    home.assert_done()


# Ctrl-C where a log is opened, and where a module is imported.
CTRL_C_AT_LOG = """
import os, signal
os.fstat = lambda *args: os.kill(os.getpid(), signal.SIGINT)
"""
CTRL_C_AT_IMPORT = """
import builtins, os, signal
real_import = builtins.__import__
def import_module(name, *args):
    if name == "{module}":
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return real_import(name, *args)
builtins.__import__ = import_module
"""


@posix_only("Windows has no signals to end a process by")
@pytest.mark.parametrize("flags", [
    [], ["-v"], ["--background"], ["--dry-run"], ["--status"], ["--pending"], ["--skip-pending"],
], ids=lambda flags: " ".join(flags) or "sync")
def test_ctrl_c_ends_every_action(home, flags):
    home.fill(1)

    result = home.run(*flags, shim=CTRL_C_AT_LOG, options={"preexec_fn": reset_signals})

    assert result == Result(-2, b"", b"")


@posix_only("Windows has no signals to end a process by")
@pytest.mark.parametrize("module, flags", [
    ("io",             []),
    ("json",           []),
    ("zlib",           []),
    ("http.client",    []),
    ("urllib.parse",   ["--status"]),
    ("argparse",       ["--pending"]),
    ("subprocess",     ["--background"]),
    ("zlib",           ["--skip-pending"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_ctrl_c_while_modules_are_imported_is_silent(home, module, flags):
    home.fill(1)

    result = home.run(*flags, shim=CTRL_C_AT_IMPORT.format(module=module),
                      options={"preexec_fn": reset_signals})

    assert result == Result(-2, b"", b"")


@posix_only("Windows has no signals to ignore")
def test_inherited_ignore_of_ctrl_c_stays(home, hold):
    home.fill(1)

    def answer_late(handler):
        hold(handler)
        handler.reply(*OK)

    with home.backend(answer_late) as backend:
        run = home.spawn(options={
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)})
        assert hold.arrived.wait(20)
        run.send_signal(signal.SIGINT)
        hold.over.set()
        assert wait(run) == SILENT

    assert backend.sessions == ["s-0"]
    home.assert_done()


# The file: pasted, vendored, imported, scanned.

@needs_bash
@pytest.mark.parametrize("command", [
    "- <<'SYNC_EOF'", "<<'SYNC_EOF'", "<< 'SYNC_EOF'", "-I - <<'SYNC_EOF'", "<<SYNC_EOF",
    "- --max-time 20 <<SYNC_EOF", "- --background <<'SYNC_EOF'"])
def test_pasted_script_syncs(home, command):
    sent = home.fill(BATCH + 1)

    with home.backend(OK, OK, default=None) as backend:
        assert home.paste(command) == SILENT
        until(lambda: home.result == "ok")

    assert backend.sessions == sent


@needs_bash
@pytest.mark.parametrize("flag", [
    "--dry-run", "--pending", "--status", "--skip-pending", "--help", "--unknown"])
@pytest.mark.parametrize("quotes", ["'", ""], ids=["quoted", "not quoted"])
def test_pasted_script_takes_flags_as_the_file_does(home, flag, quotes):
    """Where the word of the heredoc is not quoted, the shell expands what the script holds."""
    home.fill(1)

    pasted = home.paste("- %s <<%sSYNC_EOF%s" % (flag, quotes, quotes))
    with contextlib.suppress(FileNotFoundError):
        home.state.unlink()

    assert pasted == home.run(flag)


@needs_bash
@pytest.mark.parametrize("name", ["json", "http", "calendar", "socket", "signal"])
def test_pasted_script_imports_nothing_from_the_working_directory(home, name):
    home.fill(1)
    (home.path / (name + ".py")).write_text("print('mine')\nraise SystemExit(3)\n")

    with home.backend() as backend:
        assert home.paste("<<'SYNC_EOF'") == SILENT

    assert backend.sessions == ["s-0"]


@needs_bash
def test_pasted_script_starts_no_file_of_the_working_directory(home):
    """Python says that a pasted script is in a file named <stdin>."""
    home.fill(1)
    (home.path / "<stdin>").write_text("open('started', 'w')\n")

    with home.backend() as backend:
        assert home.paste("- --background <<'SYNC_EOF'") == SILENT
        until(lambda: home.result == "ok")

    assert backend.sessions == ["s-0"]
    assert not list(home.path.rglob("started"))


def test_vendored_copy_does_the_same(home):
    home.fill(1)
    copy = home.path / "skill scripts" / "telemetry.py"
    copy.parent.mkdir()
    shutil.copy(str(SCRIPT), str(copy))

    result = wait(home.start([sys.executable, "-I", str(copy), "--dry-run"]))

    assert result == home.run("--dry-run")


def test_module_does_the_same(home):
    home.fill(1)
    command = [sys.executable, "-m", "secondme_sync", "--dry-run"]

    result = wait(home.start(command, cwd=str(ROOT)))

    assert result == home.run("--dry-run")


# Prints what is global to the process, before and after an import of the script.
IMPORT = """
import json, os, signal, sys, threading, warnings
def look():
    signals = [name for name in dir(signal) if name.startswith("SIG") and name[3] != "_"]
    return {
        "excepthook": sys.excepthook is sys.__excepthook__,
        "handlers": [str(signal.getsignal(getattr(signal, name))) for name in signals],
        "path": list(sys.path),
        "threads": threading.active_count(),
        "warnings": [str(entry) for entry in warnings.filters],
        "folder": os.getcwd(),
    }
sys.path.insert(0, "")
before = look()
import secondme_sync
print(json.dumps([before, look()]))
"""


def test_importing_has_no_effect(home):
    home.fill(1)
    files = home.snapshot()

    result = wait(home.start([sys.executable, "-c", IMPORT], cwd=str(ROOT)))

    assert result.err == b""
    before, after = json.loads(result.out.decode("utf-8"))
    assert after == before
    assert home.snapshot() == files


def test_network_modules_are_not_imported_with_the_script(home):
    command = "import sys; before = set(sys.modules); import secondme_sync; print(" \
        "sorted({'socket', 'ssl', 'http', 'subprocess', 'argparse'} & set(sys.modules) - before))"

    result = wait(home.start([sys.executable, "-c", command], cwd=str(ROOT)))

    assert result.out.split() == [b"[]"]


@pytest.fixture(scope="module")
def source():
    """The text of the script, without any translation of line ends."""
    return SCRIPT.read_bytes().decode("latin-1")


@pytest.mark.parametrize("harmful", [
    pytest.param(r"[^\n -~]", id="not ASCII, tab or CR"),
    pytest.param(r"\$", id="dollar"),
    pytest.param(r"`", id="backtick"),
    pytest.param(r"(?m)^\s*SYNC_EOF\s*$", id="line SYNC_EOF"),
    pytest.param(r'\\\\|(?<!""")\\\n', id="backslash that a heredoc eats"),
    pytest.param(r"[^\n]\Z", id="no newline at the end"),
])
def test_file_holds_nothing_that_pasting_would_harm(source, harmful):
    assert re.findall(harmful, source) == []


@pytest.mark.parametrize("refused", [
    pytest.param(r"os\.environ(?!\.get\(\"[A-Z_]+\"[,)]).*", id="os.environ as a whole"),
    pytest.param(r"\b(?:getenv|putenv|environb|expandvars)\b", id="other ways to it"),
    pytest.param(r"from os import.*", id="names of os"),
    pytest.param(r"\\x[0-9a-fA-F]{2}", id="hex-escaped bytes"),
    pytest.param(r"\bexecl?v?p?e?\b\(?", id="exec"),
    pytest.param(r"\beval\(", id="eval"),
    pytest.param(r"(?i)access[ _-]token", id="access token"),
    pytest.param(r"excepthook", id="excepthook"),
])
def test_file_holds_nothing_that_scanners_refuse(source, refused):
    """Skill hubs scan what may be installed, comments too."""
    assert re.findall(refused, source) == []


def test_environment_is_read_by_literal_names(source):
    tree = ast.parse(source)
    names = [part for part in ast.walk(tree)
             if isinstance(part, ast.Attribute) and part.attr == "environ"]
    reads = [part for part in ast.walk(tree)
             if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute)
             and part.func.value in names]

    assert len(names) == len(reads)
    assert {part.func.attr for part in reads} == {"get"}
    for part in reads:
        assert isinstance(ast.literal_eval(part.args[0]), str)


@pytest.mark.skipif(sys.version_info < (3, 8), reason="ast knows no older grammar there")
def test_file_has_the_grammar_of_python_3_6(source):
    ast.parse(source, feature_version=(3, 6))


# The fake backend as a program.

FAKE_BACKEND = str(ROOT / "fixtures" / "fake_backend.py")


class BackendProgram:
    """fake_backend.py in a process of its own; url is the baseUrl that it prints."""

    def __init__(self, home, *words):
        self.home = home
        self.process = home.start([sys.executable, "-u", FAKE_BACKEND] + list(words),
                                  cwd=str(ROOT), stderr=subprocess.STDOUT)
        self.url = self.read().split()[1]
        home.configure(baseUrl=self.url)

    def read(self):
        """Return the next line that it prints."""
        return self.process.stdout.readline().decode("utf-8").strip()

    def end(self):
        self.process.kill()
        wait(self.process)


@pytest.fixture
def start_backend(home):
    """A function that starts a BackendProgram, which ends with the test."""
    started = []

    def start(*words):
        started.append(BackendProgram(home, *words))
        return started[-1]

    yield start
    for program in started:
        program.end()


@pytest.mark.parametrize("words, replies", [
    (["503", "429", "ok"], ["503", "429", "200"]),
    (["drop", "200"],      ["drop", "200"]),
    ([],                   ["200"]),
], ids=lambda value: " ".join(value))
def test_program_answers_in_turn(home, start_backend, words, replies):
    home.log("usage", 1)

    program = start_backend(*words)
    while home.result != "ok":
        home.sync()

    assert [program.read().split(" -> ")[1] for _ in replies] == replies


def test_program_describes_each_request(home, start_backend):
    program = start_backend()
    home.log("usage", 1, 2)
    home.sync()

    described = program.read()

    assert described.startswith("POST /gate/lab" + secondme_sync.EVENTS_PATH)
    assert ", token): community mode, 2 events, deviceId: " in described
    assert "user_intent" in described
    assert TOKEN not in described


@pytest.mark.parametrize("path, headers, status", [
    # path           headers                        status
    ("",             {"Authorization": "Bearer x"}, 404),
    (None,           {},                            401),
], ids=["another path", "no token"])
def test_program_refuses_what_is_no_sync(start_backend, path, headers, status):
    program = start_backend()
    path = secondme_sync.EVENTS_PATH if path is None else path
    request = urllib.request.Request(program.url + path, b"{}", headers)

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)

    refused.value.close()
    assert refused.value.code == status
    assert program.read().endswith("no telemetry body -> %d" % status)


def test_program_says_that_a_port_is_taken(home, start_backend):
    port = start_backend().url.split(":")[2].split("/")[0]

    result = wait(home.start([sys.executable, FAKE_BACKEND, "--port", port]))

    assert result.code == 1
    assert result.out == b""
    assert ("port %s cannot be had: " % port).encode() in result.err
    assert b"Traceback" not in result.err


@pytest.mark.parametrize("words", [
    ["maybe"], ["199"], ["600"], ["-1"], ["--port", "x"]], ids=" ".join)
def test_program_refuses_words_it_does_not_know(home, words):
    result = wait(home.start([sys.executable, FAKE_BACKEND] + words))

    assert result.code == 2
    assert result.out == b""
    assert b"usage: " in result.err


# The README: its commands are run word for word, its tables compared.

README = (ROOT / "README.md").read_text(encoding="utf-8")
def blocks(language):
    """Return the README's blocks of code in a language."""
    return re.findall("^```%s\n(.*?)^```$" % language, README, re.S | re.M)


def block_with(words):
    """Return the one bash block that holds some words, with the script where it goes."""
    found = [text for text in blocks("bash") if words in text]
    assert len(found) == 1
    source = SCRIPT.read_text(encoding="ascii")
    return re.sub("^# the content of .*\n", lambda match: source, found[0], flags=re.M)


def section(title):
    """Return the text below a heading, up to the next one of its level or above."""
    level, text = re.search("^(#+) %s\n(.*)" % re.escape(title), README, re.S | re.M).groups()
    return re.split("^#{1,%d} " % len(level), text, maxsplit=1, flags=re.M)[0]


def table_rows(text):
    """Return the cells of the rows of the tables in a text, without their headings."""
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")]
            for row in re.findall(r"^\|.*\|$", text, re.M)]
    rules = [number for number, row in enumerate(rows) if set("".join(row)) <= set("-|")]
    headings = [number - 1 for number in rules]
    return [row for number, row in enumerate(rows) if number not in rules + headings]


def code(cell):
    """Return the parts of a cell in backticks."""
    return re.findall("`([^`]+)`", cell)


@needs_bash
@pytest.mark.parametrize("events, said", [
    # usage events, what the block prints
    (0, b"HAS_PENDING_SYNC: no\n"),
    (1, b"HAS_PENDING_SYNC: yes\n"),
])
def test_preflight_block_prints_yes_or_no(machine, events, said):
    machine.fill(events)
    result = machine.shell(block_with("--pending "))
    assert result == (0, said, b"")


@needs_bash
def test_preflight_block_says_that_the_script_is_missing(machine):
    (machine.path / ".claude" / "skills").rename(machine.path / "elsewhere")
    result = machine.shell(block_with("--pending "))
    assert result.out.startswith(b"HAS_PENDING_SYNC: no (python3 cannot run ")


@needs_bash
def test_preflight_block_says_that_python_is_missing(machine):
    result = machine.shell(block_with("--pending "), path="/nowhere")
    assert result.out.startswith(b"HAS_PENDING_SYNC: no (python3 cannot run ")


@needs_bash
@pytest.mark.parametrize("words", [
    pytest.param('"$SYNC" --background', id="background catch-up"),
    pytest.param('"$SYNC" --base-url', id="post-session sync"),
    pytest.param("SYNC_EOF", id="heredoc"),
    pytest.param(None, id="hook"),
])
def test_blocks_for_skills_deliver_in_silence(machine, words):
    sent = machine.fill(3)
    if words:
        text = block_with(words)
    else:
        hook = json.loads([text for text in blocks("json") if "hooks" in text][0])
        text = hook["hooks"]["SessionEnd"][0]["hooks"][0]["command"]

    with machine.backend() as backend:
        assert machine.shell(text) == SILENT
        until(lambda: machine.result == "ok")

    assert backend.sessions == sent
    machine.assert_done()


@needs_bash
@pytest.mark.parametrize("words", ['"$SYNC" --background', '"$SYNC" --base-url'])
def test_blocks_for_skills_are_silent_without_python(machine, words):
    assert machine.shell(block_with(words), path="/nowhere") == SILENT


@needs_bash
def test_consent_prompt_block_skips_what_is_pending(machine):
    machine.fill(2)
    result = machine.shell(block_with("--skip-pending ||"))
    assert result.out.startswith(b"never to be sent: usage events: 2")
    assert machine.deliver().requests == []


@needs_bash
def test_base_url_of_the_blocks_is_used_where_config_has_none(machine):
    """The blocks pass the server of a skill that has moved; the test's own must win here."""
    machine.fill(1)
    machine.configure(baseUrl=None)
    with machine.backend() as backend:
        machine.configure(baseUrl=None)
        text = block_with('"$SYNC" --base-url')
        text = text.replace("https://api.mindverse.com/gate/lab", backend.url)
        assert backend.url in text
        assert machine.shell(text) == SILENT
    assert backend.sessions == ["s-0"]


@needs_bash
def test_commands_for_users_run_as_they_are_written(machine):
    machine.fill(2)
    commands = [part for row in table_rows(section("Look, switch off, switch on"))
                for part in code(row[-1]) if part.startswith("python3 ")]
    assert len(commands) == 7
    for command in commands:
        result = machine.shell("cd .claude/skills/secondme-dev-assistant && " + command)
        assert (command, result.code) == (command, 0)
        assert (command, b"Traceback" in result.err) == (command, False)


def test_demo_delivers_all_that_is_expected(home):
    command = block_with("demo").split()
    result = wait(home.start([sys.executable] + command[1:], cwd=str(ROOT)))
    assert result.code == 0, result.out.decode("utf-8")
    assert result.err == b""
    assert b"Nothing left this machine" in result.out


@needs_bash
def test_block_to_try_the_fake_backend_works(machine):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = block_with("fake_backend").replace("8787", str(port))
    # Instead of 503 and 429, for which a run waits some seconds.
    text = text.replace("503 429", "401").replace("/tmp/secondme-try", "~/try")

    shown = machine.shell("cd '%s'\n%s" % (ROOT, text))

    assert shown.code == 0
    assert shown.out.count(b"community mode, 19 events, deviceId") == 2
    assert re.findall(b"HTTP ([0-9]+)", shown.err) == [b"401", b"200"]


@posix_only("the command names folders as POSIX does")
def test_ci_runs_the_command_for_the_tests():
    command = block_with("pytest").strip()
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("mode", ["community", "anonymous"])
def test_example_bodies_are_of_the_expected_ones(mode):
    expected = json.loads(
        (ROOT / "fixtures" / "expected" / (mode + ".json")).read_text(encoding="utf-8"))
    bodies = [json.loads(text) for text in blocks("json") if '"telemetryMode"' in text]
    body, = [body for body in bodies if body["telemetryMode"] == mode]
    assert body["events"][0] in expected.pop("events")
    assert {name: body[name] for name in body if name != "events"} == expected


def sent_fields(log, mode):
    """Return the fields of a log that the README's table says are sent in a mode."""
    column = {"community": 3, "anonymous": 4}[mode]
    return {field for row in table_rows(section("What is sent"))
            if row[1] in (log, "both") and row[column] == "sent" for field in code(row[0])}


@pytest.mark.parametrize("mode", ["community", "anonymous"])
@pytest.mark.parametrize("log", secondme_sync.LOGS)
def test_table_of_fields_is_what_is_sent(log, mode):
    assert sent_fields(log, mode) == {"type"} | set(secondme_sync.FIELDS[mode][log])


def test_table_of_flags_is_that_of_help(home):
    flag = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
    rows = [row for row in table_rows(section("Flags")) if row[0].startswith("`-")]
    in_readme = set(flag.findall(" ".join(row[0] for row in rows)))
    assert in_readme == set(flag.findall(re.sub(
        r"(?s)exit code:.*", "", home.run("--help").out.decode())))


# The statuses that are retried after a fixed wait. The README has one row for them.
SHORT_WAITS = {status: seconds for status, seconds in secondme_sync.RETRY_SECONDS.items()
               if status != 429}


@pytest.mark.parametrize("limit, value", [
    # words of the row, value
    ("events in a request", secondme_sync.BATCH_EVENTS),
    ("size of the log lines in one request", secondme_sync.BATCH_BYTES // 1024),
    ("longest line", secondme_sync.MAX_LINE_BYTES // 1024),
    ("answer of the server", secondme_sync.MAX_SMALL_BYTES // 1024),
    ("bytes at the beginning of a log", secondme_sync.FINGERPRINT_BYTES),
    ("seconds of a run", secondme_sync.RUN_SECONDS),
    ("seconds to connect", secondme_sync.CONNECT_SECONDS),
    ("seconds that a request may stand still", secondme_sync.IDLE_SECONDS),
    ("after 429, if the server names none", secondme_sync.RETRY_SECONDS[429]),
    ("after 429, at most", secondme_sync.MAX_DELAY_SECONDS),
    ("after " + ", ".join(map(str, sorted(SHORT_WAITS))), max(SHORT_WAITS.values())),
])
def test_table_of_limits_is_that_of_the_script(limit, value):
    row, = [row for row in table_rows(section("Limits")) if limit in row[0]]
    assert row[1] == str(value)


def test_table_of_results_names_each_result():
    named = {name for row in table_rows(section("Results")) for name in code(row[0])}
    source = SCRIPT.read_text(encoding="ascii")
    in_script = set(re.findall(r'"(ok|skipped|[a-z]+_failed|[a-z]+_error)"', source))
    assert named == in_script


def test_tables_name_each_file_and_variable():
    text = section("Files and variables")
    source = SCRIPT.read_text(encoding="ascii")
    variables = set(re.findall(r'os\.environ\.get\("(\w+)"', source))
    files = {"config", "credentials", ".device-id", "analytics/.sync-offsets"}
    files |= {"analytics/%s.jsonl" % name for name in secondme_sync.LOGS}
    named = {name for row in table_rows(text) for name in code(row[0])}
    assert variables | files <= named


def test_url_of_the_server_is_that_of_the_script():
    url = secondme_sync.BASE_URL + secondme_sync.EVENTS_PATH
    words = " ".join(README.split())
    assert re.findall(r"with the full URL `(.*?)`", words) == [url]
    assert re.findall("Sends to (https.*), or", secondme_sync.__doc__) == [url]


def test_user_agent_is_that_of_the_script():
    assert re.findall("`User-Agent: secondme_sync/(.*?)`", README) == [secondme_sync.VERSION]


def test_default_skill_is_that_of_the_script():
    words = " ".join(README.split())
    assert re.findall("`skill` is sent as `(.*?)`", words) == [secondme_sync.DEFAULTS["skill"]]


def test_changes_begin_with_this_version():
    assert re.findall("^### (.*)$", section("Changes"), re.M)[0] == secondme_sync.VERSION


def test_links_within_the_page_lead_to_a_heading():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall("^#+ (.*)$", README, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links - anchors == set()
