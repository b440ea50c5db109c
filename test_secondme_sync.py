"""Tests of secondme_sync.py, in the order of the script; then the whole, run as users run it.

    python3 -m pytest -q

fixtures/harness.py has what they run with: `home` is a home directory with .secondme in it,
synced(home, *answers) a sync in this process with a backend that answers so, home.run(*flags) the
script in a Python of its own. Tables follow the contract's tables (references/telemetry-sync.md);
a row's first column is its name there. Limits come from the script: s.BATCH_EVENTS and the like.
"""
import ast
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "fixtures"))
from fake_backend import DROP, OK, PATH, FakeBackend, answer  # noqa: E402
from harness import (  # noqa: E402
    AS_NOBODY, AS_PASTED, BATCH, BLOCKS, BODIES, BREAKAGES, CERTIFICATE, FAST, FLUSHED, HOOK,
    LOCKED, NARROW, NO_FORK, NOWHERE, README, ROOT, SCRIPT, SHOW_OPENED, SILENT, SOON, TELL, TOKEN,
    TROUBLE, USAGE_TEXT, Disk, FakeClock, Home, Proxy, Result, addressed, after, as_long_as_is_read,
    bare, block, break_file, closed_network, dead_first_address, default_signals, edit, feedback,
    foreign, full_disk, half_a_header, half_an_answer, hold, home, http_date, limited, line,
    log_more, machine, modes, move_elsewhere, names, needs_bash, needs_fork, needs_limits,
    needs_modes, needs_root, needs_signals, no_consent, no_credentials, no_http,
    nothing_new, open_home, paste, play, posix, pour, refers_to, remove, repeats, reply_and_close,
    reply_and_close_later, reply_twice, run_in, sessions, sizes, spoil, synced, table, then,
    tls_backend, tls_context, torn, unreadable, until, usage, useless, wait, secondme_sync as s)

SOURCE = SCRIPT.read_bytes()


# Gate: prerequisites, consent, token, endpoint.

PREREQUISITES = [
    ("1. SM_TEL is community or anonymous", no_consent, "telemetry is off"),
    ("2. credentials exists with a valid accessToken", no_credentials, "not logged in"),
    ("3. unsynchronized data", nothing_new, "nothing is pending")]


@table(PREREQUISITES, "row", "miss", "reason")
@pytest.mark.parametrize("flags", [[], ["--background"]], ids=["sync", "background"])
def test_a_missing_prerequisite_ends_the_run_without_a_trace(home, row, miss, reason, flags):
    home.fill(1, 1)
    with FakeBackend(default=None) as backend:
        home.configure(baseUrl=backend.url)
        miss(home)
        before = home.snapshot()
        assert home.run(*flags) == SILENT
        said = home.run("-v", *flags)
        assert (said.code, said.out, reason in said.err.decode()) == (0, b"", True)
        assert (home.snapshot(), backend.connections) == (before, 0)


@pytest.mark.parametrize("content", [
    '{"accessToken": ""}', '{"accessToken": null}', '{"accessToken": 7}', '{"accessToken": ["x"]}',
    '{"token": "x"}', '["accessToken"]', '"x"', '{"accessToken": "x"', "",
    '{"accessToken": "LEAK words"}', '{"accessToken": "LEAK\\r\\nHost: y"}',
    '{"accessToken": "LEAK\\u94a5"}', '{"accessToken": "LEAK\\u007f"}', '{"accessToken": "LEAK "}',
    '{"accessToken": "\\u0000LEAK"}'])
def test_credentials_without_a_usable_token_count_as_none(home, content):
    home.fill(1)
    home.write("credentials", content)
    backend = synced(home)
    assert (backend.connections, home.offsets(), backend.said) == (0, None, ["not logged in"])
    shown = home.main("--dry-run", "-v")
    assert b"LEAK" not in shown.out + shown.err


@pytest.mark.parametrize("token", ["#!", "~~", "!~" * 40, "a.b-c_d=="])
def test_a_token_of_printable_ascii_is_sent_as_it_is(home, token):
    home.fill(1)
    home.write("credentials", {"accessToken": token, "more": "ignored"})
    request, = synced(home).requests
    assert (request.method, request.path) == ("POST", PATH)
    assert request.headers["Authorization"] == "Bearer " + token
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["User-Agent"] == "secondme_sync/" + s.VERSION
    assert token.encode() not in request.body


CONSENT = [  # config's telemetry, environment, mode, in the reason
    ("community", {}, "community", 'config is "community"'),
    ("anonymous", {}, "anonymous", 'config is "anonymous"'), ("off", {}, "off", 'config is "off"'),
    ("Community", {}, "off", '"Community"'), ("ANONYMOUS", {}, "off", '"ANONYMOUS"'),
    (" community", {}, "off", '" community"'), ("on", {}, "off", '"on"'), ("", {}, "off", '""'),
    (True, {}, "off", "true"), (1, {}, "off", "1"), (None, {}, "off", "null"),
    (["community"], {}, "off", '["community"]'), ({"community": 1}, {}, "off", "{")] + [
    (telemetry, dict(zip(("SM_TEL", "DO_NOT_TRACK"), environ)), mode, reason)
    for telemetry, environ, mode, reason in [
        ("community", ["anonymous"], "anonymous", 'SM_TEL is "anonymous"'),
        ("community", ["off"], "off", 'SM_TEL is "off"'), ("anonymous", ["off"], "off", "SM_TEL"),
        ("community", ["community"], "community", "config"),
        ("anonymous", ["community"], "anonymous", "config"),
        ("anonymous", ["anonymous"], "anonymous", "config"), ("off", ["community"], "off", "config"),
        ("off", ["anonymous", "0"], "off", "config"), ("community", [""], "community", "config"),
        ("community", ["Anonymous"], "off", 'SM_TEL is "Anonymous"'),
        ("community", ["on"], "off", 'SM_TEL is "on"'), ("community", [" "], "off", "SM_TEL"),
        ("community", ["", "1"], "off", 'DO_NOT_TRACK is "1"'),
        ("anonymous", ["", "true"], "off", "DO_NOT_TRACK"),
        ("community", ["", "no"], "off", "DO_NOT_TRACK"),
        ("community", ["", "False"], "off", "DO_NOT_TRACK"),
        ("community", ["", ""], "community", "config"),
        ("community", ["", "0"], "community", "config"),
        ("anonymous", ["", "false"], "anonymous", "config"),
        ("community", ["community", "1"], "off", "DO_NOT_TRACK"),
        ("community", ["anonymous", "1"], "off", "DO_NOT_TRACK")]]


@pytest.mark.parametrize("telemetry, environ, mode, reason", CONSENT)
def test_consent_is_the_least_of_config_and_environment(home, telemetry, environ, mode, reason):
    config = json.dumps({"telemetry": telemetry}).encode()
    got, why = s.consent(config, environ)
    assert (got, reason in why) == (mode, True)
    home.fill(1)
    home.configure(telemetry=telemetry)
    backend = synced(home, environ=environ)
    assert modes(backend) == ([(mode, 1)] if mode != "off" else [])


@pytest.mark.parametrize("content, reason", [
    (None, "no readable config"), (b"", "no readable config"), (b"community", "not a JSON object"),
    (b'"community"', "not a JSON object"), (b'["telemetry", "community"]', "not a JSON object"),
    (b'{"telemetry": "community"', "not a JSON object"), (b'{"Telemetry": "community"}', "no telemetry"),
    (b'{"telemetry": "community",}', "not a JSON object"), (b"{}", "no telemetry"),
    (b'{"telemetry": "community", "n": NaN}', "not a JSON object"),
    (b'{"telemetry": "community"} and more', "not a JSON object"),
    (b'{"telemetry": "community", "note": "\xff"}', "not a JSON object"),
    (b'\xff\xfe{"telemetry": "community"}', "not a JSON object")])
def test_without_a_readable_config_telemetry_is_off(home, content, reason):
    home.fill(1)
    home.find("config").unlink()
    if content is not None:
        home.write("config", content)
    before = home.snapshot()
    said, = home.sync()
    assert said.startswith("telemetry is off") and reason in said
    assert home.snapshot() == before


@pytest.mark.skipif(sys.version_info < (3, 8), reason="no audit hooks before Python 3.8")
@pytest.mark.parametrize("config, environ, opened", [
    ("community", {}, ["config", "credentials", ".sync-offsets", "usage.jsonl", ".device-id"]),
    ("anonymous", {}, ["config", "credentials", ".sync-offsets", "usage.jsonl"]),
    ("off", {}, ["config"]), ("community", {"SM_TEL": "off"}, ["config"]),
    ("community", {"DO_NOT_TRACK": "1"}, ["config"])])
def test_consent_is_asked_before_other_files_are_opened(home, config, environ, opened):
    home.configure(telemetry=config)
    home.fill(1)
    err = home.run(shim=SHOW_OPENED, **environ).err.decode("utf-8", "replace")
    found = [os.path.basename(path) for path in err.splitlines() if path.startswith(str(home.dir))]
    assert sorted(set(found) - {"analytics"}) == sorted(opened) and found[0] == "config"


@pytest.mark.parametrize("base_url, endpoint", [
    (None, s.BASE_URL), ("https://example.test", "https://example.test"),
    ("https://example.test:8443/x/", "https://example.test:8443/x"),
    ("HTTPS://example.test/a/", "https://example.test/a"),
    ("https://example.test:443", "https://example.test:443"),
    ("http://127.8.9.10:81", "http://127.8.9.10:81"), ("http://127.255.255.255",) * 2,
    ("http://[::1]:8080/x", "http://[::1]:8080/x"), ("http://LocalHost:1", "http://LocalHost:1"),
    ("http://localhost/gate/lab/", "http://localhost/gate/lab")])
def test_https_goes_anywhere_plain_http_to_this_machine(home, base_url, endpoint):
    home.configure(baseUrl=base_url)
    run = s.Run(str(home.dir), {})
    assert run.endpoint().geturl() == endpoint + "/api/secondme/telemetry/events/batch"
    link, port = s.open_link(run.endpoint()), run.endpoint().port or 80
    assert link.timeout == s.CONNECT_SECONDS and link.port in (port, 9)  # 9: see closed_network
    home.fill(1)
    assert home.sync()[-1].startswith("network_error, no answer")


@pytest.mark.parametrize("base_url", [
    "http://example.test", "http://127.0.0.1.example.test", "http://localhost.example.test",
    "http://128.0.0.1", "http://126.0.0.1", "http://0.0.0.0", "http://[::2]", "http://[::]",
    "http://127.1", "http://2130706433", "http://127.0.0.256", "ftp://127.0.0.1", "ws://127.0.0.1",
    "file:///etc/passwd", "//127.0.0.1", "127.0.0.1", "localhost:80", "http:127.0.0.1",
    "http:///127.0.0.1", "", "https://", "http://", "not a URL", "https://me@example.test",
    "https://me:word@example.test", "http://127.0.0.1@example.test", "http://me@127.0.0.1",
    "http://127.0.0.1\\@example.test", "https://example.test\nHost: x", "https://exa mple.test",
    "https://ex\u00e4mple.test", "https://example.test:port", "https://example.test:99999",
    "https://example.test:0", "https://example.test?x", "https://example.test/#x", " https://a.test",
    "http://[::1].example.test", "http://x[::1]", "http://example.test[::1]:80", "https://[::1]x",
    "https://127.0.0.1%3a80", "https://[fe80::1%25lo]", "https://[x]", "https://[::1", 7, True, [],
    {"url": "http://127.0.0.1"}])
def test_another_base_url_is_contacted_by_no_packet(home, base_url):
    home.fill(1)
    home.configure(baseUrl=base_url)
    assert re.fullmatch("baseUrl must be https .*, no user, query or fragment", home.sync()[-1])
    assert (home.results(), addressed) == ((0, 0, "network_error"), [])


# State: the record, its file, its lock.

def test_the_state_has_the_four_keys_of_the_contract_and_resume(home):
    home.log("usage", 1)
    home.log("feedback", 2, 3)
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    synced(home)
    state = home.offsets()
    assert begun <= state["last_sync_ts"] and len(begun) == len(state["last_sync_ts"])
    assert state.pop("last_sync_ts") <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    logs = {name: home.find(name + ".jsonl").read_bytes() for name in ("usage", "feedback")}
    assert state == {
        "usage_bytes": len(logs["usage"]), "feedback_bytes": len(logs["feedback"]),
        "last_sync_result": "ok", "resume": {name: {
            "bytes": len(logs[name]), "anonymous": 0, "fingerprint": zlib.crc32(logs[name][:256])}
            for name in logs}}
    assert re.fullmatch(rb"\{[^\n]*\} +\n", home.state.read_bytes()) and home.is_done()


def test_the_longest_record_fits_its_sector(home):
    most = (1 << 63) - 1
    home.write(".sync-offsets", {
        "usage_bytes": most, "feedback_bytes": most, "last_sync_ts": "9" * 20,
        "last_sync_result": "network_error", "resume": {name: {
            "bytes": most, "fingerprint": most, "anonymous": most} for name in s.LOGS}})
    state = s.State(str(home.analytics))
    assert state.record["usage_bytes"] == state.marks["feedback"]["anonymous"] == most
    assert len(json.dumps(dict(state.record, resume=state.marks))) < s.RECORD_BYTES
    home.log("feedback", 1)
    home.find("feedback.jsonl").unlink()
    home.log("usage", 1)
    assert sessions(synced(home)) == ["s-1"]
    assert home.offsets()["resume"]["feedback"]["bytes"] == most


@pytest.mark.parametrize("value", [
    -1, -10**30, 1.5, "7", None, True, [1], {}, 10**9, 2**62, 2**63, 10**400, 1e300], ids=repr)
@pytest.mark.parametrize("key", ["usage_bytes", "bytes", "anonymous", "fingerprint"])
def test_an_offset_that_is_none_counts_as_0(home, key, value):
    home.fill(2, 1)
    mark = dict({"bytes": 0, "fingerprint": 0, "anonymous": 0}, **{key: value})
    state = {"usage_bytes": value} if key == "usage_bytes" else {"resume": {"usage": mark}}
    home.write(".sync-offsets", state)
    backend = synced(home)
    absurd = key == "anonymous" and value in (10**9, 2**62)  # then on the safe side
    assert modes(backend) == ([("anonymous", 2), ("community", 1)] if absurd else [("community", 3)])
    assert home.is_done()


@pytest.mark.parametrize("resume", [
    7, [], "x", None, {"usage": 7}, {"usage": []}, {"usage": {}}, {"usage": {"bytes": 9}},
    {"usage": {"bytes": 9, "fingerprint": "x"}}, {"usage": {"bytes": 9, "fingerprint": 10**30}},
    {"usage": {"bytes": 9, "guard": 3}}, {"usage": {"bytes": 9, "fingerprint": 7}}], ids=repr)
def test_a_resume_that_is_none_leaves_a_log_to_its_bytes_or_the_beginning(home, resume):
    sent = home.fill(2, 1)
    home.write(".sync-offsets", {"usage_bytes": 0, "feedback_bytes": 0, "resume": resume})
    assert sessions(synced(home)) == sent and home.is_done()
    if resume != {"usage": {"bytes": 9, "fingerprint": 7}}:
        nothing_new(home)
        home.write(".sync-offsets", dict(home.offsets(), resume=resume))
        assert sessions(synced(home)) == []


STATES = [  # what is done to the state of two sent events; which of three are sent then
    ("missing", lambda home: home.state.unlink(), [0, 1, 2]),
    ("empty", lambda home: home.write(".sync-offsets", b""), [0, 1, 2]),
    ("blank", lambda home: home.write(".sync-offsets", b" " * 512), [0, 1, 2]),
    ("half written", lambda home: home.write(".sync-offsets", home.state.read_bytes()[:90]),
     [0, 1, 2]),
    ("another type", lambda home: home.write(".sync-offsets", [1]), [0, 1, 2]),
    ("garbage", lambda home: home.write(".sync-offsets", bytes(range(256)) * 8), [0, 1, 2]),
    ("NULs behind it", lambda home: home.write(
        ".sync-offsets", home.state.read_bytes().strip() + b"\0" * 99), [2]),
    ("just the JSON", lambda home: home.write(".sync-offsets", home.offsets()), [2]),
    ("one byte short", lambda home: foreign(home, 511), [2]),
    ("as long as ours", lambda home: foreign(home, 512), [2]),
    ("one byte longer", lambda home: foreign(home, 513), [2]),
    ("longer", lambda home: foreign(home, 5000), [2]),
    ("ours before the rest of another", lambda home: home.write(
        ".sync-offsets", home.state.read_bytes() + b'x": 1}'), [2])] + [
    ("a link to a file elsewhere", move_elsewhere, [2])] * posix


@table(STATES, "name", "change", "sent")
def test_whatever_the_state_file_holds_it_is_made_ours(home, name, change, sent):
    home.fill(2)
    synced(home)
    change(home)
    home.log("usage", 2)
    assert sessions(synced(home)) == names("s", *sent) and home.is_done()
    assert set(home.offsets()) == {"usage_bytes", "feedback_bytes", "last_sync_ts",
                                   "last_sync_result", "resume"}
    assert home.state.is_symlink() is (change == move_elsewhere)


@needs_modes
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("mode", [None, 0o600, 0o640, 0o666])
def test_a_new_state_is_for_its_owner_alone_another_keeps_its_mode(home, umask, mode):
    home.fill(1)
    if mode:
        home.write(".sync-offsets", "{}")
        home.state.chmod(mode)
    before = os.umask(umask)
    synced(home)
    os.umask(before)
    assert (home.state.stat().st_mode & 0o777, home.is_done()) == (mode or 0o600, True)


@needs_root
def test_a_run_as_root_between_two_of_a_users_changes_nothing_for_the_user(open_home):
    home = open_home
    for path in home.path.rglob("*"):
        os.chown(str(path), 65534, 65534)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        for number, shim in enumerate([AS_NOBODY, "", AS_NOBODY]):
            home.log("usage", number)
            assert home.run(shim=shim) == SILENT
            assert home.results()[2] == "ok"
    assert sessions(backend) == names("s", 0, 1, 2) and home.is_done()
    assert (home.state.stat().st_uid, home.state.stat().st_mode & 0o777) == (65534, 0o600)


@pytest.mark.parametrize("breakage", ["directory", "FIFO", "device", "link to itself", "dangling link"])
def test_where_nothing_can_be_recorded_nothing_is_sent(home, breakage):
    if breakage not in BREAKAGES:
        pytest.skip("Windows has no such files")
    sent = home.fill(2, 1)
    path = break_file(home, ".sync-offsets", breakage)
    for _ in range(2):
        backend = synced(home)
        assert (backend.connections, backend.said[-1][:27]) == (0, "progress cannot be recorded")
    remove(path)
    assert sessions(synced(home)) == sent and home.is_done()


@needs_limits
@pytest.mark.parametrize("before", [None, '{"usage_bytes": 0, "feedback_bytes": 0}', "one sent"])
def test_on_a_full_disk_nothing_is_sent_till_there_is_room(home, before):
    home.fill(2, 1)
    if before == "one sent":
        synced(home)
        home.log("usage", 2)
    elif before:
        home.write(".sync-offsets", before)
    known = home.state.read_bytes() if before else b""
    with FakeBackend(OK, default=None) as backend:
        home.configure(baseUrl=backend.url)
        assert home.run(options={"preexec_fn": full_disk}) == SILENT
        assert (backend.connections, home.state.read_bytes()) == (0, known)
        assert home.run() == SILENT
    assert sessions(backend) == (["s-2"] if before == "one sent" else names("s", 0, 1) + ["f-0"])


@needs_root
@pytest.mark.parametrize("path", ["", ".sync-offsets"])
def test_in_a_folder_or_state_of_another_owner_nothing_is_sent_till_it_is_writable(open_home, path):
    home = open_home
    sent = home.fill(2, 1)
    if path:
        home.write(path, {})
        home.find(path).chmod(0o644)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        assert home.run(shim=AS_NOBODY) == SILENT
        assert backend.connections == 0
        assert home.run() == SILENT
    assert sessions(backend) == sent and home.is_done()


@pytest.mark.skipif(not posix, reason="on Windows, a lock that fails is one that another has")
@pytest.mark.parametrize("shim", [LOCKED, FLUSHED], ids=["no locks", "no flush of folders"])
def test_a_file_system_that_lacks_something_syncs(home, shim):
    sent = home.fill(1, 1)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        assert home.run(shim=shim) == SILENT and home.run(shim=shim) == SILENT
    assert sessions(backend) == sent and home.is_done()


def test_eight_runs_at_once_send_every_event_once(home):
    sent = home.fill(5 * BATCH, 150)
    with FakeBackend(*[after(0.05)] * 6) as backend:
        home.configure(baseUrl=backend.url)
        runs = [home.spawn() for _ in range(8)]
        assert [wait(run) for run in runs] == [SILENT] * 8
    assert sessions(backend) == sent and home.is_done()


def test_a_second_run_leaves_at_once_and_the_lock_dies_with_its_holder(home, hold):
    sent = home.fill(1)
    with FakeBackend(hold) as backend:
        home.configure(baseUrl=backend.url)
        holder = home.spawn()
        assert hold.arrived.wait(20)
        assert home.run() == SILENT and home.sync() == ["another run is at work"]
        skip = home.main("--skip-pending")
        assert (skip.code, skip.out, b"another run" in skip.err) == (1, b"", True)
        assert json.loads(home.run("--dry-run").out.decode())["events"][0]["session"] == "s-0"
        assert len(backend.requests) == 1
        holder.kill()
        wait(holder)
        assert home.run() == SILENT
    assert sessions(backend) == sent * 2 and home.is_done()


def test_a_reader_beside_a_run_finds_every_record_whole(home):
    home.append("usage", b"{}\n" * (250 * BATCH))
    with FakeBackend(keep=False) as backend:
        home.configure(baseUrl=backend.url)
        run, seen, reads = home.spawn(), [], 0
        while run.poll() is None:
            with contextlib.suppress(FileNotFoundError, ValueError):  # it may hit the write itself
                data, reads = home.state.read_bytes(), reads + 1
                seen.append(json.loads(data.decode())["resume"]["usage"]["bytes"]
                            if len(data.split()) > 1 else 0)
        assert wait(run) == SILENT and len(backend.requests) == 250
    assert len(set(seen)) > 5 and len(seen) > 0.99 * reads
    assert seen == sorted(seen) and home.is_done()


POWER_CUTS = [  # earlier runs, state before, answers
    ("a usual run", 1, None, []), ("a first run", 0, None, []),
    ("a backlog after many runs", 3, None, []),
    ("a run that fails midway", 1, None, [OK, OK, answer(500)]),
    ("a run that gets no answer midway", 1, None, [OK, OK, DROP, DROP]),
    ("after the older script", 1, nothing_new, []),
    ("after another program, longer", 1, lambda home: foreign(home, 900), [])]


@table(POWER_CUTS, "name", "earlier", "before", "answers")
def test_after_a_power_cut_nothing_is_lost_and_nothing_of_earlier_runs_repeated(
        home, monkeypatch, name, earlier, before, answers):
    for number in range(earlier):
        home.log("usage", number)
        synced(home)
    if before:
        before(home)
    new = names("s", *range(100, 100 + 3 * BATCH))
    home.log("usage", *range(100, 100 + 3 * BATCH))
    with monkeypatch.context() as patches:
        disk = Disk(patches, home.state)
        script = [then(disk.crash, reply) if reply != DROP else reply for reply in answers or [OK] * 3]
        backend = synced(home, *script)
        disk.crash()
    arrived = sessions(backend)
    assert len(disk.crashes) > 2 and len(set().union(*disk.crashes)) > 2
    for moment, contents in enumerate(disk.crashes):
        for content in contents:
            if home.state.exists():
                home.state.unlink()
            if content is not None:
                home.write(".sync-offsets", content)
            again = sessions(synced(home))
            assert set(again) <= set(new) and set(arrived) | set(again) == set(new)
            assert again == new[len(new) - len(again):]
            assert s.State(str(home.analytics)).record["usage_bytes"] == home.size("usage")


def test_logs_are_on_disk_before_a_record_counts_them_as_done(home, monkeypatch):
    flushed, logs = [], ["usage.jsonl", "feedback.jsonl"]
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.extend(
        path.name for path in [home.analytics, *home.analytics.iterdir()] if refers_to(descriptor, path)))
    home.fill(BATCH, 1)
    synced(home)
    assert flushed == ["analytics"] * posix + 2 * (logs + [".sync-offsets"])
    del flushed[:]
    home.main("--skip-pending")
    assert flushed == logs + [".sync-offsets"]


# Read: the logs, their lines, and logs that change under an offset.

@pytest.mark.parametrize("name, make", [("usage", usage), ("feedback", feedback)])
@pytest.mark.parametrize("cut", [1, 40, -60, -2])
def test_a_torn_line_waits_for_its_rest(home, name, make, cut):
    sent = home.fill(1, 1)
    text = line(make(7, comment="x" * 80))
    home.append(name, text[:cut])
    assert sessions(synced(home)) == sent and synced(home).said == ["nothing is pending"]
    home.append(name, text[cut:])
    assert sessions(synced(home)) == [make(7)["session"]] and home.is_done()


@pytest.mark.parametrize("rest", [b"\n", b"\r\n", b"\n\n", b"\n" + line(usage(2)), b"\n" + line(usage(2))[:-1]])
def test_a_whole_event_without_newline_is_sent_once(home, rest):
    home.append("usage", line(usage(1))[:-1])
    assert sessions(synced(home)) == ["s-1"] and sessions(synced(home)) == []
    home.append("usage", rest)
    assert sessions(synced(home)) == ["s-2"] * (b"s-2" in rest) and home.is_done()


ONE = len(line(usage(1)))
EDITS = [  # what is done to a log of which 0..4 were sent; which of 0..4 and 9 are sent then
    ("nothing", lambda text: text, [9]), ("emptied", lambda text: b"", [9]),
    ("another, smaller", lambda text: line(usage(5)), [5, 9]),
    ("another, larger", lambda text: b"".join(map(line, map(usage, range(5, 15)))),
     [*range(5, 15), 9]),
    ("its third line deleted", lambda text: text[:2 * ONE] + text[3 * ONE:], []),  # 9 once it is
    ("its last line deleted", lambda text: text[:-ONE], []),  # seen to be shorter, as README says
    ("cut in its last line", lambda text: text[:-9], []),
    ("a line blacked out", lambda text: text[:2 * ONE] + b"#" * (ONE - 1) + b"\n" + text[3 * ONE:],
     [9]),
    ("its first line deleted", lambda text: text[ONE:], [1, 2, 3, 4, 9]),
    ("its first byte changed", lambda text: b" " + text[1:], [1, 2, 3, 4, 9]),
    ("byte 256 changed", lambda text: text[:255] + b"\xff" + text[256:], [1, 2, 3, 4, 9]),
    ("byte 257 changed", lambda text: text[:256] + b"\xff" + text[257:], [9])]


@table(EDITS, "name", "change", "sent")
@pytest.mark.parametrize("noticed", [True, False], ids=["a run sees it", "no run sees it"])
@pytest.mark.parametrize("skipped", [True, False], ids=["skipped", "sent"])
def test_an_edited_log_is_known_by_its_first_256_bytes(home, name, change, sent, noticed, skipped):
    home.log("usage", *range(5))
    if skipped:
        assert home.main("--skip-pending").code == 0
    else:
        synced(home)
    edit(change)(home)
    first = sessions(synced(home)) if noticed else []
    home.log("usage", 9)
    assert first + sessions(synced(home)) == names("s", *(sent or [9] * noticed))
    assert home.offsets()["usage_bytes"] == home.size("usage")


@pytest.mark.parametrize("unlink", [True, False], ids=["replaced", "truncated"])
@pytest.mark.skipif(not posix, reason="on Windows an open log can be neither")
def test_a_log_begun_again_during_a_run_is_read_by_the_next(home, unlink):
    home.fill(BATCH + 50)
    synced(home, then(lambda: home.restart("usage", 901, unlink=unlink)))
    assert sessions(synced(home)) == ["s-901"] and home.is_done()


@pytest.mark.parametrize("name", ["usage", "feedback"])
def test_what_is_appended_during_a_run_is_sent_once(home, name):
    sent = home.fill(BATCH + 20, BATCH + 20)
    first = synced(home, *[then(lambda k=k: home.log(name, k)) for k in (900, 901, 902)])
    late = names(name.replace("usage", "s")[0], 900, 901, 902)
    assert sessions(first) == sent and sessions(synced(home)) == late and home.is_done()


@pytest.mark.parametrize("sooner", [True, False])
def test_a_log_that_grows_while_it_is_opened_is_the_same_log(home, monkeypatch, sooner):
    home.append("usage", b'{"session": "a"}\n')
    real, opened = os.fstat, []

    def grow(descriptor):
        found = real(descriptor)
        opened.append(found.st_size)
        if opened.count(17) == 2 and opened[-1] == 17:  # not when it looks if anything is pending
            home.append("usage", b'{"session": "b"}\n')
            found = real(descriptor) if sooner else found
        return found

    monkeypatch.setattr(os, "fstat", grow)
    assert sum([sessions(synced(home)) for _ in range(3)], []) == ["a", "b"]


@pytest.mark.parametrize("done", [synced, nothing_new, lambda home: home.main("--skip-pending")],
                         ids=["sent", "sent by the older script", "skipped"])
def test_a_log_that_is_missing_for_a_while_keeps_its_place(home, done):
    home.fill(3)
    done(home)
    log = home.find("usage.jsonl")
    log.rename(str(log) + ".away")
    assert synced(home).said == ["nothing is pending"]
    home.log("feedback", 1)
    assert sessions(synced(home)) == ["f-1"]
    pathlib.Path(str(log) + ".away").rename(str(log))
    home.log("usage", 7)
    assert sessions(synced(home)) == ["s-7"] and home.is_done()


@pytest.mark.parametrize("stale", [0, 1, 10**6], ids=["none", "some", "of a longer log"])
def test_an_end_that_was_not_recorded_is_recorded_without_a_request(home, stale):
    home.fill(2, 2)
    synced(home)
    home.write(".sync-offsets", dict(
        home.offsets(), usage_bytes=stale, last_sync_result="network_error"))
    assert home.main("--pending").out == b"yes\n"
    assert synced(home).requests == [] and home.is_done()


def test_what_is_passed_over_is_recorded_on_the_way_without_a_request(home):
    home.append("usage", b"no event\n")
    assert synced(home).connections == 0 and home.is_done()
    home.append("usage", b"no event\n" * 149999)
    home.log("usage", 1)
    synced(home, answer(500))
    assert 1350000 - s.BODY_BYTES <= home.offsets()["resume"]["usage"]["bytes"] <= 1350000
    assert sessions(synced(home)) == ["s-1"]


DEEP = b'{"session": "bad", "issues": %s%s}'
LINES = [  # name, line, the session that arrives, if any
    ("an array", b'[{"session": "bad"}]', None), ("a string", b'"session"', None),
    ("a number", b"7", None), ("null", b"null", None), ("no JSON", b"{'session': 'bad'}", None),
    ("half an object", b'{"session": "bad", ', None), ("nothing", b"", None),
    ("two objects", b'{"session": "bad"} {"session": "bad"}', None), ("blanks", b" \t  ", None),
    ("a comma too many", b'{"session": "bad",}', None),
    ("NaN", b'{"session": "bad", "rating": NaN}', None),
    ("Infinity", b'{"session": "bad", "rating": Infinity}', None),
    ("-Infinity", b'{"session": "bad", "rating": -Infinity}', None),
    ("1e999", b'{"session": "bad", "rating": 1e999}', None),
    ("-1e999 inside", b'{"session": "bad", "issues": [{"x": -1.5e999}]}', None),
    ("an integer past float range", b'{"session": "bad", "x": 2%s}' % (b"0" * 308), None),
    ("an integer of 5,000 digits", b'{"session": "bad", "rating": %s}' % (b"7" * 5000), None),
    ("nested 65 deep", DEEP % (b"[" * s.MAX_DEPTH, b"]" * s.MAX_DEPTH), None),
    ("nested 900 deep", DEEP % (b"[" * 900, b"]" * 900), None),
    ("objects nested 900 deep", DEEP % (b'{"a":' * 900, b"1" + b"}" * 900), None),
    ("nested 100,000 deep", DEEP % (b"[" * 100000, b"]" * 100000), None),
    ("nested 100,000 deep, unclosed", DEEP % (b"[" * 100000, b""), None),
    ("longer than 1 MiB", b'{"session": "bad", "x": "%s"}' % (b"x" * s.LINE_BYTES), None),
    ("much longer than 1 MiB", b'{"session": "bad", "x": "%s"}' % (b"\\" * 5 * s.LINE_BYTES), None),
    ("a byte longer than 1 MiB", b'{"session": "bad"%s}' % (b" " * (s.LINE_BYTES - 17)), None),
    ("NUL bytes", b"\0" * 5000, None), ("a NUL byte inside", b'{"session": "b\0d"}', None),
    ("a control character inside", b'{"session": "b\x01d"}', None),
    ("bytes that are no text", bytes(range(128, 256)), None),
    ("UTF-16", json.dumps(usage(9)).encode("utf-16"), None),
    ("nested 64 deep", b'{"session": "deep", "issues": %s%s}' % (
        b"[" * (s.MAX_DEPTH - 1), b"]" * (s.MAX_DEPTH - 1)), "deep"),
    ("64 deep beside others", b'{"session": "by", "x": [[],[]], "issues": %s%s}' % (
        b"[" * (s.MAX_DEPTH - 1), b"]" * (s.MAX_DEPTH - 1)), "by"),
    ("many brackets, not deep", b'{"session": "wide", "issues": [%s[]], "x": "%s"}' % (
        b"[]," * 99, b"{[" * 99), "wide"),
    ("an integer of 300 digits", b'{"session": "int", "rating": %s}' % (b"7" * 300), "int"),
    ("as long as 1 MiB", b'{"session": "long"%s}' % (b" " * (s.LINE_BYTES - 19)), "long"),
    ("bad UTF-8", b'{"session": "a\xffb"}', "a\ufffdb"),
    ("a character cut short", b'{"session": "a\xe4\xb8"}', "a\ufffd"),
    ("a lone surrogate", br'{"session": "a\ud800b"}', "a\ufffdb"),
    ("a low surrogate", br'{"session": "a\udc00"}', "a\ufffd"),
    ("surrogates in the wrong order", br'{"session": "\udc00\ud800"}', "\ufffd\ufffd"),
    ("a pair as escapes", br'{"session": "\ud83e\udde0"}', "\U0001f9e0"),
    ("an escaped NUL", br'{"session": "a\u0000b"}', "a\0b"),
    ("a BOM", b'\xef\xbb\xbf{"session": "bom"}', "bom"), ("CR LF", b'{"session": "crlf"}\r', "crlf"),
    ("blanks around", b' \t{"session": "blanks"} ', "blanks"),
    ("behind NULs", b"\0" * 200 + b'{"session": "nul"}', "nul"),
    ("behind 1 MiB", b"x" * s.LINE_BYTES + b'{"session": "bad"}', None),
    ("within 2 MiB", b'{"x": [' + b" " * (s.LINE_BYTES - 7) + b'{"session": "bad"'.ljust(
        s.LINE_BYTES - 1) + b"}]}", None)]


@table(LINES, "name", "text", "arrives")
def test_a_line_is_passed_over_or_sent_and_never_costs_its_neighbours(home, name, text, arrives):
    home.log("usage", 1)
    home.append("usage", text + b"\n")
    home.log("usage", 2)
    backend = synced(home)
    assert sessions(backend) == ["s-1"] + [arrives] * (arrives is not None) + ["s-2"]
    assert home.is_done() and backend.bodies()


@pytest.mark.parametrize("text", [text for name, text, arrives in LINES if name in (
    "NaN", "NUL bytes", "longer than 1 MiB", "half an object")], ids=len)
def test_a_bad_last_line_without_newline_keeps_nothing_back(home, text):
    sent = home.fill(2, 2)
    home.append("usage", text)
    assert sessions(synced(home)) == sent and sessions(synced(home)) == []
    home.append("usage", b"\n")
    home.log("usage", 7)
    assert sessions(synced(home)) == ["s-7"] and home.is_done()


@pytest.mark.parametrize("breakage", sorted(BREAKAGES))
@pytest.mark.parametrize("name, arrive", [
    ("config", []), ("credentials", []), (".device-id", ["s-0", "f-0"]), ("usage.jsonl", ["f-0"])])
def test_a_broken_file_counts_as_none(home, name, arrive, breakage):
    home.fill(1, 1)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        path = break_file(home, name, breakage)
        home.sync()
        remove(path)
    assert sessions(backend) == arrive
    assert (home.results() or [0, 0, None])[1:] == (
        (home.size("feedback"), "ok") if arrive else [0, None])
    if breakage not in ("other type", "deep"):  # which are text, of a kind
        assert name != ".device-id" or "deviceId" not in backend.bodies()[0]


@pytest.mark.parametrize("name", [".secondme", "analytics"])
@pytest.mark.parametrize("breakage", sorted(BREAKAGES))
def test_a_broken_folder_is_no_visible_error(home, name, breakage):
    path = {".secondme": home.dir, "analytics": home.analytics}[name]
    shutil.rmtree(str(path))
    BREAKAGES[breakage](path)
    assert home.sync()[0].startswith(("telemetry is off", "nothing is pending"))


# Shape: the payload of each log and mode, field for field; batches.

REMOVED = "session error_message user_intent actions_summary error_summary comment".split()
PRESERVED = ("skill ts version os arch outcome duration_s error_class phases_used "
             "references_loaded rating issues").split()


@pytest.mark.parametrize("mode", sorted(BODIES))
def test_the_body_of_a_mode_has_these_fields_and_no_other(home, mode):
    home.configure(telemetry=mode)
    home.log("usage", 7)
    home.log("feedback", 8)
    backend = synced(home)
    assert backend.bodies() == [BODIES[mode]]
    assert len(backend.requests[0].body) == len(json.dumps(
        BODIES[mode], ensure_ascii=False, separators=(",", ":")).encode("utf-8"))
    assert USAGE_TEXT["user_intent"].encode() in backend.requests[0].body or mode == "anonymous"


@pytest.mark.parametrize("mode", sorted(BODIES))
def test_missing_fields_have_the_defaults_of_the_contract_and_nulls_are_not_sent(home, mode):
    home.configure(telemetry=mode)
    home.log("usage", {}, dict.fromkeys(usage(1)), usage(2, duration_s=0, outcome=False, event=""))
    home.log("feedback", {}, dict.fromkeys(feedback(3)), feedback(4, rating=0, issues=[]))
    backend = synced(home)
    base = {"skill": "secondme", "ts": "", "phases_used": []}
    empty, null, zero, empty_too, null_too, zero_too = backend.events()
    assert empty == dict(base, type="usage")
    assert empty_too == dict(base, type="feedback", references_loaded=[], issues=[])
    assert (null, null_too) == ({"type": "usage"}, {"type": "feedback"})
    assert (zero["duration_s"], zero["outcome"], zero["event"]) == (0, False, "")
    assert (zero_too["rating"], zero_too["issues"]) == (0, [])
    assert b"null" not in backend.requests[0].body


@pytest.mark.parametrize("name", ["usage", "feedback"])
@pytest.mark.parametrize("mode", sorted(BODIES))
def test_what_the_contract_does_not_name_is_not_sent(home, mode, name):
    home.configure(telemetry=mode)
    extra = ["device_id", "deviceId", "accessToken", "telemetryMode", "path", "Session", "type"]
    extra += ["rating", "comment"] if name == "usage" else ["event", "error_message", "duration_s"]
    home.log(name, dict.fromkeys(extra, "unwanted"))
    backend = synced(home)
    assert b"unwanted" not in backend.requests[0].body
    assert [event["type"] for event in backend.events()] == [name]


@pytest.mark.parametrize("field", REMOVED + PRESERVED)
def test_anonymous_mode_removes_or_preserves_a_field(home, field):
    value = ["kept", 1.5, {"a": "b"}]
    for mode in "community", "anonymous":
        home.configure(telemetry=mode)
        home.log("usage", usage(1, **{field: value}))
        home.log("feedback", feedback(2, **{field: value}))
        events = synced(home).events()
        holding = [name for name in ("usage", "feedback")
                   if field in s.ANONYMOUS[name] + s.COMMUNITY[name]]
        assert holding and [event[field] for event in events if field in event] == [value] * (
            0 if field in REMOVED and mode == "anonymous" else len(holding))


@pytest.mark.parametrize("mode, content, sent", [
    ("community", "device-42", "device-42"), ("community", " device-42\r\n", "device-42"),
    ("community", "my laptop", "my laptop"), ("community", None, None),
    ("community", " \n", None), ("community", b"\xffbad", None), ("anonymous", "device-42", None)])
def test_device_id_is_sent_in_community_mode_alone(home, mode, content, sent):
    home.configure(telemetry=mode)
    home.fill(1)
    home.find(".device-id").unlink()
    if content is not None:
        home.write(".device-id", content)
    backend = synced(home)
    assert backend.bodies()[0].get("deviceId") == sent
    assert (b"device" in backend.requests[0].body) == (sent is not None)


@pytest.mark.parametrize("uses, feedbacks, expected", [
    (1, 0, [1]), (BATCH - 1, 0, [BATCH - 1]), (BATCH, 0, [BATCH]), (BATCH + 1, 0, [BATCH, 1]),
    (2 * BATCH, 0, [BATCH] * 2), (3 * BATCH - 50, BATCH + 20, [BATCH] * 3 + [BATCH - 30])])
def test_a_batch_is_of_so_many_events_at_most_of_both_logs(home, uses, feedbacks, expected):
    sent = home.fill(uses, feedbacks)
    backend = synced(home)
    assert sizes(backend) == expected and sessions(backend) == sent and home.is_done()
    assert backend.connections == 1


@pytest.mark.parametrize("count, text, expected", [
    (12, b"a" * 100000, [5, 5, 2]), (12, "\u8bb0".encode() * 33333, [5, 5, 2]),
    (12, b"\\u0001" * 16666, [5, 5, 2]), (3, b"a" * 600000, [1, 1, 1]),
    (3, b"\xff" * 100000, [1, 1, 1])], ids=["ASCII", "Chinese", "escaped", "larger", "repaired"])
def test_a_body_is_of_512_kib_at_most_or_of_one_event(home, count, text, expected):
    event = b'{"session": "s-%d", "user_intent": "' + text.replace(b"%", b"%%") + b'"}\n'
    home.append("usage", b"".join(event % number for number in range(count)))
    backend = synced(home)
    assert all(len(request.body) <= s.BODY_BYTES or len(text) > s.BODY_BYTES
               for request in backend.requests)
    assert sizes(backend) == expected and sessions(backend) == names("s", *range(count))


def test_a_body_of_512_kib_is_one(home):
    event = b'{"user_intent":"%s"}\n'
    home.append("usage", event % b"a" * 2)
    size = len(home.main("--dry-run").out.strip())
    home.restart("usage")
    home.append("usage", event % b"a" + event % (b"a" * (s.BODY_BYTES - size + 1)))
    assert [len(request.body) for request in synced(home).requests] == [s.BODY_BYTES]


# Consent that holds: what was pending in anonymous mode stays anonymous.

HISTORIES = [  # steps after 3 usage events and a feedback were logged; the bodies of the last
    ("seen by a run that fails", [run_in("anonymous", answer(500)), run_in("community")],
     [("anonymous", 4)]),
    ("seen by SM_TEL", [run_in("community", answer(500), environ={"SM_TEL": "anonymous"}),
                        run_in("community")], [("anonymous", 4)]),
    ("by way of off", [run_in("anonymous", DROP), run_in("off"), run_in("community")],
     [("anonymous", 4)]),
    ("through several that fail", [run_in("anonymous", answer(401)), run_in("community", answer(500)),
                                   run_in("community", answer(500)), run_in("community")],
     [("anonymous", 4)]),
    ("what is logged later goes in full", [run_in("anonymous", answer(500)), log_more,
                                           run_in("community")],
     [("anonymous", 3), ("community", 3), ("anonymous", 1), ("community", 1)]),
    ("after a good anonymous run all goes in full", [run_in("anonymous"), log_more,
                                                     run_in("community")], [("community", 4)]),
    ("skipped", [run_in("anonymous", answer(500)), lambda home: home.main("--skip-pending"), log_more,
                 run_in("community")], [("community", 4)]),
    ("a log begun again", [run_in("anonymous"), lambda home: home.restart("usage", 90, 91),
                           run_in("community")], [("community", 2)]),
    ("a log that may hold what was pending", [
        run_in("anonymous", answer(500)), edit(lambda text: text.replace(b"second", b"#", 1)),
        run_in("community")], [("anonymous", 4)]),
    ("a log cut", [run_in("anonymous", answer(500)), edit(lambda text: text[:text.index(b"\n") + 1]),
                   run_in("community", answer(500)), log_more, run_in("community")],
     [("anonymous", 1), ("community", 3), ("anonymous", 1), ("community", 1)]),
    ("an event begun in anonymous mode", [
        edit(lambda text: text + line(usage(7))[:40]), run_in("anonymous"),
        edit(lambda text: text + line(usage(7))[40:]), run_in("community")], [("anonymous", 1)]),
    ("anonymous again", [run_in("anonymous", answer(500)), log_more, run_in("anonymous", answer(500)),
                         run_in("community")], [("anonymous", 8)])]


@table(HISTORIES, "name", "steps", "expected")
def test_what_was_pending_in_anonymous_mode_stays_anonymous(home, name, steps, expected):
    home.fill(3, 1)
    for step in steps[:-1]:
        step(home)
    before = home.snapshot()
    shown = home.main("--dry-run", "community").out.splitlines()
    assert home.snapshot() == before
    with FakeBackend() as backend:
        home.configure(telemetry="community", baseUrl=backend.url)
        home.sync()
    assert modes(backend) == expected and home.is_done()
    assert [request.body for request in backend.requests] == shown
    for body in backend.bodies():
        anonymous = body["telemetryMode"] == "anonymous"
        assert ("deviceId" in body) is not anonymous
        assert all(("session" in event) is not anonymous for event in body["events"])


# Send: what is posted, and what becomes of an answer.

NOT_UPDATED, UPDATED, SILENT_EXIT = "not updated", "updated", "as it was"
SCENARIOS = [  # row, change, answers; then batches sent, waits, result, offsets; of BATCH + 1 events
    ("401 Unauthorized", None, [answer(401)], "1", [], "auth_failed", NOT_UPDATED),
    ("401, a later batch", None, [OK, answer(401)], "12", [], "auth_failed", NOT_UPDATED),
    ("429 Rate Limit", None, [answer(429, Retry_After=3)] * 2, "11", [3], "server_error",
     NOT_UPDATED),
    ("429, then well", None, [answer(429, Retry_After=3)], "112", [3], "ok", UPDATED),
    ("429 without Retry-After", None, [answer(429)], "112", [5], "ok", UPDATED),
    ("502/503/504: 502", None, [answer(502)] * 2, "11", [2], "server_error", NOT_UPDATED),
    ("502/503/504: 503", None, [answer(503)] * 2, "11", [2], "server_error", NOT_UPDATED),
    ("502/503/504: 504", None, [answer(504)] * 2, "11", [2], "server_error", NOT_UPDATED),
    ("502, then well", None, [answer(502, Retry_After=9)], "112", [2], "ok", UPDATED),
    ("429, then 503", None, [answer(429, Retry_After=1), answer(503)], "11", [1], "server_error",
     NOT_UPDATED),
    ("503, then 429", None, [answer(503), answer(429)], "11", [2], "server_error", NOT_UPDATED),
    ("503, then 401", None, [answer(503), answer(401)], "11", [2], "auth_failed", NOT_UPDATED),
    ("429, then 500", None, [answer(429), answer(500)], "11", [5], "server_error", NOT_UPDATED),
    ("a retry for each batch", None, [answer(503), OK, answer(429, Retry_After=1), OK], "1122",
     [2, 1], "ok", UPDATED),
    ("500", None, [answer(500)], "1", [], "server_error", NOT_UPDATED),
    ("500, a later batch", None, [OK, answer(500)], "12", [], "server_error", NOT_UPDATED),
    ("Network timeout (10s): no answer", None, [DROP], "1", [], "network_error", NOT_UPDATED),
    ("no answer, a later batch", None, [OK, DROP, DROP], "122", [], "network_error", NOT_UPDATED),
    ("half an answer", None, [half_an_answer], "1", [], "network_error", NOT_UPDATED),
    ("as much of an answer as is read", None, [as_long_as_is_read] * 2, "12", [], "ok", UPDATED),
    ("half a header", None, [half_a_header], "1", [], "network_error", NOT_UPDATED),
    ("401 with half a body", None, [torn(401)], "1", [], "auth_failed", NOT_UPDATED),
    ("503 with half a body", None, [torn(503)], "112", [2], "ok", UPDATED),
    ("half an answer, a later batch", None, [OK, half_an_answer], "12", [], "network_error",
     NOT_UPDATED),
    ("no HTTP", None, [no_http], "1", [], "network_error", NOT_UPDATED),
    ("a kept connection closed", None, [OK, DROP], "122", [], "ok", UPDATED),
    ("closed without a word", None, [reply_and_close] * 2, "12", [], "ok", UPDATED),
    ("closed a little later", None, [reply_and_close_later] * 2, "12", [], "ok", UPDATED),
    ("Connection: close", None, [answer(200, {"code": 0}, Connection="close")] * 2, "12", [], "ok",
     UPDATED),
    ("Success", None, [OK] * 2, "12", [], "ok", UPDATED),
    ("No credentials", no_credentials, [], "", [], None, SILENT_EXIT),
    ("telemetry=off", no_consent, [], "", [], None, SILENT_EXIT)]


@table(SCENARIOS, "row", "change", "script", "batches", "waits", "result", "offsets")
def test_error_handling(home, row, change, script, batches, waits, result, offsets):
    home.log("usage", 900)
    synced(home)
    before = home.size("usage"), 0, "ok"
    sent = home.fill(BATCH, 1)
    if change:
        change(home)
    clock = FakeClock()
    backend = synced(home, *script, clock=clock)
    assert sizes(backend) == [{"1": BATCH, "2": 1}[batch] for batch in batches]
    assert (clock.slept, backend.script) == (waits, [])
    now = home.size("usage"), home.size("feedback")
    assert home.results() == (before if offsets == SILENT_EXIT else
                              (now if offsets == UPDATED else before[:2]) + (result,))
    if not change:  # what was accepted is not sent again, the rest is
        accepted = len(sent) if offsets == UPDATED else BATCH * ("2" in batches)
        assert sessions(synced(home)) == sent[accepted:] and home.is_done()


ANSWERS = {  # result: (status, body) ...
    "ok": [
        (200, {"code": 0}), (201, {"code": 0, "message": "好", "data": None}), (299, {"code": 0}),
        (202, b' {"code":0}\r\n'), (200, b'{"code": 0}' + b" " * (s.SMALL_BYTES - 11))],
    "server_error": [
        (200, {"code": 1}), (200, {"code": -1}), (200, {"code": False}), (200, {"code": 0.0}),
        (200, {"code": "0"}), (200, {"code": None}), (200, {"code": []}), (200, {}),
        (200, {"data": {"code": 0}}), (300, {"code": 0}), (302, {"code": 0}), (304, b""),
        (399, b""), (400, {"code": 0}), (403, {"code": 0}), (404, b""), (408, b""), (418, b""),
        (500, {"code": 0}), (501, b""), (505, b"")],
    "network_error": [
        (200, b"[0]"), (200, b'[{"code": 0}]'), (200, b"0"), (200, b"null"), (200, b""), (204, b""),
        (200, b"<html>OK</html>"), (200, b'{"code": 0'), (200, b'{"code": 0} {"code": 0}'),
        (200, b'\xff\xfe'), (200, b'{"code": 0, "message": "\xff"}'),
        (200, b'{"code": 0}' + b" " * s.SMALL_BYTES)],
    "auth_failed": [(401, {"code": 0})]}


@pytest.mark.parametrize("status, body, result", [
    answered + (result,) for result in sorted(ANSWERS) for answered in ANSWERS[result]])
def test_success_is_2xx_with_an_object_whose_code_is_0(home, status, body, result):
    home.fill(1)
    backend = synced(home, answer(status, body))
    assert len(backend.requests) == 1
    assert home.results() == (home.size("usage") if result == "ok" else 0, 0, result)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(home, status):
    home.fill(1)
    with FakeBackend(default=None) as elsewhere:
        location = "http://127.0.0.1:%d%s" % (elsewhere.port, PATH)
        backend = synced(home, answer(status, {"code": 0}, Location=location))
        assert (len(backend.requests), elsewhere.connections) == (1, 0)
    assert home.results() == (0, 0, "server_error")


@pytest.mark.parametrize("header, seconds", [
    ("7", 7), ("1", 1), ("0", 0), ("10", 10), ("11", 10), ("86400", 10), ("-3", 0), (None, 5),
    ("", 5), ("soon", 5), ("1.5", 5), ("0x3", 5), ("9" * 99, 10), (http_date(4), 4),
    (http_date(0), 0), (http_date(-60), 0), (http_date(3600), 10), (http_date(10**9), 10),
    ("Thursday, 01-Jan-26 00:00:06 GMT", 6), ("Thu Jan  1 00:00:03 2026", 3),
    ("5 Jan , 10", 5), ("Jan 3 , 2026 00:00:03 3 2026", 5), ("Thu, 99 Foo 2026 00:00:03 GMT", 5),
    ("Thu, 01 Jan 99999 00:00:03 GMT", 5)])
def test_retry_after_is_clamped_to_10_seconds(header, seconds):
    assert s.retry_delay(429, header, 1767225600.0) == seconds


@pytest.mark.parametrize("header", [None, "7", "soon"])
def test_which_statuses_are_tried_again_after_how_long(header):
    waits = {status: s.retry_delay(status, header, 0) for status in range(600) if status != 429}
    assert {status: wait for status, wait in waits.items() if wait is not None} == {
        502: 2, 503: 2, 504: 2}


TOO_LARGE = [  # events, answers; the sizes of the bodies, the result, what the next run sends
    (BATCH, [answer(413)], [BATCH, BATCH // 2, BATCH // 2], "ok", 0),
    (BATCH, [answer(413)] * 2, [BATCH, BATCH // 2] + [BATCH // 4] * 4, "ok", 0),
    (2, [answer(413)] * 2, [2, 1], "server_error", 2),
    (2, [answer(413), OK, answer(413)], [2, 1, 1], "server_error", 1),
    (1, [answer(413)], [1], "server_error", 1),
    (2, [answer(413), answer(503), answer(413), OK], [2, 1, 1], "server_error", 2)]


@pytest.mark.parametrize("count, script, expected, result, left", TOO_LARGE)
def test_413_for_several_events_halves_them_and_goes_on(home, count, script, expected, result, left):
    sent = home.fill(count)
    backend = synced(home, *script)
    assert sizes(backend) == expected
    assert home.results()[2] == result and sessions(synced(home)) == sent[count - left:]


@pytest.mark.parametrize("large, limit, requests", [(None, 20000, 20), (200, 100000, 14)])
def test_413_costs_few_requests(home, large, limit, requests):
    home.log("usage", *[usage(number, user_intent="x" * 90000 * (number == large))
                        for number in range(1000)])
    backend = synced(home, *[limited(limit)] * 60)
    assert home.is_done() and len(backend.requests) <= requests + 3


@pytest.mark.skipif(not posix, reason="Windows drops what was received before a reset")
@pytest.mark.parametrize("tls", [False, True], ids=["http", "TLS"])
@pytest.mark.parametrize("script, result, requests", [
    ([answer(401)], "auth_failed", 1), ([answer(403)], "server_error", 1),
    ([answer(413)], "ok", 3), ([answer(429, Retry_After=0)] * 2, "server_error", 2),
    ([bare(401)], "auth_failed", 1), ([bare(413)], "ok", 3)],
    ids=["401", "403", "413", "429", "401 without length", "413 without length"])
def test_an_answer_before_the_end_of_the_body_counts(home, tls, script, result, requests):
    home.log("usage", *[usage(number, user_intent="x" * 5000) for number in range(90)])
    with FakeBackend(*script, context=tls_context() if tls else None) as backend:
        backend.early_above = 300000
        home.configure(baseUrl=backend.url)
        assert home.run(shim=NARROW, SSL_CERT_FILE=CERTIFICATE) == SILENT
    assert (home.results()[2], len(backend.requests)) == (result, requests)


def test_kept_tls_connections_closed_without_a_word_fail_no_batch(home):
    sent = home.fill(4 * BATCH)
    script = [reply_and_close, reply_and_close_later, OK, DROP]
    with FakeBackend(*script, context=tls_context()) as backend:
        home.configure(baseUrl=backend.url)
        assert home.run(SSL_CERT_FILE=CERTIFICATE) == SILENT
    assert sessions(backend) == sent + sent[3 * BATCH:] and home.is_done()


def test_a_kept_connection_that_times_out_is_not_asked_again(home, hold, monkeypatch):
    monkeypatch.setattr(s, "REQUEST_SECONDS", 0.2)
    home.fill(BATCH + 1)
    backend = synced(home, OK, hold)
    assert (sizes(backend), home.results()[2]) == ([BATCH, 1], "network_error")
    assert sessions(synced(home)) == names("s", BATCH) and home.is_done()


def test_what_a_server_says_unasked_is_no_answer(home, monkeypatch):
    sent, save = home.fill(BATCH + 1), s.State.save
    monkeypatch.setattr(s.State, "save", lambda *args: (time.sleep(0.05), save(*args)))
    assert sizes(synced(home, reply_twice, answer(500))) == [BATCH, 1]
    assert home.results()[2] == "server_error" and sessions(synced(home)) == sent[BATCH:]


@pytest.mark.parametrize("trust, host, result", [
    (False, "127.0.0.1", "network_error"), (True, "localhost", "network_error"),
    (True, "127.0.0.1", "ok")], ids=["self-signed", "of another host", "trusted"])
def test_a_certificate_must_verify(home, tls_backend, trust, host, result):
    sent = home.fill(BATCH + 1, 1)
    home.configure(baseUrl=tls_backend.url.replace("127.0.0.1", host))
    assert home.run(https_proxy=None, SSL_CERT_FILE=CERTIFICATE if trust else None) == SILENT
    assert home.results()[2] == result
    assert sessions(tls_backend) == (sent if result == "ok" else [])


# Proxies, and where the token must not go.

@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
@pytest.mark.parametrize("login, header", [
    ("", None), ("me:w%40rd@", b"Basic bWU6d0ByZA=="), ("me:a@:%25@", b"Basic bWU6YUA6JQ==")])
def test_the_token_stays_in_the_tunnel_of_a_proxy(home, tls_backend, variable, login, header):
    sent = home.fill(BATCH + 1)
    home.configure(baseUrl=tls_backend.url)
    with Proxy() as proxy:
        url = proxy.url(login).replace("127.0.0.1", "localhost")
        environ = {"https_proxy": None, variable: url, "no_proxy": ""}
        said = home.run("-v", SSL_CERT_FILE=CERTIFICATE, **environ)
    assert sessions(tls_backend) == sent and home.is_done()
    assert b"bytes to localhost:%d: HTTP 200" % proxy.server_address[1] in said.err
    head, = proxy.heads
    assert head.startswith(b"CONNECT 127.0.0.1:%d HTTP/1." % tls_backend.port)
    assert re.findall(b"Proxy-Authorization: (.*)\r\n", head) == [header] * (header is not None)
    assert len(proxy.seen) > 1000
    assert TOKEN.encode() not in head + bytes(proxy.seen) and b"Bearer" not in head
    assert not any(name.lower().startswith("proxy") for request in tls_backend.requests
                   for name in request.headers)
    assert tls_backend.requests[0].headers["Authorization"] == "Bearer " + TOKEN


@pytest.mark.parametrize("no_proxy, used", [
    ("", 1), ("example.com", 1), ("127.0.0.1", 0), ("*", 0), ("example.com, 127.0.0.1", 0)])
def test_a_proxy_without_a_scheme_is_used_and_no_proxy_honoured(home, tls_backend, no_proxy,
                                                                used):
    sent = home.fill(1)
    home.configure(baseUrl=tls_backend.url)
    with Proxy() as proxy:
        home.run(https_proxy=proxy.url().replace("http://", ""), no_proxy=no_proxy,
                 SSL_CERT_FILE=CERTIFICATE)
        assert sessions(tls_backend) == sent and len(proxy.heads) == used


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "http://:x", "http://a b", "://",
                                 "http://127.0.0.1:99999", "socks5://127.0.0.1:1", "http://[::1"])
def test_a_proxy_that_is_no_good_is_a_network_error(home, tls_backend, url):
    home.fill(1)
    home.configure(baseUrl=tls_backend.url)
    assert home.run(https_proxy=url, no_proxy="") == SILENT
    assert tls_backend.requests == [] and home.results() == (0, 0, "network_error")


def test_plain_http_on_this_machine_goes_through_no_proxy(home):
    sent = home.fill(1)
    with Proxy() as proxy, FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        variables = "http_proxy", "https_proxy", "all_proxy"
        home.run(no_proxy="", **{name: proxy.url() for name in variables})
        assert sessions(backend) == sent and proxy.heads == []


PRIVATE = REMOVED + ["device_id", "installation_id", "of_tomorrow"]
ECHOES = {
    "ok": OK, "401": answer(401, TOKEN.encode()), "500": answer(500, TOKEN.encode()),
    "429": answer(429, Retry_After="0", X_Token=TOKEN), "json": answer(200, {"code": TOKEN}),
    "redirect": answer(302, Location=NOWHERE + "/" + TOKEN),
    "html": answer(200, b"<html>" + TOKEN.encode()),
    "status line": lambda handler: handler.wfile.write(b"HTTP/1.1 500 " + TOKEN.encode() +
                                                       b"\r\nContent-Length: 0\r\n\r\n"),
    "no HTTP": lambda handler: handler.wfile.write(TOKEN.encode() + b"\r\n\r\n"),
    "version": lambda handler: handler.wfile.write(b"HTTP/" + TOKEN.encode() + b" 200 OK\r\n\r\n")}


@pytest.mark.parametrize("reply", sorted(ECHOES))
def test_token_and_private_fields_show_up_nowhere(home, reply):
    secret = {field: "PRIVATE-" + field for field in PRIVATE}
    home.log("usage", usage(1, **secret))
    home.log("feedback", feedback(1, **secret))
    with FakeBackend(default=ECHOES[reply]) as backend:
        home.configure(baseUrl=backend.url, telemetry="anonymous")
        flags = ["--dry-run", "-v", "--status", "--pending"] if reply == "ok" else ["-v"]
        for flag in flags:
            result = home.run(flag)
            shown = result.out + result.err + (json.dumps(home.offsets()).encode())
            assert not any(text in shown for text in (
                TOKEN.encode(), b"PRIVATE", b"device-42", b"Traceback"))
        assert backend.requests and not any(
            b"PRIVATE" in request.body or b"device-42" in request.body
            for request in backend.requests)


# Time: of a run, of a request, of a connect.

BUSY = [  # seconds: of an answer, of the run; the requests of 5 batches that are begun
    (3, 10, 2), (9, 30, 3), (4.9, 30, 5), (1, 10, 5), (6, 16.1, 2), (6, 15.9, 1), (40, 30, 1)]


@pytest.mark.parametrize("answering, seconds, begun", BUSY)
def test_no_request_is_begun_that_would_have_to_be_cut_short(home, answering, seconds, begun):
    sent = home.fill(4 * BATCH, 1)
    clock = FakeClock()

    def answer_slowly():
        clock.passed += answering

    backend = synced(home, *[then(answer_slowly)] * 5, clock=clock, seconds=seconds)
    assert len(backend.requests) == begun
    if begun < 5:
        assert backend.said[-1] == "too little time is left for another request"
        assert home.results() == (0, 0, "network_error")
    assert sessions(synced(home)) == sent[begun * BATCH:] and home.is_done()


@pytest.mark.parametrize("first, seconds, waits, result", [
    (answer(429, Retry_After=9), 9, [], "server_error"), (answer(503), 2, [], "server_error"),
    (answer(429, Retry_After=9), 9.1, [9], "ok"), (answer(503), 2.1, [2], "ok")])
def test_a_wait_that_the_time_does_not_allow_is_not_begun(home, first, seconds, waits, result):
    home.fill(1)
    clock = FakeClock()
    backend = synced(home, first, clock=clock, seconds=seconds)
    assert (clock.slept, home.results()[2]) == (waits, result)
    assert len(backend.requests) == 1 + len(waits)


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
STREAMS = {  # how an answer begins, and what then comes again and again
    "a status line": (b"HTTP/1.1 200 ", b"x"), "headers": (HEAD, b"X-Many: x\r\n"),
    "a header": (HEAD + b"X-Long: ", b"x"), "100 for ever": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": (HEAD + b"\r\n", b" "), "chunks": (CHUNKED, b"1\r\n \r\n"),
    "a body of 10 TB": (HEAD + b"Content-Length: 9999999999999\r\n\r\n", b" "),
    "a chunk of 2 GB": (CHUNKED + b"7fffffff\r\n", b" "), "a chunk of -1": (CHUNKED + b"-1\r\n", b" ")}


def test_servers_that_drip_are_left_in_time(tmp_path):
    with contextlib.ExitStack() as stack:
        runs = []
        for number, (head, piece) in enumerate([(b"", b""), *STREAMS.values()]):
            backend = stack.enter_context(FakeBackend(OK, pour(head, piece, 0.05)))
            home = Home(tmp_path / str(number), backend.url)
            sent = home.fill(BATCH + 1)
            runs.append((home, home.spawn("-v", "--max-time", SOON)))
        for home, run in runs:
            assert wait(run).err.endswith(b"HTTP 200, code 0, ok\nsecondme_sync: time is up\n")
            assert home.results() == (0, 0, "network_error")
    for home, run in runs:
        assert sessions(synced(home)) == sent[BATCH:] and home.is_done()


@needs_limits
@pytest.mark.parametrize("name", sorted(STREAMS))
def test_an_endless_answer_takes_little_memory(home, name):
    home.fill(1)
    head, piece = STREAMS[name]
    with FakeBackend(pour(head, piece * 10000, 0)) as backend:
        home.configure(baseUrl=backend.url)
        process = home.spawn("--max-time", "1")
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        assert (status,) + process.communicate() == (0, b"", b"")
    mebibytes = used.ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    assert mebibytes < 400  # on Linux it counts the test process too, which PyPy makes large
    assert home.results() == (0, 0, "network_error")


@needs_signals
def test_a_stderr_that_nobody_reads_does_not_keep_a_run(home, hold):
    home.fill(1)
    with useless("full pipe") as end, FakeBackend(hold) as backend:
        home.configure(baseUrl=backend.url)
        run = home.spawn("-v", "--max-time", "0.5", options={"stderr": end})
        assert wait(run, 20).code == 0


def test_one_request_takes_10_seconds_at_most(home, hold):
    home.fill(1)
    with FakeBackend(hold) as backend:
        home.configure(baseUrl=backend.url)
        said = home.run("-v", "--max-time", "3600", shim=FAST).err
    assert said == b"secondme_sync: time is up\n" and len(backend.requests) == 1
    assert home.results() == (0, 0, "network_error")


def test_a_long_run_is_not_ended_between_its_requests(home):
    sent = home.fill(2 * BATCH)
    with FakeBackend(after(0.2, answer(429, Retry_After=10))) as backend:
        home.configure(baseUrl=backend.url)
        assert home.run("--max-time", "3600", shim=FAST) == SILENT
    assert sessions(backend) == sent[:BATCH] + sent and home.is_done()


HANGS = {  # before the first request
    "names": "import socket\nsocket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)",
    "proxies": "import urllib.request\nurllib.request.proxy_bypass = lambda host: time.sleep(60)",
    "getting proxies": "import urllib.request\nurllib.request.getproxies = lambda: time.sleep(60)",
    "lines": ""}


def test_what_hangs_before_the_first_request_is_left_in_time(tmp_path):
    runs = []
    for name, shim in HANGS.items():
        home = Home(tmp_path / name, "https://127.0.0.1:9")
        if name != "lines":
            sent = home.fill(1)
        else:
            home.append("usage", b"x\n" * 3000000)
        runs.append((home, home.spawn("-v", "--max-time", SOON, shim="import time\n" + shim,
                                      no_proxy="")))
    for home, run in runs:
        assert wait(run) == Result(0, b"", b"secondme_sync: time is up\n")
        assert home.results() == (0, 0, "network_error")
    assert sessions(synced(runs[0][0])) == sent and runs[0][0].is_done()


def test_a_dead_address_of_a_host_costs_4_seconds_not_the_run(home, monkeypatch):
    sent = home.fill(1)
    seen, create, during = [], socket.create_connection, []

    def watched(address, timeout, *args):
        seen.append((timeout, create(address, timeout, *args)))
        return seen[0][1]

    monkeypatch.setattr(s, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(socket, "create_connection", watched)
    with dead_first_address(monkeypatch):
        backend = synced(home, then(lambda: during.append(seen[0][1].gettimeout())))
    assert sessions(backend) == sent and home.is_done()
    assert ([seen[0][0]], during) == ([0.3], [s.REQUEST_SECONDS])


# Killed at any moment, any call failing, consent withdrawn.

@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_a_run_killed_at_an_answer_repeats_that_batch_alone(home, answered):
    sent, runs = home.fill(3 * BATCH), []

    def kill(handler):
        if answered:
            handler.reply(*OK)
        runs[0].kill()

    with FakeBackend(after(0.2), kill) as backend:
        home.configure(baseUrl=backend.url)
        runs.append(home.spawn())
        wait(runs[0])
        assert home.run() == SILENT
    assert set(sessions(backend)) == set(sent) and home.is_done()
    assert repeats(sessions(backend)) in ((0, BATCH) if answered else (BATCH,))


CALLS = {"os.open": 1, "os.fsync": 6, "builtins.open": 12, "fcntl.flock": 1, "os.fstat": 4}  # in a run


@needs_signals
@pytest.mark.parametrize("how", ["fail", "kill before", "kill after"])
@pytest.mark.parametrize("call", sorted(CALLS))
def test_a_call_that_fails_or_is_the_last_loses_and_repeats_nothing(home, call, how):
    home.log("usage", 9000)
    home.main("--skip-pending")
    home.log("usage", 9001)
    synced(home)
    sent = home.fill(BATCH + 20, 90)  # what is before these may not be sent again
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        for nth in range(1, CALLS[call] + 1, 1 if how == "fail" else 3):
            sent += names("s", 7000 + nth)
            home.log("usage", 7000 + nth)
            result = home.run(shim=TROUBLE.format(call=call, nth=nth, how=how))
            assert result == SILENT or how != "fail" and result == (-signal.SIGKILL, b"", b"")
            assert home.offsets() is None or isinstance(home.offsets(), dict)
        assert home.run() == SILENT
    assert sorted(sessions(backend)) == sorted(sent) and home.is_done()


WITHDRAWALS = [  # how, the answer meanwhile
    ("off", lambda home: home.configure(telemetry="off"), OK),
    ("no file", lambda home: home.find("config").unlink(), OK),
    ("before a retry", lambda home: home.configure(telemetry="off"), answer(503)),
    ("logged out", no_credentials, OK),
    ("another login", lambda home: home.write("credentials", {"accessToken": "other"}), OK),
    ("lowered", lambda home: home.configure(telemetry="anonymous"), OK)]


@table(WITHDRAWALS, "name", "withdraw", "reply")
def test_consent_withdrawn_in_mid_run_ends_it(home, name, withdraw, reply):
    sent = home.fill(BATCH + 50, 50)
    first = synced(home, then(lambda: withdraw(home), reply))
    assert (sizes(first), first.said[-1]) == ([BATCH], "config or login has changed")
    assert first.connections == 1
    assert home.results() == (0, 0, "network_error")
    if name == "lowered":
        assert modes(synced(home)) == [("anonymous", 100)]
        return
    if name != "another login":
        assert home.sync()[0].startswith(("telemetry is off", "not logged in"))
    home.write("config", {"telemetry": "community"})
    home.write("credentials", {"accessToken": TOKEN})
    assert sessions(synced(home)) == sent[BATCH * (reply == OK):] and home.is_done()


def test_consent_and_login_are_looked_at_on_both_sides_of_a_connect(home, monkeypatch):
    home.fill(1)
    connect, locked = http.client.HTTPConnection.connect, s.locked_state
    with monkeypatch.context() as patches:
        patches.setattr(http.client.HTTPConnection, "connect", lambda link: (
            home.configure(telemetry="off"), connect(link)))
        backend = synced(home)
    assert (backend.requests, backend.said) == ([], ["config or login has changed"])
    home.configure(telemetry="community")
    monkeypatch.setattr(s, "locked_state", lambda folder: (no_credentials(home), locked(folder))[1])
    backend = synced(home)
    assert (backend.connections, backend.said) == (0, ["config or login has changed"])


def test_nothing_is_asked_again_without_consent_or_time(home):
    sent, clock = home.fill(BATCH + 1), FakeClock()

    def dawdle(handler):
        clock.passed += 20

    first = synced(home, OK, lambda handler: home.configure(telemetry="off"))
    assert (sizes(first), first.said[-1]) == ([BATCH, 1], "config or login has changed")
    home.configure(telemetry="community")
    home.fill(BATCH)
    second = synced(home, OK, dawdle, clock=clock)
    assert (sizes(second), second.said[-1][:15]) == ([BATCH, 1], "too little time")
    assert sessions(synced(home)) == sent[BATCH - 1:BATCH]


# The command line.

def test_a_dry_run_prints_the_bodies_of_the_next_run_byte_for_byte(home):
    home.fill(BATCH + 30)
    home.log("feedback", *[feedback(n, comment="\u8bb0" * 50000) for n in range(5)])
    home.append("feedback", b'{"comment": "\\ud83d \xff \\u2028"}\nno event\n{"torn')
    synced(home, OK, answer(500))
    before = home.snapshot()
    printed = home.main("--dry-run").out.split(b"\n")
    assert home.snapshot() == before
    backend = synced(home)
    assert [request.body for request in backend.requests] + [b""] == printed
    assert sessions(backend)[:30] == names("s", *range(BATCH, BATCH + 30)) and len(printed) > 2


@pytest.mark.parametrize("change", [no_consent, no_credentials, None, "SM_TEL"])
@pytest.mark.parametrize("mode", sorted(BODIES))
def test_a_person_can_look_before_agreeing(home, change, mode):
    home.log("usage", 7)
    home.log("feedback", 8)
    if callable(change):
        change(home)
    before = home.snapshot()
    environ = {"SM_TEL": "off"} if change == "SM_TEL" else {}
    result = home.main("--dry-run", mode, **environ)
    assert json.loads(result.out.decode("utf-8")) == BODIES[mode]
    now = b"a sync would send what is pending\n" if change is None else b"a sync would send nothing: "
    assert now in result.err and home.snapshot() == before


@pytest.mark.skipif(not posix, reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("encoding, intent", [
    ("utf-8", USAGE_TEXT["user_intent"]), ("ascii", "\\u67e5\\u770b")])
def test_on_a_terminal_a_dry_run_is_indented(home, encoding, intent):
    import pty
    home.log("usage", 7)
    ours, theirs = pty.openpty()
    process = home.spawn("--dry-run", options={"stdout": theirs}, PYTHONIOENCODING=encoding)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while b"\n}" not in shown:
            shown += os.read(ours, 65536)
    os.close(ours)
    assert wait(process).code == 0 and b'\n  "telemetryMode": "community"' in shown
    assert '"user_intent": "' + intent in shown.decode("utf-8")


STATUS = [  # what is so; what --status says of it
    (None, {}, ["\ntelemetry: community (telemetry in config is \"community\")\n",
                "\nlogged in: yes\npending:   2 usage, 1 feedback events\nlast sync: never\n"
                "now:       a sync would send what is pending\n"]),
    (no_consent, {}, ['off (telemetry in config is "off")', "nothing: telemetry is off: telem"]),
    (lambda home: home.configure(telemetry="Community"), {}, ['off (telemetry in config is "Comm']),
    (lambda home: home.configure(telemetry=True), {}, ["off (telemetry in config is true)"]),
    (lambda home: home.find("config").unlink(), {}, ["off (there is no readable config)"]),
    (lambda home: home.write("config", '{"telemetry": "community",}'), {},
     ["off (config is not a JSON object)"]),
    (None, {"SM_TEL": "on"}, ['off (SM_TEL is "on")']),
    (None, {"SM_TEL": "anonymous"}, ['anonymous (SM_TEL is "anonymous")', "2 usage, 1 feedback e"]),
    (None, {"DO_NOT_TRACK": "1"}, ['off (DO_NOT_TRACK is "1")']),
    (no_credentials, {}, ["logged in: no\n", "nothing: not logged in\n"]),
    (lambda home: home.configure(baseUrl="http://me:word@example.test"), {},
     ["endpoint:  refused", "baseUrl must be https"]),
    (unreadable, {}, ["unreadable usage, 1 feedback events"]),
    (lambda home: [run_in("anonymous", answer(503), answer(503))(home), log_more(home),
                   home.configure(telemetry="community", baseUrl=NOWHERE)], {},
     ["5 usage, 2 feedback events, 3 of them as anonymous", "last sync: server_error 20"]),
    (lambda home: home.main("--skip-pending"), {}, [
        "0 usage, 0 feedback", "last sync: skipped 20", "nothing: nothing is pending"]),
    (lambda home: synced(home), {}, ["0 usage, 0 feedback", "last sync: ok 20"]),
    (lambda home: shutil.rmtree(str(home.dir)), {}, [
        "off (there is no readable config)", s.BASE_URL + s.PATH, "logged in: no",
        "0 usage, 0 feedback events", "last sync: never"])]


@pytest.mark.parametrize("change, environ, said", STATUS)
def test_status_tells_how_things_stand_and_why(home, change, environ, said):
    home.fill(2, 1)
    if change:
        change(home)
    before = home.snapshot()
    result = home.main("--status", **environ)
    text = result.out.decode("ascii").replace("\r\n", "\n")
    assert (result.code, result.err, home.snapshot()) == (0, b"", before)
    assert [part for part in ["directory: %s\n" % home.dir] + said if part not in text] == []
    assert TOKEN not in text and "word" not in text and text.count("\n") == 7
    assert ("as anonymous" in text) is ("as anonymous" in "".join(said))
    dry = home.main("--dry-run", **environ)  # prints the bodies, or why there is none
    assert (dry.code, dry.err) == (0, result.out)
    assert bool(dry.out) is ("now:       a sync would send what is pending" in text)


def test_status_shows_any_directory_on_any_terminal(home):
    folder = home.path / "家"
    folder.mkdir()
    result = home.run("--status", "--dir", str(folder), LC_ALL="C", PYTHONUTF8="0",
                      PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    assert (result.code, result.err, b"\\u" in result.out) == (0, b"", True)
    shown = home.run("--status", "--dir", str(folder), PYTHONIOENCODING="utf-8").out
    assert "家".encode("utf-8") in shown or not posix


PENDING = [  # name, change, environment, answer, why
    ("nothing was sent yet", None, {}, "yes", ""),
    ("the run before failed", lambda home: synced(home, answer(500)), {}, "yes", ""),
    ("state of the older script", lambda home: home.write(".sync-offsets", '{"usage_bytes": 0}'),
     {}, "yes", ""),
    ("all is sent", synced, {}, "no", "nothing is pending"),
    ("all is sent, state of the older script", nothing_new, {}, "no", "nothing is pending"),
    ("no log", lambda home: home.find("usage.jsonl").unlink(), {}, "no", "nothing is pending"),
    ("empty log", lambda home: home.restart("usage"), {}, "no", "nothing is pending"),
    ("a torn line alone", lambda home: home.find("usage.jsonl").write_bytes(b'{"event": "skill_r'),
     {}, "no", "nothing is pending"),
    ("DO_NOT_TRACK=1", None, {"DO_NOT_TRACK": "1"}, "no", 'DO_NOT_TRACK is "1"')]


@table(PENDING, "name", "change", "environ", "expected", "why")
def test_pending_is_yes_or_no(home, name, change, environ, expected, why):
    home.log("usage", 1)
    if change:
        change(home)
    before = home.snapshot()
    run = home.run if name in ("nothing was sent yet", "all is sent") else home.main
    assert run("--pending", **environ) == Result(0, expected.encode() + b"\n", b"")
    said = home.main("--pending", "-v", **environ)
    assert (said.out, why in said.err.decode()) == (expected.encode() + b"\n", True)
    assert home.snapshot() == before


@pytest.mark.parametrize("mode", ["off", "anonymous", "community"])
@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token", "token"])
def test_skip_pending_keeps_what_was_logged_local_for_ever(tmp_path, mode, token):
    home = Home(tmp_path, telemetry=mode, token=token)
    home.fill(2, 1)
    torn = line(usage(7))
    home.append("usage", torn[:40])
    before = home.snapshot()
    result = home.main("--skip-pending")
    assert (result.code, result.err, result.out[:26]) == (0, b"", b"never to be sent: 2 usage,")
    assert home.changed(before) == {".sync-offsets"}
    home.configure(telemetry="community")
    home.write("credentials", {"accessToken": TOKEN})
    assert synced(home).said == ["nothing is pending"]
    home.append("usage", torn[40:])
    home.log("feedback", 5)
    assert sessions(synced(home)) == ["s-7", "f-5"] and home.is_done()
    assert b"0 usage, 0 feedback" in home.main("--skip-pending").out


@pytest.mark.parametrize("change, reason", [
    (lambda home: home.state.mkdir(), "cannot be recorded"),
    (lambda home: [synced(home), foreign(home, 700), unreadable(home)], "is skipped: unreadable"),
    (lambda home: shutil.rmtree(str(home.analytics)), "cannot be recorded: No such file")])
def test_skip_pending_that_fails_says_why(home, change, reason):
    home.fill(1)
    change(home)
    before = home.snapshot()
    result = home.main("--skip-pending")
    assert (result.code, result.out, result.err.count(b"\n")) == (1, b"", 1)
    assert reason in result.err.decode() and b"secondme_sync: stopped: " in result.err
    assert home.snapshot() == before


def test_another_directory_is_given_with_dir(home):
    other = Home(home.path / "other")
    other.log("usage", 2)
    home.fill(1)
    with FakeBackend(OK, OK, default=None) as backend:
        other.configure(baseUrl=backend.url)
        assert home.run("--dir", os.path.join("other", ".secondme")) == SILENT
        other.log("usage", 3)
        assert home.run("--dir=~/other/.secondme") == SILENT
    assert sessions(backend) == ["s-2", "s-3"] and other.is_done() and home.offsets() is None


VERBOSE = [  # answers, what -v says
    ([OK], [r"\d+ bytes to 127.0.0.1:\d+: HTTP 200, code 0, ok"]),
    ([answer(429, Retry_After=0), answer(401, {"code": 40101})], [
        "HTTP 429, code None, server_error", "retry in 0 s", "HTTP 401, code 40101, auth_failed"]),
    ([answer(200, {"code": 1001})], ["HTTP 200, code 1001, server_error"]),
    ([answer(200, b"<html>")], ["HTTP 200, code None, network_error"]),
    ([DROP], [r"stopped: network_error, no answer \(RemoteDisconnected\) from 127.0.0.1:\d+$"])]


@pytest.mark.parametrize("script, said", VERBOSE)
def test_verbose_says_what_was_answered_by_whom_or_that_nothing_was(home, script, said):
    home.fill(1)
    with FakeBackend(*script, default=None) as backend:
        home.configure(baseUrl=backend.url)
        result = home.run("-v" if script == [OK] else "--verbose")
    lines = result.err.decode("ascii").splitlines()
    assert (result.code, result.out, len(lines)) == (0, b"", len(said))
    assert [part for part, text in zip(said, lines)
            if not re.search("^secondme_sync: .*" + part, text)] == []


def test_version_and_help_are_printed(home):
    version, told = home.run("--version"), home.run("--help", COLUMNS="80")
    assert version.out.split() == [b"secondme_sync", s.VERSION.encode()]
    assert (told.code, told.err, version.code, version.err) == (0, b"", 0, b"")
    lines, path = told.out.decode("ascii").splitlines(), ROOT / "fixtures" / "help.txt"
    assert lines[:2] + lines[3:] == path.read_text().splitlines()  # [2] depends on the Python


@pytest.mark.parametrize("flags", [
    ["--unknown"], ["word"], ["--max-time", "soon"], ["--max-time", "0"], ["--max-time", "-5"],
    ["--max-time", "nan"], ["--max-time", "inf"], ["--max-time"], ["--dir"], ["--dir", ""],
    ["--dir="], ["--skip"], ["--dry"], ["--stat"], ["--pend"], ["--back"], ["--verb"],
    ["--pending", "--status"], ["--dry-run", "off"], ["--dry-run", "--skip-pending"]], ids=" ".join)
def test_misuse_exits_with_2_and_does_nothing(home, flags):
    home.fill(1)
    before = home.snapshot()
    result = home.main(*flags)
    assert (result.code, result.out, home.snapshot()) == (2, b"", before)
    assert b"usage: " in result.err and b"Traceback" not in result.err


# In the background.

@pytest.mark.parametrize("shim", ["", AS_PASTED], ids=["file", "pasted"])
def test_background_returns_before_the_server_answers_and_delivers_later(home, shim):
    if shim and not posix:
        pytest.skip("pasted on Windows, it works in the foreground")
    sent, hold = home.fill(1), threading.Event()
    begin, end = os.pipe()
    with FakeBackend(lambda handler: hold.wait(30) and handler.reply(*OK)) as backend:
        home.configure(baseUrl=backend.url)
        options = {"pass_fds": [end]} if posix else {}
        assert home.run("--background", shim=shim, options=options) == SILENT
        os.close(end)
        until(lambda: backend.requests)
        assert os.read(begin, 1) == b""  # no pipe of its caller is held, or this would hang
        assert home.results() == (0, 0, "network_error")
        hold.set()
        until(lambda: home.results()[2] == "ok")
    os.close(begin)
    assert sessions(backend) == sent


@needs_bash
@pytest.mark.parametrize("start", [
    '"$0" -I /dev/stdin --background < "$1"', '"$0" -I <(cat "$1") --background',
    '(exec -a nowhere "$0" -I "$1" --background)',
    'mkdir gone && cd gone && rmdir ../gone && "$0" -I - --background < "$1"'])
def test_background_works_however_the_script_is_started(home, start):
    sent = home.fill(1)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        command = ["bash", "-c", start, sys.executable, str(SCRIPT)]
        assert wait(home.start(command)) == SILENT
        until(lambda: backend.requests and home.is_done())
    assert sessions(backend) == sent


@needs_fork
def test_background_is_a_new_interpreter_of_its_own_session_and_streams(home):
    home.fill(1)
    home.run("--background", "--max-time", "7", shim=TELL, options={"stdin": subprocess.PIPE})
    told = home.dir / "all told"
    until(told.exists)
    command, leads, folder, streams = ast.literal_eval(told.read_text())
    assert command == [sys.executable, "-I", str(SCRIPT), "--dir", str(home.dir),
                       "--max-time", "7.0"]
    assert (leads, os.path.realpath(folder)) == (True, os.path.realpath(str(home.dir)))
    assert streams == [(True, True)] * 3


@needs_fork
@pytest.mark.parametrize("shim", ["", AS_PASTED], ids=["file", "pasted"])
@pytest.mark.parametrize("change, expected", [
    (None, b"forked"), (no_consent, b""), (no_credentials, b""), (nothing_new, b"")])
def test_background_makes_a_process_only_where_there_is_something_to_do(home, shim, change, expected):
    home.fill(1)
    if change:
        change(home)
    # and nothing that it imports could have started threads or looked up names by then
    assert home.run("--background", shim=NO_FORK + shim) == Result(0, expected, b"")


# Streams, locale, warnings, signals.

@pytest.mark.skipif(not posix, reason="Windows has no /bin/sh to close streams")
@pytest.mark.parametrize("closed, flags", [
    ("<&-", ""), ("2>&-", "-v"), (">&-", "--dry-run"), (">&-", "--status"), (">&-", "--pending"),
    ("2>&-", "--dry-run"), ("<&- >&- 2>&-", ""), ("<&- >&- 2>&-", "-v"),
    ("<&- >&- 2>&-", "--background")])
def test_closed_streams_are_no_fault(home, closed, flags):
    sent = home.fill(1, 1)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        command = ["sh", "-c", 'exec "$0" "$@" ' + closed, sys.executable, str(SCRIPT)]
        result = wait(home.start(command + flags.split()))
        assert result.code == 0 and b"Traceback" not in result.err
        if flags in ("", "-v", "--background"):
            until(lambda: home.offsets() and home.is_done())
    assert sessions(backend) == (sent if flags in ("", "-v", "--background") else [])


@pytest.mark.parametrize("kind, unbuffered", [
    ("closed pipe", ""), ("closed pipe", "1"), ("full disk", "")])
@pytest.mark.parametrize("stream, flag", [
    ("stderr", "-v"), ("stderr", "--dry-run"), ("stdout", "--dry-run"), ("stdout", "--status"),
    ("stdout", "--pending"), ("stdout", "--skip-pending")])
def test_a_stream_that_takes_nothing_is_no_fault(home, stream, flag, kind, unbuffered):
    home.fill(BATCH + 1)
    with useless(kind) as end, FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        result = home.run(flag, options={stream: end}, PYTHONUNBUFFERED=unbuffered)
    told = result.err or b""
    if flag == "--dry-run" and stream == "stdout":
        told = told[told.index(b"now:"):].partition(b"\n")[2]  # behind the report
    assert result.code in (0, flag == "--skip-pending") and told.count(b"\n") == result.code
    assert home.is_done() or flag != "-v"


def test_what_head_leaves_unread_is_no_fault(home):
    home.fill(50 * BATCH)
    process = home.spawn("--dry-run")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 0 and err.count(b"\n") == 7


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--status"], ["-v"]], ids=" ".join)
def test_a_locale_without_utf8_is_no_fault(home, flags):
    home.fill(1, 1)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        locale = dict(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        result = home.run(*flags, **locale)
        assert result.code == 0 and b"Error" not in result.err and (flags or result == SILENT)
        assert home.run(**locale) == SILENT
    assert backend.events()[0]["user_intent"] == usage(0)["user_intent"] and home.is_done()


@pytest.mark.parametrize("reply", [OK, answer(500), answer(200, b" " * 200000), DROP, answer(401)],
                         ids=["ok", "500", "long", "drop", "401"])
def test_python_at_its_strictest_warns_of_nothing(home, reply):
    sent = home.fill(BATCH + 50, 1)
    command = [sys.executable, "-X", "dev", "-W", "error", str(SCRIPT)]
    with FakeBackend(OK, reply) as backend:
        home.configure(baseUrl=backend.url)
        for flags in [], [], ["--pending"], ["--background"]:
            result = wait(home.start(command + flags, {"PYTHONWARNDEFAULTENCODING": "1"}))
            assert (result.code, result.err) == (0, b"")
    assert set(sessions(backend)) == set(sent) and home.is_done()


@needs_signals
@pytest.mark.parametrize("name, code", [("SIGINT", 0), ("SIGTERM", -15), ("SIGHUP", -1)])
@pytest.mark.parametrize("retrying", [False, True], ids=["answer", "retry"])
def test_a_signal_ends_a_waiting_run_at_once_and_silently(home, hold, name, code, retrying):
    sent = home.fill(BATCH + 50)
    waits = then(hold.arrived.set, answer(429, Retry_After=10)) if retrying else hold
    with FakeBackend(OK, waits) as backend:
        home.configure(baseUrl=backend.url)
        run = home.spawn(options={"preexec_fn": default_signals})
        assert hold.arrived.wait(20)
        time.sleep(0.2 * retrying)
        run.send_signal(getattr(signal, name))
        assert wait(run, 8) == (code, b"", b"")
        assert home.results()[:2] == (0, 0) and len(backend.requests) == 2
    assert sessions(synced(home)) == sent[BATCH:] and home.is_done()


@needs_signals
@pytest.mark.parametrize("flags, code", [([], 0), (["--skip-pending"], 1)], ids=["sync", "skip"])
def test_ctrl_c_while_it_imports_shows_nothing(home, flags, code):
    shim = "import builtins\nreal = __import__\ndef stopped(name, *args):\n    if name == 'zlib':\n" \
        "        raise KeyboardInterrupt\n    return real(name, *args)\nbuiltins.__import__ = stopped\n"
    assert home.run(*flags, shim=shim) == Result(code, b"", b"")


# The file: pasted, vendored, imported.

@needs_bash
@pytest.mark.parametrize("command", [
    "- <<'SYNC_EOF'", "<<'SYNC_EOF'", "<< 'SYNC_EOF'", "-I - <<'SYNC_EOF'", "<<SYNC_EOF",
    "- --max-time 20 <<SYNC_EOF", "- --background <<'SYNC_EOF'"])
def test_a_pasted_script_syncs(home, command):
    sent = home.fill(BATCH + 1)
    with FakeBackend(OK, OK, default=None) as backend:
        home.configure(baseUrl=backend.url)
        assert paste(home, command) == SILENT
        until(lambda: home.offsets() and home.is_done())
    assert sessions(backend) == sent


@needs_bash
@pytest.mark.parametrize("flag", ["--dry-run", "--pending", "--status", "--help", "--unknown"])
def test_a_pasted_script_takes_flags_as_the_file_does(home, flag):
    home.fill(1)
    assert paste(home, "- %s <<'SYNC_EOF'" % flag) == home.run(flag)
    assert paste(home, "- %s <<SYNC_EOF" % flag) == home.run(flag)


@needs_bash
@pytest.mark.parametrize("name", ["json", "http", "calendar", "socket"])
def test_a_pasted_script_imports_nothing_from_the_working_directory(home, name):
    sent = home.fill(1)
    (home.path / (name + ".py")).write_text("print('mine')\nraise SystemExit(3)\n")
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        assert paste(home, "<<'SYNC_EOF'") == SILENT
    assert sessions(backend) == sent


def test_a_vendored_copy_and_the_module_do_the_same(home):
    home.fill(1)
    copy = home.path / "skill scripts" / "telemetry.py"
    copy.parent.mkdir()
    shutil.copy(str(SCRIPT), str(copy))
    expected = home.run("--dry-run")
    assert wait(home.start([sys.executable, "-I", str(copy), "--dry-run"])) == expected
    module = [sys.executable, "-m", "secondme_sync", "--dry-run"]
    assert wait(home.start(module, cwd=str(ROOT))) == expected and expected.code == 0


def test_importing_has_no_effect(home):
    home.fill(1)
    before = home.snapshot()
    command = [sys.executable, "-c", "import secondme_sync, sys; print(sys.excepthook)"]
    result = wait(home.start(command, cwd=str(ROOT)))
    assert (result.code, b"built-in" in result.out, result.err) == (0, True, b"")
    assert home.snapshot() == before


@pytest.mark.parametrize("harmful", [
    pytest.param(rb"[^\n -~]", id="not ASCII, a tab or CR"), pytest.param(rb"\$", id="dollar"),
    pytest.param(rb"`", id="backtick"), pytest.param(rb"(?m)^\s*SYNC_EOF\s*$", id="SYNC_EOF"),
    pytest.param(rb"\\[\\\n]", id="backslash that a heredoc eats"),
    pytest.param(rb"[^\n]{101}", id="line over 100 columns"),
    pytest.param(rb"[^\n]\Z", id="no newline at the end")])
def test_the_file_has_nothing_that_pasting_would_harm(harmful):
    assert re.findall(harmful, SOURCE) == []


def test_the_file_and_its_readme_can_be_read_in_one_sitting():
    options = {"feature_version": (3, 6)} if sys.version_info >= (3, 8) else {}
    tree = ast.parse(SOURCE.decode("ascii"), **options)
    assert SOURCE.count(b"\n") <= 640 and 80 <= len(README.splitlines()) <= 200
    for part in ast.walk(tree):
        if isinstance(part, ast.FunctionDef) and sys.version_info >= (3, 8):
            assert part.end_lineno - part.lineno < 30, part.name
    known = set("argparse codecs contextlib email fcntl http json msvcrt os re select socket "
                "subprocess sys time urllib zlib _thread".split())
    imported = {name.split(".")[0] for part in ast.walk(tree) for name in (
        [alias.name for alias in part.names] if isinstance(part, ast.Import) else
        [part.module] if isinstance(part, ast.ImportFrom) else [])}
    assert imported <= known


# Fuzz and model, seeded.

@pytest.mark.parametrize("seed", range(10))
def test_spoiled_lines_never_cost_their_neighbours(home, seed):
    chance = random.Random(seed)
    lines = [json.dumps(usage(number), ensure_ascii=number % 3 > 0).encode() for number in range(150)]
    home.append("usage", b"".join((spoil(chance, text) if number % 2 else text) + b"\n"
                                  for number, text in enumerate(lines)))
    arrived = sessions(synced(home))
    whole = names("s", *range(0, 150, 2))
    assert [name for name in arrived if name in whole] == whole and home.is_done()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["config", "credentials", ".device-id", ".sync-offsets"])
def test_a_spoiled_file_is_no_visible_error(home, name, seed):
    home.fill(3, 3)
    synced(home)
    home.log("usage", 7)
    with FakeBackend() as backend:
        home.configure(baseUrl=backend.url)
        home.write(name, spoil(random.Random(seed), home.find(name).read_bytes()))
        home.sync()
    assert all(TOKEN.encode() not in request.body for request in backend.requests)


@pytest.mark.parametrize("seed", range(int(os.environ.get("SECONDME_MODEL_RUNS", 6))))
def test_whatever_happens_all_that_was_written_arrives(home, seed):
    play(seed, home)


# The README: its commands work word for word, and it says what the script does.

@needs_bash
def test_the_readmes_preflight_check_sets_the_skills_variable(machine):
    text = block("--pending ") + 'echo "<$SM_HAS_PENDING_SYNC>"'
    assert machine.shell(text) == (0, b"<no>\n", b"")
    machine.fill(1)
    assert machine.shell(text) == (0, b"<yes>\n", b"")
    assert machine.shell(text, path="/nowhere") == (0, b"<no>\n", b"")
    (machine.path / "bin" / "python3").write_text("#!/bin/sh\necho a stub >&2\nexit 49\n")
    assert machine.shell(text) == (0, b"<no>\n", b"")


@needs_bash
@pytest.mark.parametrize("words", ['.py" --background ', '.py" 2>', "SYNC_EOF", "hook"],
                         ids=["catch-up", "post-session", "heredoc", "hook"])
def test_the_readmes_blocks_sync_in_silence(machine, words):
    sent = machine.fill(3)
    entry = json.loads(HOOK)["hooks"]["SessionEnd"][0]["hooks"][0]
    text = entry["command"] if words == "hook" else block(words)
    with FakeBackend() as backend:
        machine.configure(baseUrl=backend.url)
        assert machine.shell(text) == SILENT
        until(lambda: machine.offsets() and machine.is_done())
    assert sessions(backend) == sent
    if words != "SYNC_EOF":
        assert machine.shell(text, path="/nowhere") == SILENT


@needs_bash
def test_the_readmes_look_before_and_skip_do_as_they_say(machine):
    machine.fill(2)
    machine.configure(telemetry=None)
    commands = re.findall(r"`(python3 secondme_sync.py --[a-z-]+[a-z ]*)`", README)
    assert len(commands) == 4
    for command in commands:
        result = machine.shell("cd .claude/skills/secondme && " + command)
        assert result.code == 0 and b"2 usage" in result.out + result.err


def test_ci_runs_the_readmes_test_command_and_sees_that_it_came_to_its_end():
    command, = [text.strip() for text in BLOCKS if "pytest" in text]
    lines = [text for text in (ROOT / ".ci" / "run").read_text().splitlines() if text[:1] != "#"]
    assert lines == ["set -eu -o pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "log=$(mktemp)",
                     command + ' | tee "$log"', 'tail -n 1 "$log" | grep -q " passed"']


def test_nothing_under_test_can_end_the_test_process():
    with pytest.raises(AssertionError):
        os._exit(0)


def test_the_readmes_demo_delivers_and_says_so(home):
    command = [text.split() for text in BLOCKS if "demo" in text][0]
    result = wait(home.start([sys.executable] + command[1:], cwd=str(ROOT)))
    assert (result.code, result.err) == (0, b"") and b"Nothing left this machine" in result.out


@pytest.mark.parametrize("words, answers", [
    (["503", "429", "ok"], ["503", "429", "200"]), (["drop", "200"], ["drop", "200"]), ([], ["200"])])
def test_the_readmes_backend_answers_in_turn_and_prints_what_comes(home, words, answers):
    command = [text.split() for text in BLOCKS if "fake_backend" in text][0]
    assert command[1:4] == ["fixtures/fake_backend.py", "--port", "8787"]
    process = home.start([sys.executable, "-u", command[1], "--port", "0"] + words, cwd=str(ROOT),
                         stderr=subprocess.STDOUT)
    url = process.stdout.readline().split()[1].decode()
    home.configure(baseUrl=url)
    home.log("usage", 1)
    taken = wait(home.start([sys.executable, command[1], "--port", url.split(":")[2].split("/")[0]],
                            cwd=str(ROOT)))
    assert taken.code == 1 and b"cannot be had" in taken.err and b"Traceback" not in taken.err
    for _ in words:
        home.sync()
    home.sync()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(url)
    shown = [process.stdout.readline().decode() for _ in answers + ["404"]]
    process.kill()
    wait(process)
    assert [text.split()[-1] for text in shown] == answers + ["404"]
    assert "community mode, 1 event, deviceId: arch " in shown[0] and TOKEN not in "".join(shown)


@needs_bash
def test_the_readmes_backend_can_be_tried_as_it_says(machine):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = block("fake_backend").replace("8787", str(port)).replace("503 429", "401")  # no waits
    assert text.count("/tmp/secondme-try") == 6
    shown = machine.shell("cd '%s'\n" % ROOT + text.replace("/tmp/secondme-try", "~/try"))
    assert shown.code == 0 and shown.out.count(b"community mode, 19 events, deviceId") == 2
    assert re.findall(b"HTTP ([0-9]+)", shown.err) == [b"401", b"200"]


def test_readme_and_help_name_the_same_flags(home):
    flag = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
    settings = README[README.index("## Settings"):README.index("## Results")]
    assert set(flag.findall(settings)) == set(flag.findall(home.run("--help").out.decode()))


@pytest.mark.parametrize("pattern, holds", [
    (r'environ(?:\.get\(|\[)"(\w+)"', {"SM_TEL", "DO_NOT_TRACK"}),
    (r'"((?:ok|skipped|[a-z]+_failed|[a-z]+_error))"', {
        "ok", "skipped", "auth_failed", "server_error", "network_error"}),
    (r'"(config|credentials|\.device-id|\.sync-offsets)"', {
        "config", "credentials", ".device-id", ".sync-offsets"})],
    ids=["environment", "results", "files"])
def test_the_readme_names_all_that_the_script_has(pattern, holds):
    assert set(re.findall(pattern, SOURCE.decode("ascii"))) == holds
    assert all(re.search(r"(?<![\w-])%s(?!\w)" % re.escape(name), README) for name in holds)


@pytest.mark.parametrize("mode", sorted(BODIES))
def test_the_readmes_table_of_fields_is_what_is_sent(mode):
    rows = re.findall(r"^\| (`.*?`) \| (\w+) \| .* \| (\w+) \| (\w+) \|$", README, re.M)
    event = {name: 1 for fields in (s.ANONYMOUS, s.COMMUNITY) for log in s.LOGS
             for name in fields[log]}
    for log in s.LOGS:
        said = {name for found, of, *sent in rows for name in re.findall(r"`(\w+)`", found)
                if of in (log, "both") and sent[mode == "anonymous"] == "sent"}
        assert said == set(s.shape_event(mode, log, event))
    assert "| `deviceId` | each request | the content of `.device-id` | sent | never |" in README


@pytest.mark.parametrize("number, pattern", [
    (s.BATCH_EVENTS, r"up to (\d+) events"), (s.BATCH_EVENTS, r"one batch \((\d+) events\)"),
    (s.RUN_SECONDS, r"in the foreground, (\d+) s at most"), (s.RUN_SECONDS, r"(\d+) if not given"),
    (s.REQUEST_SECONDS, r"request takes at most (\d+)"), (s.REQUEST_SECONDS, r"(\d+) s a request"),
    (s.RUN_SECONDS, r"(\d+) s a run"), (s.CONNECT_SECONDS, r"a connect (\d+) for each address"),
    (s.MAX_DEPTH, r"nested at most (\d+) deep"), ("%g" % (s.LINE_BYTES / 2**20), r"at most (\d+) MiB long"),
    ("%g" % (s.BODY_BYTES / 1024), r"of (\d+) KiB at most, one"),
    ("%g" % (s.SMALL_BYTES / 1024), r"JSON of (\d+) KiB at most"),
    (s.FINGERPRINT_BYTES, r"first (\d+) bytes"), (s.RECORD_BYTES, r"The state is (\d+) bytes"),
    (s.VERSION, r"secondme_sync/([\d.]+)"), (repr(sorted(s.RETRY_SECONDS))[1:-1].replace(
        ", 504", " and 504"), r"another refusal; for ([\d, and]+\d) that"),
    (s.RETRY_SECONDS[503], r"\(after (\d+) s; for 429"), (s.RETRY_SECONDS[429], r"(\d+) s if nothing"),
    (s.REQUEST_SECONDS, r"(\d+) s at most\) \|"), (s.BASE_URL, r"to `(https[^`]*)`")], ids=str)
def test_the_readmes_numbers_are_the_scripts(number, pattern):
    assert re.findall(pattern, README) == [str(number)]
