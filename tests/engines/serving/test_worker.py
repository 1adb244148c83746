"""The worker process and its client, over a real socket; the executor behind it takes 20 ms a step."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_executor import logits_after
from fake_worker import LONG, TOKENIZER, alone, start, wait_for

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.launch import WorkerProcess
from trtbuild.engines.serving.request import RequestOutput, SamplingParams
from trtbuild.errors import DeadlineExceeded, Refused, TrtBuildError, Unavailable


@pytest.fixture(scope="module")
def worker(importable_loader: None) -> Iterator[WorkerProcess]:
    with start() as running:
        yield running


@pytest.fixture
def client(worker: WorkerProcess) -> Iterator[WorkerClient]:
    with worker.connect() as connected:
        yield connected


def test_hello_says_what_serves(worker: WorkerProcess, client: WorkerClient) -> None:
    assert client.hello == {
        "pid": worker.process.pid,
        "max_queue": None,
        "type": "hello",
        "protocol": 1,
        "engine": "fake",
        "executor": "reference",
        "executor_why": "",
        "device": "cpu",
        "limits": {"num_slots": 4, "max_seq_len": 400, "chunk_size": 16, "vocab_size": 1024},
        "eos_token_ids": [2],
        "has_tokenizer": True,
        "has_chat_template": True,
    }


def test_text_ids_and_chat_stream_the_solo_answer(client: WorkerClient) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=4, logprobs=2)
    messages = [{"role": "user", "content": "Who is there?"}]
    chat_ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    for prompt, ids in (("To be, 你好", TOKENIZER.encode("To be, 你好")), ([5, 6, 7], [5, 6, 7]), (messages, chat_ids)):
        found, wanted = client.generate(prompt, params).result(), alone(ids, params)
        assert (found.token_ids, found.text, found.finish_reason) == (
            wanted.token_ids,
            wanted.text,
            wanted.finish_reason,
        )
        assert found.logprobs == pytest.approx(wanted.logprobs)
        assert [dict(top).keys() for top in found.top_logprobs] == [dict(top).keys() for top in wanted.top_logprobs]
        assert found.usage is not None and found.usage.prompt_tokens == len(ids)


def test_concurrent_streams_on_one_connection(client: WorkerClient) -> None:
    prompts = [[10 + i, 20, 30 + i] for i in range(9)]
    params = [SamplingParams(max_tokens=4 + i, temperature=0.8, seed=i) for i in range(9)]
    found: list[RequestOutput | None] = [None] * 9

    def read(index: int) -> None:
        found[index] = client.generate(prompts[index], params[index]).result()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for index, output in enumerate(found):
        assert output is not None
        assert output.token_ids == alone(prompts[index], params[index]).token_ids


def test_tokens_arrive_while_they_are_made(client: WorkerClient) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    started = time.monotonic()
    times = [time.monotonic() - started for _ in client.generate([3, 4], params)]
    assert len(times) == 20
    # 20 steps of 20 ms; buffered until the end, the first would come after 0.4 s.
    assert times[0] < 0.2
    assert times[-1] > 0.38


def test_cancel_closing_and_dropping_free_the_slot(client: WorkerClient) -> None:
    cancelled = client.stats()["cancelled"]
    stream = client.generate([3, 4], LONG)
    next(stream)
    client.cancel(stream.request_id)
    assert [e.finish_reason for e in stream][-1] == "cancelled"
    with client.generate([3, 4], LONG) as closed:
        next(closed)
    for _ in client.generate([3, 4], LONG):
        break
    wait_for(client, cancelled=cancelled + 3, slots_used=0)


def test_disconnecting_cancels(worker: WorkerProcess, client: WorkerClient) -> None:
    cancelled = client.stats()["cancelled"]
    leaving = worker.connect()
    streams = [leaving.generate([5 + i], LONG) for i in range(6)]
    next(streams[0])
    wait_for(client, active=4, waiting=2, connections=2)
    leaving.close()
    wait_for(client, active=0, waiting=0, connections=1, cancelled=cancelled + 6)
    with pytest.raises(TrtBuildError, match="connection to the engine worker is lost"):
        list(streams[5])


def test_score(client: WorkerClient) -> None:
    ids, logprobs = client.score("Good night, sweet prince; and flights of angels")
    assert ids == TOKENIZER.encode("Good night, sweet prince; and flights of angels") and len(ids) > 16
    wanted = [float(logits_after(ids[:i], 1024).log_softmax(-1)[ids[i]]) for i in range(1, len(ids))]
    assert logprobs[0] is None and logprobs[1:] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([3] * 500, "500 tokens, at most 399 are accepted"),
        ([], "no tokens"),
        ([5000], "token id 5000"),
        ("ab\ud800", "not valid Unicode at character 2"),
        ([{"role": "user"}], r"messages\[0\] is malformed"),
    ],
)
def test_bad_requests_are_refused_and_the_next_is_served(client: WorkerClient, prompt: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        list(client.generate(prompt))
    assert len(client.generate([3], SamplingParams(max_tokens=2, ignore_eos=True)).result().token_ids) == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"not json", "one line of JSON"),
        (b"[1]", "JSON object, not list"),
        (b'{"op":"fly","id":"1"}', "op 'fly'"),
        (b'{"op":"stats"}', "id must be"),
        (b'{"op":"stats","id":7}', "id must be"),
        (b'{"op":"generate","id":"1"}', "exactly one of prompt"),
        (b'{"op":"generate","id":"1","prompt":"a","beam_width":2}', "unknown field beam_width"),
        (b'{"op":"generate","id":"1","prompt":"a","params":{"top_p":7}}', "top_p 7"),
        (b'{"op":"generate","id":"1","prompt":"a","params":[]}', "params must be an object"),
        (b'{"op":"generate","id":"1","prompt":5}', "must be text, not int"),
        (b'{"op":"generate","id":"1","token_ids":[true]}', "whole numbers"),
        (b'{"op":"generate","id":"1","token_ids":"abc"}', "whole numbers"),
        (b'{"op":"generate","id":"1","messages":"hi"}', "non-empty list"),
        (b'{"op":"generate","id":"1","prompt":"a","request_id":5}', "request_id must be a string of at most 200"),
        (b'{"op":"generate","id":"1","prompt":"a","tools":[]}', "tools are given to the chat template"),
        (b'{"op":"generate","id":"1","messages":[{"role":"user","content":"a"}],"tools":[1]}', "list of objects"),
        (b'{"op":"generate","id":"1","prompt":"a","params":{"guide_type":"regex","guide":"("}}', "unclosed group"),
        (b'{"op":"generate","id":"1","prompt":"a","params":{"deadline_s":0}}', "deadline_s 0"),
        (b"[" * 100_000, "JSON"),
        (b"\xff\xfe{}", "one line of JSON"),
    ],
)
def test_broken_messages_get_an_error_each(worker: WorkerProcess, line: bytes, why: str) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(worker.socket_path))
        lines = raw.makefile("rb")
        assert json.loads(lines.readline())["type"] == "hello"
        raw.sendall(line + b"\n" + b'{"op":"stats","id":"next"}\n')
        # Operations run at once: either may be answered first.
        error, after = sorted((json.loads(lines.readline()) for _ in range(2)), key=lambda m: m["type"])
        assert (error["type"], error["kind"]) == ("error", "refused") and why in error["message"]
        assert (after["type"], after["id"]) == ("stats", "next")


def test_socket_is_private(worker: WorkerProcess) -> None:
    assert worker.socket_path.parent.stat().st_mode & 0o777 == 0o700
    assert worker.socket_path.stat().st_mode & 0o777 == 0o600


def test_client_refuses_another_protocol(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()

        def answer() -> None:
            peer, _ = server.accept()
            peer.sendall(b'{"type":"hello","protocol":99}\n')
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TrtBuildError, match="speaks protocol 99, this client 1"):
            WorkerClient(tmp_path / "s")
        thread.join()


def test_client_needs_no_torch() -> None:
    code = (
        "import sys, trtbuild.engines.serving.launch; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_guides_bad_words_and_token_texts_cross_the_wire(client: WorkerClient) -> None:
    pattern = "[a-f]{3}-[0-9]{2}"
    params = SamplingParams(temperature=1.0, seed=1, guide_type="regex", guide=pattern, bad=("a",), logprobs=2)
    found = client.generate("To be", params).result()
    assert re.fullmatch(pattern, found.text) and "a" not in found.text and found.finish_reason == "stop"
    assert "".join(text or "" for text in found.token_texts) == found.text
    assert all(len(texts) == 2 for texts in found.top_texts)


def test_a_slow_guide_holds_up_no_other_request_and_can_be_cancelled(client: WorkerClient) -> None:
    # Compiled in about a second.
    slow = "start: T0\n" + "".join(f'T{i}: T{i + 1}"x"\n' for i in range(3800)) + 'T3800: "b"'
    first = client.generate([3], SamplingParams(guide_type="ebnf_grammar", guide=slow, max_tokens=5))
    client.cancel(first.request_id)
    assert len(client.generate([3], SamplingParams(max_tokens=2, ignore_eos=True)).result().token_ids) == 2
    assert first.result().finish_reason == "cancelled"
    wait_for(client, active=0, waiting=0)


def test_deadline_is_a_timeout_for_running_and_waiting(client: WorkerClient) -> None:
    before = client.stats()["timed_out"]
    begun = time.monotonic()
    limited = SamplingParams(max_tokens=300, ignore_eos=True, deadline_s=0.3)
    streams = [client.generate([5 + i], limited) for i in range(6)]
    for stream in streams:
        with pytest.raises(DeadlineExceeded, match=r"deadline of 0\.3 s has passed"):
            list(stream)
    assert 0.3 <= time.monotonic() - begun < 1.5
    wait_for(client, timed_out=before + 6, slots_used=0)


def test_full_queue_is_unavailable_and_order_is_first_in_first_out() -> None:
    with start(slots=1, max_queue=3) as worker:
        clients = [worker.connect() for _ in range(5)]
        try:
            assert clients[0].hello["max_queue"] == 3
            few = SamplingParams(max_tokens=4, ignore_eos=True)
            order: list[int] = []
            streams = []
            for i in range(4):
                streams.append(clients[i].generate([5 + i], few if i else LONG))
                wait_for(clients[0], active=1, waiting=i)
            with pytest.raises(Unavailable, match="3 requests wait, at most 3 may"):
                clients[4].generate([9]).result()
            clients[0].cancel(streams[0].request_id)

            def read(index: int) -> None:
                streams[index].result()
                order.append(index)

            threads = [threading.Thread(target=read, args=(i,)) for i in (3, 2, 1, 0)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=20)
            assert order == [0, 1, 2, 3]
            assert clients[4].stats()["queue_full"] == 1
            assert clients[4].generate([9], SamplingParams(max_tokens=1, ignore_eos=True)).result().token_ids
        finally:
            for connected in clients:
                connected.close()


def test_json_log_has_a_line_for_every_request(tmp_path: Path) -> None:
    with start(log_format="json", max_queue=0, slots=1) as worker, worker.connect() as client:
        client.generate([3, 4], SamplingParams(max_tokens=3, ignore_eos=True), request_id="caller\n1").result()
        with client.generate([3], LONG) as stream:
            next(stream)
            with pytest.raises(Unavailable):
                client.generate([3]).result()
        wait_for(client, cancelled=1)
        deadline = time.monotonic() + 5
        while True:
            lines = [json.loads(line) for line in worker.log_path.read_text().splitlines()]
            requests = [line for line in lines if line["message"] == "request"]
            if len(requests) == 3:
                break
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
    done = requests[0]
    assert (done["reason"], done["request_id"], done["prompt_tokens"], done["completion_tokens"]) == (
        "length",
        "caller\n1",
        2,
        3,
    )
    assert done["id"] == "1:1" and 0 < done["ttft_s"] < done["total_s"] < 5
    assert sorted(line["reason"] for line in requests[1:]) == ["cancelled", "unavailable"]
