"""The page on which people answer: its server, and the round trip in a browser."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from components.rlhf.text.errors import InputError
from pipelines.local.annotate import Pair, make_pairs, read_pairs
from pipelines.local.annotate_answers import read_answers
from pipelines.local.annotate_page import AnswerFile, make_server, page_of
from pipelines.local.web import page_when_ready
from tests.support.annotated_runs import sample, write_run
from tests.support.browser import browser

ROOT = Path(__file__).resolve().parents[3]
EVIL = "<script>document.title = 'taken over'</script></script><!--"


def run_of(folder: Path) -> Path:
    samples = [sample(i, f" sft {i}", f" ppo {i} {EVIL}", win=1.0, rewards=(1.0, 0.0)) for i in range(5)]
    return write_run(folder / "run", samples)


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    return make_pairs(run_of(tmp_path), 5, 0)


@pytest.fixture
def server(pairs: list[Pair], tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = make_server(pairs, AnswerFile(tmp_path / "answers.jsonl", pairs), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server: ThreadingHTTPServer, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    text = body if isinstance(body, str) else json.dumps(body) if body is not None else None
    connection.request(method, path, text, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


def test_page_says_nothing_about_models_and_scores(pairs: list[Pair]) -> None:
    page = page_of(pairs)
    assert EVIL not in page and page.count("</script>") == 1
    for word in ("SFT", "PPO", "linear", "reward", "disagreement"):
        assert word not in page


def test_answers_are_saved_by_rater_and_read_again(
    server: ThreadingHTTPServer, pairs: list[Pair], tmp_path: Path
) -> None:
    first, second = pairs[0].pair, pairs[1].pair
    for pair, rater, answer in (
        (first, "ann", "a"),
        (first, "bob", "b"),
        (first, "ann", "tie"),
        (second, "ann", "skip"),
    ):
        assert ask(server, "POST", "/answer", {"pair": pair, "rater": rater, "answer": answer}) == (200, "saved")
    assert json.loads(ask(server, "GET", "/answers?rater=ann")[1]) == {first: "tie", second: "skip"}
    path = tmp_path / "answers.jsonl"
    assert [given.answer for _, given in read_answers(path)] == ["a", "b", "tie", "skip"]
    with path.open("a") as file:  # written by a process that was killed
        file.write('{"pair": "')
    again = AnswerFile(path, pairs)
    assert again.of("ann") == {first: "tie", second: "skip"} and len(path.read_text().splitlines()) == 4
    with pytest.raises(InputError, match="answers another pair"):
        AnswerFile(path, pairs[1:])


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ("not JSON", {}, 400),
        ({"pair": "PAIR", "rater": "ann"}, {}, 400),
        ({"pair": "PAIR", "rater": "ann", "answer": "c"}, {}, 400),
        ({"pair": "none", "rater": "ann", "answer": "a"}, {}, 400),
        ({"pair": ["PAIR"], "rater": "ann", "answer": "a"}, {}, 400),
        ({"pair": "PAIR", "rater": "ann", "answer": ["a"]}, {}, 400),
        ({"pair": "PAIR", "rater": " ", "answer": "a"}, {}, 400),
        ({"pair": "PAIR", "rater": "a\nb", "answer": "a"}, {}, 400),
        ({"pair": "PAIR", "rater": "x" * 101, "answer": "a"}, {}, 400),
        ({"pair": "PAIR", "rater": "ann", "answer": "a"}, {"Content-Type": "text/plain"}, 403),
        ({"pair": "PAIR", "rater": "ann", "answer": "a"}, {"Host": "evil.example:80"}, 403),
        ({"pair": "PAIR", "rater": "ann", "answer": "a"}, {"Origin": "http://evil.example"}, 403),
        ("x" * 5000, {}, 413),
    ],
)
def test_what_is_no_answer_of_the_page_is_not_saved(
    server: ThreadingHTTPServer, pairs: list[Pair], tmp_path: Path, body: object, headers: dict[str, str], status: int
) -> None:
    text = body if isinstance(body, str) else json.dumps(body).replace("PAIR", pairs[0].pair)
    assert ask(server, "POST", "/answer", text, **headers)[0] == status
    assert not (tmp_path / "answers.jsonl").exists()
    assert ask(server, "GET", "/answers?rater=ann") == (200, "{}")


def test_other_addresses_and_hosts_get_nothing(server: ThreadingHTTPServer) -> None:
    assert ask(server, "GET", "/key.jsonl")[0] == 404
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403


def start(run: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines", "annotate", str(run), "--page", "--port", str(port), "--no-open"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL)
    assert page_when_ready(process, f"http://127.0.0.1:{port}/")
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)


@pytest.mark.browser
def test_round_trip_in_a_browser(tmp_path: Path) -> None:
    """Two raters answer by keys and mouse, one stops and goes on after a restart; the answers become preferences."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run, address = run_of(tmp_path), f"http://127.0.0.1:{port}/"
    server = start(run, port)
    try:
        with browser() as chromium:
            page = chromium.new_page()

            def shows(text: str) -> None:
                page.wait_for_function("text => document.querySelector('#count').textContent.includes(text)", arg=text)

            page.goto(address)
            pairs = read_pairs(run / "annotate")
            page.keyboard.type("ann")
            page.keyboard.press("Enter")
            shows("0 of 5")
            shown = [page.locator(f"#{id}").text_content() for id in ("prompt", "a", "b")]
            assert shown == [pairs[0].prompt, pairs[0].a.strip(), pairs[0].b.strip()]
            assert page.title() == "Which response is better?"
            page.keyboard.press("a")
            shows("1 of 5")
            page.keyboard.press("z")  # back, to correct it
            page.keyboard.press("t")
            shows("this is pair 2")
            page.click("[data-answer=b]")
            shows("2 of 5")

            stop(server)
            page.keyboard.press("a")
            page.wait_for_selector("#error:has-text('Not saved')")
            shows("2 of 5")
            server = start(run, port)
            page.goto(address)  # the page knows the name, and the server the answers
            page.keyboard.press("Enter")
            shows("2 of 5 answered; this is pair 3")
            for number, key in enumerate("sa", start=3):
                page.keyboard.press(key)
                shows(f"{number} of 5")
            page.keyboard.press("b")
            page.wait_for_selector("#done:visible")

            page.goto(address)
            page.fill("#name", "bob")
            page.keyboard.press("Enter")
            shows("0 of 5")
            page.keyboard.press("b")
            shows("1 of 5")
    finally:
        stop(server)
    answers = run / "annotate/answers.jsonl"
    found = [(given.rater, given.pair, given.answer) for _, given in read_answers(answers)]
    order = [0, 0, 1, 2, 3, 4, 0]
    expected = zip(["ann"] * 6 + ["bob"], order, ["a", "tie", "b", "skip", "a", "b", "b"], strict=True)
    assert found == [(rater, pairs[number].pair, answer) for rater, number, answer in expected]

    command = [sys.executable, "-m", "pipelines", "annotate", str(run), "--import", str(answers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "2 raters answered 4 of 5 pairs" in done.stdout
    rows = [json.loads(line) for line in (run / "annotate/preferences.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [pairs[1].b, pairs[3].a, pairs[4].b]  # pair 0: a tie and b, no majority
