"""The worker process and its client, over a real socket; the executor behind it takes 20 ms a step."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_executor import TINY_MIXTRAL, FakeExecutor, logits_after
from transformers import AutoTokenizer

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.launch import WorkerProcess, await_ready, start_worker, worker_command
from trtbuild.engines.serving.request import Request, RequestOutput, SamplingParams
from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.errors import DeadlineExceeded, Refused, TrtBuildError, Unavailable

LOADER = "fake_executor:load_fake"
LONG = SamplingParams(max_tokens=300, ignore_eos=True)
MIXTRAL = AutoTokenizer.from_pretrained(TINY_MIXTRAL)


@pytest.fixture(scope="module", autouse=True)
def importable_loader() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3])]))
        yield


def start(name: str = "fake", **options: Any) -> WorkerProcess:
    return start_worker(Path(name), loader=LOADER, threads=1, timeout_s=60, **options)


@pytest.fixture(scope="module")
def worker(importable_loader: None) -> Iterator[WorkerProcess]:
    with start() as running:
        yield running


@pytest.fixture
def client(worker: WorkerProcess) -> Iterator[WorkerClient]:
    with worker.connect() as connected:
        yield connected


def expected(token_ids: list[int], params: SamplingParams) -> RequestOutput:
    executor = FakeExecutor(4, max_seq_len=400, chunk_size=16, vocab_size=1024)
    return Scheduler(executor, eos_token_ids=[2], decode_text=decoder_of(MIXTRAL)).run(
        [Request("solo", token_ids, params)]
    )[0]


def wait_for(client: WorkerClient, **gauges: int) -> dict[str, Any]:
    """Poll stats until they show the given values; the test fails after 5 s."""
    deadline = time.monotonic() + 5
    while True:
        stats = client.stats()
        if all(stats[name] == value for name, value in gauges.items()):
            return stats
        assert time.monotonic() < deadline, f"wanted {gauges}, have {stats}"
        time.sleep(0.01)


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
    chat_ids = MIXTRAL.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    for prompt, ids in (("To be, 你好", MIXTRAL.encode("To be, 你好")), ([5, 6, 7], [5, 6, 7]), (messages, chat_ids)):
        found, alone = client.generate(prompt, params).result(), expected(ids, params)
        assert (found.token_ids, found.text, found.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        assert found.logprobs == pytest.approx(alone.logprobs)
        assert [dict(top).keys() for top in found.top_logprobs] == [dict(top).keys() for top in alone.top_logprobs]
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
        assert output.token_ids == expected(prompts[index], params[index]).token_ids


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
    assert ids == MIXTRAL.encode("Good night, sweet prince; and flights of angels") and len(ids) > 16
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


def test_killed_worker_is_an_error_within_two_seconds() -> None:
    with start() as worker, worker.connect() as client:
        streams = [client.generate([5 + i], LONG) for i in range(6)]
        next(streams[0])
        worker.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(TrtBuildError, match="killed by SIGKILL"):
                list(stream)
        with pytest.raises(TrtBuildError, match="killed by SIGKILL"):
            client.generate([3])
        assert time.monotonic() - killed < 2
        with pytest.raises(TrtBuildError, match="no engine worker answers"):
            worker.connect()


def test_executor_failure_is_told_to_every_request_and_ends_the_worker() -> None:
    with start("device-lost") as worker, worker.connect() as client:
        with pytest.raises(TrtBuildError, match="engine worker failed: device lost"):
            list(client.generate([3, 4]))
        assert worker.process.wait(timeout=10) == 1


def test_sigterm_drains() -> None:
    with start() as worker, worker.connect() as client:
        stream = client.generate([3, 4], SamplingParams(max_tokens=30, ignore_eos=True))
        next(stream)
        worker.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while True:
            assert time.monotonic() < deadline
            late = client.generate([5], SamplingParams(max_tokens=1))
            try:
                late.result()
            except TrtBuildError as error:
                assert "the engine worker is stopping" in str(error)
                break
        rest = stream.result()
        assert (len(rest.token_ids), rest.finish_reason) == (29, "length")
        assert worker.process.wait(timeout=10) == 0
        assert not worker.socket_path.exists()


def test_drain_has_a_limit_and_shutdown_can_be_immediate() -> None:
    with start(drain_seconds=0.3) as worker, worker.connect() as client:
        stream = client.generate([3, 4], LONG)
        client.shutdown()
        assert stream.result().finish_reason == "cancelled"
        assert worker.close() == 0
    with start() as worker, worker.connect() as client:
        stream = client.generate([3, 4], LONG)
        next(stream)
        begun = time.monotonic()
        client.shutdown(drain=False)
        assert stream.result().finish_reason == "cancelled"
        assert worker.process.wait(timeout=10) == 0
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("refused", Refused, r"built for sm120, this GPU is sm90 \(the engine worker exited with status 3\)"),
        ("crash", TrtBuildError, r"died while loading: exit status 1(.|\n)*segment 3 is corrupt"),
    ],
)
def test_startup_error_is_relayed(name: str, kind: type[TrtBuildError], why: str) -> None:
    with pytest.raises(TrtBuildError, match=why) as raised:
        start(name)
    assert type(raised.value) is kind


def test_slow_start_is_given_up_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(TrtBuildError, match=r"was not ready after 0\.1 s"):
        start_worker(Path("fake"), loader=LOADER, timeout_s=0.1)
    assert list(tmp_path.iterdir()) == []
    assert _processes_of(tmp_path) == []


def test_deep_temporary_directory_still_gets_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with start(slots=2) as worker, worker.connect() as client:
        assert client.hello["limits"]["num_slots"] == 2
    assert not worker.socket_path.parent.exists()


def test_worker_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from trtbuild.engines.serving.launch import start_worker;"
        f"w = start_worker(Path('fake'), loader={LOADER!r}, timeout_s=60);"
        "print(w.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _processes_of(tmp_path) == [pid]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _processes_of(tmp_path):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


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


def start_lingering(path: Path, linger_s: float) -> subprocess.Popen[bytes]:
    read_fd, write_fd = os.pipe()
    options = {"loader": LOADER, "threads": 1, "linger-seconds": linger_s, "prepare-guides": True}
    process = subprocess.Popen(worker_command(Path("fake"), path, write_fd, options), pass_fds=(write_fd,))
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        await_ready(pipe, process, Path("fake"), None, 60)
    return process


def test_lingering_worker_ends_after_its_last_client_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = start_lingering(path, 1.0)
    try:
        with WorkerClient(path) as client:
            time.sleep(1.3)
            assert process.poll() is None, "a client that is idle keeps it"
            assert client.stats()["connections"] == 1
        time.sleep(0.5)
        with WorkerClient(path) as again:
            time.sleep(0.8)
            assert again.generate([3], SamplingParams(max_tokens=1)).result().token_ids
        left = time.monotonic()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - left > 0.9 and not path.exists()
    finally:
        process.kill()
        process.wait()


def test_lingering_worker_without_any_client_ends(tmp_path: Path) -> None:
    process = start_lingering(tmp_path / "s", 0.2)
    assert process.wait(timeout=10) == 0


def test_a_worker_that_ends_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = start_lingering(path, 30)
    path.unlink()
    second = start_lingering(path, 30)
    try:
        first.terminate()
        assert first.wait(timeout=10) == 0
        with WorkerClient(path) as client:
            assert client.hello["pid"] == second.pid
    finally:
        second.kill()
        second.wait()


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


def _processes_of(directory: Path) -> list[int]:
    """Pids of live processes whose command line names `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in command and b"trtbuild.engines.serving.worker" in command:
                found.append(int(entry.name))
    return found
