"""The judge against a real HTTP server on this machine: good, slow, busy, broken and silent; training goes on."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import AsyncMock

import pytest
from steps import rewards_of
from test_real_models import follow_recipe

import rewards
from graders import Judge
from rewards import judge
from tasks import Example

BEHAVIOURS = {}  # name: what the server does with the n-th call


def behaviour(function):
    BEHAVIOURS[function.__name__] = function
    return function


def reply(handler, text: str) -> None:
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
    send(handler, 200, body)


def send(handler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@behaviour
def answers(handler, number):
    reply(handler, "1" if "good" in handler.asked else "0")


@behaviour
def slow(handler, number):
    time.sleep(0.2)
    answers(handler, number)


MEETING = threading.Barrier(4)


@behaviour
def answers_four_at_once(handler, number):
    MEETING.wait(timeout=20)  # broken where they come one after the other, and then there is no answer
    answers(handler, number)


@behaviour
def busy_at_first(handler, number):
    send(handler, 429, Retry_After="0") if number % 2 else answers(handler, number)


@behaviour
def fails_at_first(handler, number):
    send(handler, 500) if number % 2 else answers(handler, number)


@behaviour
def busy(handler, number):
    send(handler, 429)


@behaviour
def fails(handler, number):
    send(handler, 500)


@behaviour
def hangs_up(handler, number):
    handler.close_connection = True


@behaviour
def talks_nonsense(handler, number):
    send(handler, 200, b'{"choices": [')


@behaviour
def replies_without_choices(handler, number):
    send(handler, 200, b'{"choices": null}')


@behaviour
def has_no_score(handler, number):
    reply(handler, ["I like it", "7", "0.5", "-1", "", "1" * 5000][number % 6])


@behaviour
def replies_with_a_list(handler, number):
    send(handler, 200, json.dumps({"choices": [{"message": {"content": ["1"]}}]}).encode())


@behaviour
def nests(handler, number):
    send(handler, 200, b"[" * 100_000)


@behaviour
def sends_elsewhere(handler, number):
    send(handler, 302, Location="http://127.0.0.1:9/")


@behaviour
def drips_headers(handler, number):
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not handler.server.closing.wait(0.05):
            handler.wfile.write(b"x")


@behaviour
def hangs(handler, number):
    handler.server.closing.wait(10)


@behaviour
def drips(handler, number):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while not handler.server.closing.wait(0.05):
            handler.wfile.write(b" ")


@behaviour
def floods(handler, number):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while not handler.server.closing.is_set():
            handler.wfile.write(b" " * 2**20)
            handler.server.flood += 1


@pytest.fixture
def server():
    """A factory of servers with one of the behaviours; `server.bodies` are the calls that came."""
    running = []

    def start(name: str) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.asked = body["messages"][0]["content"]
                self.server.bodies.append({"path": self.path, "key": self.headers["Authorization"], **body})
                BEHAVIOURS[name](self, len(self.server.bodies))

            def log_message(self, *_):
                pass

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        made.bodies, made.flood, made.closing, made.daemon_threads = [], 0, threading.Event(), True
        made.url = f"http://127.0.0.1:{made.server_port}/v1"
        threading.Thread(target=made.serve_forever, daemon=True).start()
        running.append(made)
        return made

    yield start
    for made in running:
        made.closing.set()
        made.shutdown()
        made.server_close()


def client(url: str, **more) -> Judge:
    return Judge(url, "m", **{"seconds": 0.5, "pause": 0.01} | more)


@pytest.mark.parametrize("name", ["answers", "answers_four_at_once", "busy_at_first", "fails_at_first"])
def test_scores_come_back_row_by_row(server, name):
    """Also where the first call fails; several calls run at once, and equal rows are asked for once."""
    made = server(name)
    endpoint = client(made.url, key="secret", calls=1 if "first" in name else 8, seconds=30.0)
    completions = ["good"] + [f"bad {i}" for i in range(6)] + ["good", "good one"]
    assert judge(["q"] * 9, completions, endpoint=endpoint) == [1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert len(made.bodies) == 8 * (1 + ("first" in name))
    call = made.bodies[0]
    assert (call["path"], call["key"], call["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert "q" in call["messages"][0]["content"] and "0 if" in call["messages"][0]["content"]
    judge(["q"] * 9, completions, endpoint=endpoint)
    assert len(made.bodies) == 8 * (1 + ("first" in name))  # kept


@pytest.mark.parametrize(
    "name",
    [
        *("busy", "fails", "hangs_up", "talks_nonsense", "replies_without_choices", "has_no_score"),
        *("replies_with_a_list", "nests", "sends_elsewhere", "hangs", "drips", "drips_headers"),
    ],
)
def test_a_call_that_fails_is_no_score(server, name):
    """None for every row, in bounded time, and the endpoint is left alone once it has failed so often in a row."""
    made, start = server(name), time.monotonic()
    endpoint = client(made.url, patience=4, calls=2)
    assert endpoint(["q"] * 20, [str(i) for i in range(20)]) == [None] * 20
    assert time.monotonic() - start < 5 and len(made.bodies) <= 6
    assert not endpoint.scores
    endpoint(["q"], ["0"])
    assert len(made.bodies) > 4  # the next batch tries again


@pytest.mark.parametrize("after", ["0", "30", "-9", "9" * 400, "nan", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_busy_judge_is_asked_again_when_it_says_so(server, monkeypatch, after):
    """But no later than a call may last; after the judge's own pause where it does not say a number of seconds."""

    def busy_once(handler, number):
        send(handler, 429, Retry_After=after) if number == 1 else answers(handler, number)

    monkeypatch.setitem(BEHAVIOURS, "busy_once", busy_once)
    made, start = server("busy_once"), time.monotonic()
    pause = 0.01 if after[0] in "nW" else 20.0
    assert client(made.url, pause=pause)(["q"], ["good"]) == [1]
    assert time.monotonic() - start < 5


def test_a_reply_without_end_is_cut(server):
    made = server("floods")
    assert client(made.url, retries=0)(["q"], ["a"]) == [None]
    assert made.flood < 64  # MiB that the system's buffers and the judge took


def test_the_key_goes_to_the_judge_and_no_other(server, monkeypatch):
    """Nor does a token that is meant for the hub go to the judge."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    made, other = server("answers"), server("answers")
    assert client(made.url)(["q"], ["good"]) == client(made.url, key=" k\n")(["q"], ["good"]) == [1]
    assert [call["key"] for call in made.bodies] == [None, "Bearer k"]
    for status in (301, 307):
        monkeypatch.setitem(
            BEHAVIOURS, "moved", lambda handler, _, code=status: send(handler, code, Location=other.url)
        )
        assert client(server("moved").url, key="k")(["q"], ["good"]) == [None]
    assert other.bodies == []


def test_a_thread_whose_event_loop_runs_may_ask(server):
    made = server("answers")

    async def notebook():
        return client(made.url)(["q"], ["good"])

    assert asyncio.run(notebook()) == [1]


def test_a_batch_ends_when_its_time_is_up(server):
    """Each call is answered in time, all of them together are not."""
    made, start = server("slow"), time.monotonic()
    scores = client(made.url, calls=1, batch_seconds=0.5)(["q"] * 20, [f"good {i}" for i in range(20)])
    assert time.monotonic() - start < 2.0 and scores[0] == 1 and scores[-1] is None


def test_nobody_listens():
    assert client("http://127.0.0.1:9/v1")(["q"], ["a"]) == [None]


@pytest.mark.parametrize(
    ("text", "scale", "score"),
    [
        *(("2", 2, 2), ("Score: 1.", 2, 1), ("I think so.\n\n**1**\n", 1, 1), ("2", 1, None), ("1/2", 2, 1)),
        *(("0/1", 1, 0), ("Score: 0 out of 2", 2, 0), ("0. It omits 1 step", 1, None), ("0 or 1", 1, None)),
        *(("٢", 2, None), ("", 1, None), ("1" * 5000, 1, None), ("-1", 1, None)),
    ],
)
def test_the_last_number_of_the_reply_is_the_score(server, monkeypatch, text, scale, score):
    monkeypatch.setitem(BEHAVIOURS, "says", lambda handler, number: reply(handler, text))
    made = server("says")
    assert client(made.url, scale=scale, retries=0)(["q"], ["a"]) == [score]
    assert ("in part" in made.bodies[0]["messages"][0]["content"]) == (scale == 2)


def test_missing_scores_are_filled_from_the_group_and_counted(server, random_policy, monkeypatch):
    """A judge that answers for some rows only: the others get their group's mean, and the share is a metric."""

    @behaviour
    def picky(handler, number):
        send(handler, 500) if "7" in handler.asked else reply(handler, "1" if "good" in handler.asked else "0")

    made = server("picky")
    rollout = random_policy().sample([Example("1+1"), Example("2*2")], 3, (0, 0, 0), 4)
    rollout.texts = ["good", "bad", "7", "77", "777", "7777"]
    mix, inputs = rewards.parse_rewards("judge=2"), {"endpoint": client(made.url, patience=100, retries=1)}
    total, means = rewards_of(mix, [Example("1+1"), Example("2*2")], rollout, **inputs)
    assert total.tolist() == [[2, 0, 1], [0, 0, 0]]
    assert means["missing/judge"] == pytest.approx(4 / 6) and means["reward/judge"] == pytest.approx(0.5)
    monkeypatch.delitem(BEHAVIOURS, "picky")


@pytest.mark.parametrize("name", ["answers", "fails"])
def test_alpaca_with_a_judge_end_to_end(server, shared_data, tmp_path, monkeypatch, capsys, name):
    """A judge that fails all the time loses no step: its reward is left out, which is said, and the rate is logged."""
    made = server(name)
    monkeypatch.setattr("asyncio.sleep", AsyncMock())  # the pauses before calls that are made again
    flags = ["--judge-url", made.url, "--judge-model", "m", "--judge-scale", 2, "--rewards", "judge=1,token_length=0.1"]
    lines = follow_recipe("alpaca", shared_data, tmp_path, monkeypatch, capsys, "qwen2", True, flags)
    assert len(made.bodies) >= 8
    if name == "fails":
        assert all(line["missing/judge"] == 1 for line in lines[1:])
    else:
        assert all(line["missing/judge"] == 0 and "reward/judge" in line for line in lines[1:])
