"""Requests that no client library would send, made at random, and plain callers that send them."""

from __future__ import annotations

import http.client
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

TIMEOUT_S = 20.0
GOOD = {"text_input": "Good", "max_tokens": 2, "ignore_eos": True}
# Raw bytes of one element, by Triton's type.
_ELEMENT: dict[str, bytes] = {
    "BOOL": b"\1", "UINT8": b"\1", "INT8": b"\1", "UINT16": b"\1\0", "INT16": b"\1\0", "UINT32": b"\1\0\0\0",
    "INT32": b"\2\0\0\0", "FP16": b"\0\x3c", "FP32": b"\0\0\x80\x3f", "UINT64": b"\1" + bytes(7),
    "INT64": b"\1" + bytes(7), "FP64": b"\0\0\0\0\0\0\xf0\x3f", "BYTES": b"\4\0\0\0Good",
}  # fmt: skip
# Of the text models: what is one value of theirs.
_SCALARS = {
    "max_tokens": "INT32", "temperature": "FP32", "top_p": "FP32", "min_p": "FP32", "top_k": "INT32", "seed": "UINT64",
    "ignore_eos": "BOOL", "repetition_penalty": "FP32", "beam_width": "INT32", "num_return_sequences": "INT32",
    "guided_decoding_guide": "BYTES", "text_input": "BYTES", "messages": "BYTES", "tools": "BYTES",
}  # fmt: skip
# protobuf makes its classes when it is imported; no type checker sees them.
Request: Any = vars(service_pb2)["ModelInferRequest"]


def _request(**tensors: tuple[str, list[int], bytes]) -> Any:
    """(dtype, shape, raw bytes) by name; text_input and max_tokens are there unless given."""
    request = Request(model_name="mixtral-unary")
    given = {"text_input": ("BYTES", [1, 1], _ELEMENT["BYTES"]), "max_tokens": ("INT32", [1, 1], _ELEMENT["INT32"])}
    for name, (dtype, shape, raw) in (given | tensors).items():
        request.inputs.add(name=name, datatype=dtype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


def _wrong_dtype(draw: random.Random) -> Any:
    name = draw.choice(list(_SCALARS))
    dtype = draw.choice([d for d in [*_ELEMENT, "BF16", "", "STRING", "FP8"] if d != _SCALARS[name]])
    return _request(**{name: (dtype, [1, 1], _ELEMENT.get(dtype, b"\1\0"))})


def _wrong_shape(draw: random.Random) -> Any:
    """Not a batch of 0: Triton (2.51) then takes the other tensors' batch, and the value as it was meant."""
    name = draw.choice(list(_SCALARS))
    shapes = [[], [1], [1, 0], [1, 2], [3, 1], [1, 1, 1], [-1, 1], [1, -1], [2**31, 1], [2**62, 4], [5, 1]]
    shape = draw.choice(shapes)
    return _request(**{name: (_SCALARS[name], shape, _ELEMENT[_SCALARS[name]])})


def _wrong_batches(draw: random.Random) -> Any:
    """More rows than max_batch_size, or other numbers of rows in other tensors."""
    rows, others = draw.choice([(5, 5), (129, 129), (2, 3), (1, 4), (2000, 2000)])
    text = ("BYTES", [rows, 1], _ELEMENT["BYTES"] * rows)
    return _request(text_input=text, max_tokens=("INT32", [others, 1], _ELEMENT["INT32"] * others))


def _wrong_length(draw: random.Random) -> Any:
    name = draw.choice(list(_SCALARS))
    raw = _ELEMENT[_SCALARS[name]]
    return _request(**{name: (_SCALARS[name], [1, 1], draw.choice([raw[:-1], b"", raw + b"\0", raw * 100]))})


def _lying_string(draw: random.Random) -> Any:
    length = draw.choice([0, 1, 3, 5, 8, 1000, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4])
    shape = draw.choice([[1, 1], [2, 1], [1, 1]])
    raw = struct.pack("<I", length) + b"Good" * draw.choice([1, 2])
    if length in (8, len(raw) - 4) and shape == [1, 1]:
        raw += b"x"
    return _request(**{draw.choice(["text_input", "messages", "guided_decoding_guide"]): ("BYTES", shape, raw)})


def _too_few_contents(draw: random.Random) -> Any:
    """Too many are ignored by Triton (2.51), and the request is answered."""
    request = _request()
    del request.raw_input_contents[draw.choice([0, 1])]
    return request


def _typed_contents(draw: random.Random) -> Any:
    """The other way to carry values, wrongly: beside raw ones, of another type, or of another number."""
    request = _request()
    which = draw.randrange(3)
    if which == 0:
        request.inputs[1].contents.int_contents.append(3)
        return request
    del request.raw_input_contents[:]
    request.inputs[0].contents.bytes_contents.append(b"Good")
    if which == 1:
        request.inputs[1].contents.fp32_contents.append(3)
    else:
        request.inputs[1].contents.int_contents.extend([3] * draw.choice([0, 2, 1000]))
    return request


def _wrong_value(draw: random.Random) -> Any:
    """Well-formed tensors of values that nothing can be made of."""
    nan, infinite, minus = (np.float32(v).tobytes() for v in ("nan", "inf", -1.0))
    name, raw = draw.choice([
        ("temperature", nan), ("temperature", infinite), ("temperature", minus), ("top_p", nan), ("top_p", minus),
        ("min_p", nan), ("repetition_penalty", nan), ("repetition_penalty", bytes(4)),
        ("max_tokens", struct.pack("<i", -(2**31))), ("max_tokens", bytes(4)), ("top_k", struct.pack("<i", -5)),
        ("beam_width", struct.pack("<i", 4)), ("beam_width", struct.pack("<i", -1)),
        ("num_return_sequences", struct.pack("<i", 2**31 - 1)), ("num_return_sequences", bytes(4)),
    ])  # fmt: skip
    return _request(**{name: (_SCALARS[name], [1, 1], raw)})


def _wrong_text(draw: random.Random) -> Any:
    name = draw.choice(["text_input", "messages", "tools"])
    garbage = bytes(draw.randrange(128, 256) for _ in range(draw.randrange(1, 200)))
    content = draw.choice([b"\xff" + garbage, b"[" * 20_000, b'{"role": 1}', b"[1]", b'[{"role":"user"}]\xc3'])
    if name == "text_input":
        content = b"\xff" + garbage
    return _request(**{name: ("BYTES", [1, 1], struct.pack("<I", len(content)) + content)})


def _wrong_names(draw: random.Random) -> Any:
    request = _request()
    which = draw.randrange(7)
    if which == 0:
        request.model_name = draw.choice(["", "mixtral2", "../mixtral", "mixtral\0", "m" * 10_000, "混合"])
    elif which == 1:
        request.model_version = draw.choice(["7", "-1", "x", "1" * 50])
    elif which == 2:
        request.inputs.add(name=draw.choice(["", "text", "x" * 5000]), datatype="INT32", shape=[1, 1])
        request.raw_input_contents.append(_ELEMENT["INT32"])
    elif which == 3:
        request.inputs.add().CopyFrom(request.inputs[1])
        request.raw_input_contents.append(_ELEMENT["INT32"])
    elif which == 4:
        request.outputs.add(name=draw.choice(["", "text", "text_output2"]))
    elif which == 5:
        del request.inputs[0], request.raw_input_contents[0]
    else:
        del request.inputs[:], request.raw_input_contents[:]
    return request


def _wrong_parameters(draw: random.Random) -> Any:
    request = _request()
    which = draw.randrange(5)
    if which == 0:
        request.parameters[draw.choice(["max_token", "tempreature", "x", ""])].int64_param = 3
    elif which == 1:
        request.parameters["timeout"].string_param = "soon"
    elif which == 2:
        request.parameters["priority"].bool_param = True
    elif which == 3:
        request.inputs[0].parameters["shared_memory_region"].string_param = draw.choice(["none", "", "/dev/shm/x"])
        request.inputs[0].parameters["shared_memory_byte_size"].int64_param = draw.choice([-1, 0, 8, 2**62])
        del request.raw_input_contents[0]
    else:
        request.parameters["sequence_id"].double_param = float("nan")
    return request


_GRPC: dict[str, Callable[[random.Random], Any]] = {
    "dtype": _wrong_dtype, "shape": _wrong_shape, "batches": _wrong_batches, "length": _wrong_length,
    "string": _lying_string, "contents": _too_few_contents, "typed": _typed_contents, "value": _wrong_value,
    "text": _wrong_text, "names": _wrong_names, "parameters": _wrong_parameters,
}  # fmt: skip


def bad_grpc_request(draw: random.Random) -> tuple[str, Any]:
    """(what is wrong with it, a request for the unary model, or the decoupled one over a stream)."""
    name = draw.choice(list(_GRPC))
    request = _GRPC[name](draw)
    if request.model_name == "mixtral-unary" and draw.random() < 0.5:
        request.model_name = "mixtral"
    return name, request


class GrpcCaller:
    """Sends what it is given; over a stream for the decoupled model."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.insecure_channel(url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def send(self, request: Any) -> tuple[str, str]:
        """(gRPC's status, the message)."""
        try:
            if request.model_name != "mixtral":
                return "OK", str(self._stub.ModelInfer(request, timeout=TIMEOUT_S))
            answers = list(self._stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
        messages = [answer.error_message for answer in answers if answer.error_message]
        return ("ERROR", messages[0]) if messages else ("OK", str(answers))

    def good(self) -> bytes:
        """The raw text of an answer."""
        request = _request(ignore_eos=("BOOL", [1, 1], b"\1"))
        return self._stub.ModelInfer(request, timeout=TIMEOUT_S).raw_output_contents[0]

    def close(self) -> None:
        self._channel.close()


Http = tuple[str, bytes, dict[str, str]]


def _generate(draw: random.Random) -> Http:
    """JSON for the generate endpoints that says something wrong, or is none."""
    body = json.dumps(GOOD).encode()
    content = draw.choice([
        body[: draw.randrange(len(body))], b"", b"[]", b"null", b"[" * 50_000, b'{"text_input":' * 10_000,
        body.replace(b"Good", b"\xff\xfe"), json.dumps({**GOOD, "temperature": float("nan")}).encode(),
        *(json.dumps({**GOOD, **wrong}).encode() for wrong in (
            {"max_tokens": -1}, {"max_tokens": 2**40}, {"max_tokens": "x"}, {"max_tokens": [1, 2]}, {"max_token": 1},
            {"temperature": -1}, {"temperature": "hot"}, {"text_input": ""}, {"text_input": 3}, {"text_input": None},
            {"text_input": ["a", "b"]}, {"beam_width": 3}, {"ignore_eos": "yes"}, {"seed": -1}, {"top_p": 1e39},
            {"messages": "["}, {"x" * 1000: 1}, {"stop_words": {"a": 1}}, {"input_ids": [[1]]},
        )),
    ])  # fmt: skip
    model = draw.choice(["mixtral", "mixtral-unary"])
    return f"/v2/models/{model}/{draw.choice(['generate', 'generate_stream'])}", content, {}


def _infer(draw: random.Random) -> Http:
    """JSON for infer."""
    text: dict[str, Any] = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Good"]}
    wrong: list[Any] = [
        {"datatype": "INT32"}, {"datatype": "X"}, {"datatype": None}, {"shape": [2, 1]}, {"shape": [1]}, {"shape": []},
        {"shape": [-1, 1]}, {"shape": "x"}, {"shape": [2**62, 8]}, {"shape": [1.5, 1]}, {"data": []}, {"data": "Good"},
        {"data": [1]}, {"data": ["a", "b"]}, {"data": [[[["a"]]]], "shape": [1, 2]}, {"name": ""}, {"name": "no"},
        {"name": 3}, {"data": [None]}, {"parameters": {"binary_data_size": 10**9}},
        {"parameters": {"shared_memory_region": "no", "shared_memory_byte_size": 8}},
    ]  # fmt: skip
    bodies = [{"inputs": [text | one]} for one in wrong]
    bodies += [{}, {"inputs": {}}, {"inputs": [3]}, {"inputs": []}, {"inputs": [text], "outputs": [{"name": "no"}]}]
    return "/v2/models/mixtral-unary/infer", json.dumps(draw.choice(bodies)).encode(), {}


def _binary(draw: random.Random) -> Http:
    """The binary extension with lengths that lie."""
    raw = draw.choice([b"\4\0\0\0Good", b"\xff\xff\xff\xffGood", b"\xff\0\0\0Good", b"\0", b""])
    size = draw.choice([0, 1, 7, 9, 1000, 2**31, 2**63 - 1, -1])
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    length = draw.choice([len(head), len(head), 0, -1, len(head) + 1, 10**6, 2**63, "x"])
    return "/v2/models/mixtral-unary/infer", head + raw, {"Inference-Header-Content-Length": str(length)}


def _path(draw: random.Random) -> Http:
    paths = [
        "/v2/models/no/infer", "/v2/models/mixtral/versions/9/generate", "/v2/models//infer", "/v2/nothing",
        "/v2/models/%00/generate", "/v2/models/mixtral/infer/x", "/" + "x" * 5000,
    ]  # fmt: skip
    return draw.choice(paths), json.dumps(GOOD).encode(), {}


_HTTP: dict[str, Callable[[random.Random], Http]] = {
    "generate": _generate, "infer": _infer, "binary": _binary, "path": _path,
}  # fmt: skip


def bad_http_request(draw: random.Random) -> tuple[str, Http]:
    """(what is wrong with it, (path, body, headers)); bodies are small, see CVE-2025-23310."""
    name = draw.choices(list(_HTTP), [5, 4, 3, 1])[0]
    return name, _HTTP[name](draw)


class HttpCaller:
    """Posts what it is given, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def send(self, request: Http) -> tuple[str, str]:
        """(the status, the body)."""
        path, body, headers = request
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return str(answer.status), answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return "LOST", repr(error)
        finally:
            connection.close()

    def good(self) -> bytes:
        """An answer's body."""
        status, text = self.send(("/v2/models/mixtral/generate", json.dumps(GOOD).encode(), {}))
        if status != "200":
            raise AssertionError(text)
        return text.encode()

    def close(self) -> None:
        """Nothing is held."""
