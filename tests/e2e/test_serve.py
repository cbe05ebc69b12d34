"""`moesaic serve`: what the openai package and plain HTTP see of it, on a tiny model with adapters of several methods."""

import base64
import concurrent.futures
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import typing

import anthropic
import openai
import pydantic
import pytest
import tokenizers
import torch
import transformers
import yaml
from prometheus_client.parser import text_string_to_metric_families

import test_seq2seq
import tiny_run
from test_compose import make_augmenting
from test_training_options import sentence_t5
from tiny_run import command, run

pytestmark = tiny_run.float32_only
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}is {% endif %}"


class Server:
    """A server on a free port of loopback, for as long as the `with` lasts."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options

    def __enter__(self):
        self.process = subprocess.Popen(command("serve", *self.arguments, "--port", 0, "--dtype", "float32"),
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **self.options)
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"listening on http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.lines))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(timeout=60) == 0, self.lines
        finally:
            self.process.kill()

    def ask(self, path, body=None, method=None, headers=None, raw=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request(method or ("GET" if data is None else "POST"), path, data, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer, text

    def json(self, path, body=None, expect=200, **more):
        answer, text = self.ask(path, body, **more)
        assert answer.status == expect, text
        return json.loads(text)

    def client(self, **changes):
        return openai.OpenAI(**{"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": "none", "max_retries": 0, **changes})

    def idle(self):
        """Whether nothing runs or waits, within ten seconds."""
        for _ in range(200):
            values = {sample.name: sample.value for family in text_string_to_metric_families(self.ask("/metrics")[1].decode())
                      for sample in family.samples if not sample.labels}
            if values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == 0:
                return True
            time.sleep(0.05)
        return False


ADAPTERS = {"lora": {"finetuning_type": "lora", "num_experts": 1}, "molora": {"num_experts": 3},
            "ia3": {"finetuning_type": "ia3", "num_experts": 1}, "mov": {"finetuning_type": "mov", "num_experts": 3},
            "top": {"num_experts": 4, "router": {"top_k": 2}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve")
    tiny_run.make_run(path, initializer_range=0.3)
    (path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name, changes in ADAPTERS.items():
        tiny_run.train(path, name, **changes)
    return path


@pytest.fixture(scope="module")
def server(folder):
    adapters = [flag for name in ADAPTERS for flag in ("--adapter", folder / name)]
    with Server("--model", folder / "model", *adapters, "--mixture", "both=lora:0.5,mov:1", "--served_name", "tiny",
                "--adapter_root", folder, "--allow_runtime_load", "--request_log", folder / "log.jsonl") as running:
        yield running


def completion(server, prompt="red is", **more):
    return server.json("/v1/completions", {"prompt": prompt, "max_tokens": 6, "temperature": 0, **more})


def greedy(folder, prompt, *flags):
    out = run("generate", "--model", folder / "model", "--raw", "--json", "--max_new_tokens", 6, "-p", prompt, *flags)
    return json.loads(out)["text"]


# --- who answers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tiny", *ADAPTERS])
def test_a_model_answers_as_generate_does(folder, server, name):
    flags = () if name == "tiny" else ("--adapter", folder / name)
    assert completion(server, model=name)["choices"][0]["text"] == greedy(folder, "red is", *flags)


def test_mixtures_weigh_adapters(folder, server):
    flags = ("--adapter", f"{folder / 'lora'}:0.5", "--adapter", folder / "mov")
    expected = greedy(folder, "red is", *flags)
    assert completion(server, model="both")["choices"][0]["text"] == expected
    asked = completion(server, lora=[{"name": "lora", "scale": 0.5}, {"name": "mov", "scale": 1}])
    assert asked["choices"][0]["text"] == expected
    assert completion(server, lora=[])["choices"] == completion(server, model="base")["choices"]


def test_models_are_listed(server):
    models = server.json("/v1/models")["data"]
    assert [model["id"] for model in models] == ["tiny", *sorted([*ADAPTERS, "both"])]
    assert server.json("/v1/models/molora")["moesaic"] | {"bytes": 0, "sha256": ""} == {
        "method": "molora", "experts": 3, "rank": 2, "bytes": 0, "sha256": ""}


@pytest.mark.parametrize("body, status, param", [
    ({"model": "nobody"}, 404, "model"), ({"lora": [{"name": "nobody", "scale": 1}]}, 404, "model"),
    ({"lora": [{"name": "lora"}]}, 400, "lora[0].scale"), ({"lora": [{"nmae": "lora", "scale": 1}]}, 400, "lora[0].name"),
    ({"temprature": 0}, 400, "temprature"), ({"temperature": "hot"}, 400, "temperature"), ({"n": 0}, 400, "n"),
    ({"max_tokens": 1.5}, 400, "max_tokens"), ({"max_tokens": 1000}, 400, "max_tokens"), ({"top_p": 0}, 400, "top_p"),
    ({"stop": 3}, 400, "stop"), ({"logit_bias": {"x": 1}}, 400, "logit_bias"), ({"stream": 1}, 400, "stream"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"), ({"mirostat": 2}, 400, "mirostat"),
    ({"best_of": 3}, 400, "best_of"), ({"prompt": []}, 400, "prompt"), ({"prompt": [[99]]}, 400, "prompt"),
    ({"prompt": "red " * 70}, 400, "prompt"), ({"prompt": {"text": "red"}}, 400, "prompt")])
def test_what_can_not_be_answered_is_refused_by_name(server, body, status, param):
    error = server.json("/v1/completions", {"prompt": "red", "max_tokens": 2, **body}, expect=status)["error"]
    assert error["param"] == param and error["code"] == status and error["message"]


def test_fields_that_are_not_known_are_counted(server):
    assert completion(server, some_field_of_tomorrow=1)["choices"]
    assert "moesaic:unknown_fields_total 1\n" in server.ask("/metrics")[1].decode()


# --- the openai package ----------------------------------------------------------------------------------------------

def test_the_openai_client_chats_streams_and_completes(server):
    client = server.client()
    assert "molora" in [model.id for model in client.models.list()]
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "developer", "content": "red"},
                                                                    {"role": "user", "content": [{"type": "text", "text": "cat"}]}],
                                          temperature=0, max_completion_tokens=5, logprobs=True, top_logprobs=2)
    text = chat.choices[0].message.content
    tokens = chat.choices[0].logprobs.content
    assert chat.usage.completion_tokens == len(tokens) and len(tokens[0].top_logprobs) == 2
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob
    with client.chat.completions.stream(model="tiny", messages=[{"role": "system", "content": "red"}, {"role": "user", "content": "cat"}],
                                        temperature=0, max_completion_tokens=5, stream_options={"include_usage": True}) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text and final.usage.completion_tokens == len(tokens)
    whole = client.completions.create(model="lora", prompt="red is", max_tokens=6, temperature=0)
    pieces = list(client.completions.create(model="lora", prompt="red is", max_tokens=6, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    vector = client.embeddings.create(model="lora", input=["red cat", "dog"])
    plain = server.json("/v1/embeddings", {"model": "lora", "input": ["red cat", "dog"]})
    for got, expected in zip(vector.data, plain["data"]):
        assert got.embedding == pytest.approx(expected["embedding"], abs=1e-7)
        assert math.hypot(*got.embedding) == pytest.approx(1, abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="no chat template"):  # it was trained on plain text
        client.chat.completions.create(model="lora", messages=[{"role": "user", "content": "red"}])
    with pytest.raises(openai.NotFoundError, match="molora"):
        client.completions.create(model="nobody", prompt="red")


def test_many_answers_to_many_prompts(server):
    asked = {"prompt": ["red is", "cat not"], "n": 3, "temperature": 1, "seed": 5, "max_tokens": 4}
    choices = server.json("/v1/completions", asked)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert server.json("/v1/completions", asked)["choices"] == choices
    assert server.json("/v1/completions", asked | {"seed": 6})["choices"] != choices
    drawn = server.json("/v1/completions", asked | {"seed": None})
    assert server.json("/v1/completions", asked | {"seed": drawn["moesaic"]["seed"]})["choices"] == drawn["choices"]


# --- scores, as lm-evaluation-harness asks for them ------------------------------------------------------------------

def test_prompts_are_scored(folder, server):
    ids = server.json("/tokenize", {"prompt": "red is green", "add_special_tokens": False})["tokens"]
    assert server.json("/detokenize", {"tokens": ids})["prompt"] == "red is green"
    assert server.json("/tokenizer_info")["bos_token"] == "<s>"
    answer = server.json("/v1/completions", {"model": "lora", "prompt": [ids, ids[:2]], "max_tokens": 1, "logprobs": 1,
                                             "seed": 1234, "echo": True, "temperature": 0})
    scored = json.loads(run("score", "--model", folder / "model", "--adapter", folder / "lora", "--text", "red is green", "--json"))
    for choice, length in zip(answer["choices"], (3, 2)):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None and len(logprobs["token_logprobs"]) == length + 1
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    assert answer["choices"][0]["text"].startswith("red is green")
    assert answer["choices"][0]["logprobs"]["token_logprobs"][1:3] == pytest.approx(scored["logprobs"], abs=1e-5)
    only = server.json("/v1/completions", {"prompt": "red is", "echo": True, "max_tokens": 0, "logprobs": 0})
    assert only["choices"][0]["text"] == "red is" and only["usage"]["completion_tokens"] == 0


# --- alone and in company --------------------------------------------------------------------------------------------

def test_every_request_gets_the_bits_it_gets_alone(server):
    names = ["tiny", *ADAPTERS, "both"]
    words = tiny_run.WORDS
    asked = [{"model": names[i % len(names)], "prompt": " ".join(words[(i * 3 + j) % 10] for j in range(1 + i % 40)),
              "max_tokens": 1 + i % 7, "temperature": i % 2, "seed": i, "logprobs": 1} for i in range(80)]

    def ask(body):
        return server.json("/v1/completions", body)["choices"]

    alone = [ask(body) for body in asked]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, asked))
    assert together == alone
    assert server.idle()


def test_adapters_come_and_go(folder, server, tmp_path):
    shutil.copytree(folder / "lora", folder / "late")
    body = {"lora_name": "late", "lora_path": str(folder / "late")}
    assert server.ask("/v1/load_lora_adapter", body)[1] == b"Success: LoRA adapter 'late' added successfully."
    lora = completion(server, model="lora")["choices"]
    assert completion(server, model="late")["choices"] == lora
    assert server.json("/v1/load_lora_adapter", body, expect=409)
    shutil.copytree(folder / "mov", folder / "late", dirs_exist_ok=True)
    server.ask("/v1/load_lora_adapter", body | {"load_inplace": True})
    assert completion(server, model="late")["choices"] == completion(server, model="mov")["choices"] != lora
    for path, status in ((tmp_path, 404), (folder / "late" / ".." / ".." / "other", 404), (folder / "model", 422)):
        server.json("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(path)}, expect=status)
    (folder / "late" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    server.json("/v1/load_lora_adapter", body | {"load_inplace": True}, expect=422)
    assert completion(server, model="late")["choices"] == completion(server, model="mov")["choices"], "what was there stays"
    server.json("/v1/unload_lora_adapter", {"lora_name": "lora"}, expect=409)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(completion, server, "red cat", model="late", max_tokens=40, ignore_eos=True)
        time.sleep(0.02)
        assert b"removed" in server.ask("/v1/unload_lora_adapter", {"lora_name": "late"})[1]
        assert running.result()["usage"]["completion_tokens"] == 40
    server.json("/v1/completions", {"model": "late", "prompt": "red"}, expect=404)
    assert completion(server, model="mov")["choices"], "others answer on"


# --- HTTP ------------------------------------------------------------------------------------------------------------

def test_malformed_requests_are_told_so(server):
    for raw, status in ((b"{", 400), (b"[]", 400), (b'"x"', 400), (b'{"prompt": "\xff"}', 400), (b"[" * 100000, 400),
                        (b'{"prompt": "\\ud800"}', 400), (b" " * (9 << 20), 413)):
        answer, text = server.ask("/v1/completions", raw=raw)
        assert answer.status == status and json.loads(text)["error"]["code"] == status
    assert server.ask("/v1/completions", raw=b"x", headers={"content-type": "multipart/form-data"})[0].status == 415
    assert server.ask("/v1/nothing")[0].status == 404
    assert server.ask("/lora-adapters", [{"id": 0, "scale": 1}])[0].status == 405
    assert server.ask("/v1/completions", {"prompt": "red"}, headers={"origin": "http://evil.example"})[0].status == 403
    assert server.ask("/v1/models", headers={"host": "evil.example"})[0].status == 421
    for garbage in (b"\x00\xff garbage\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                    b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 300 + b"\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(garbage)
            assert re.match(rb"HTTP/1.1 4\d\d", connection.recv(4096))
    assert server.json("/version") and server.ask("/health")[0].status == 200


def test_headers_go_round(server):
    answer, _ = server.ask("/v1/completions", {"prompt": "red", "max_tokens": 1}, headers={"x-request-id": "mine-1"})
    assert answer.getheader("x-request-id") == "mine-1" and re.fullmatch("[0-9a-f]{16}", answer.getheader("x-moesaic-mixture"))


def test_who_leaves_frees_what_ran_for_it(server):
    before = server.ask("/metrics")[1].decode()
    for streams in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/v1/completions", json.dumps(
            {"prompt": "red", "max_tokens": 60, "ignore_eos": True, "stream": streams, "n": 16, "temperature": 1}).encode())
        if streams:
            connection.getresponse().read(10)
        else:
            time.sleep(0.02)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    assert server.idle()
    cancelled = re.compile(r"^moesaic:cancelled_total (\d+)", re.MULTILINE)
    assert int(cancelled.search(server.ask("/metrics")[1].decode())[1]) >= int(cancelled.search(before)[1]) + 1


def test_a_stream_that_fails_says_so_and_breaks(server):
    # Far more tokens than any machine answers in a second.
    asked = {"prompt": ["red"] * 200, "n": 16, "temperature": 1, "max_tokens": 60, "stream": True}
    more = {"ignore_eos": True, "timeout": 1}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(asked | more).encode())
    answer = connection.getresponse()
    assert answer.status == 200
    with pytest.raises(http.client.IncompleteRead) as broken:
        answer.read()
    assert b"time is over" in broken.value.partial[-300:] and b"[DONE]" not in broken.value.partial
    with pytest.raises(openai.APIError, match="time is over"):
        list(server.client().completions.create(model="tiny", **asked, extra_body=more))


def test_a_page_is_there(server):
    answer, text = server.ask("/")
    assert answer.getheader("content-type").startswith("text/html") and "default-src 'none'" in answer.getheader("content-security-policy")
    assert b"<script>" in text and b"http://" not in text and b"https://" not in text


def test_metrics_and_log_agree(folder, server):
    metrics = {}
    for family in text_string_to_metric_families(server.ask("/metrics")[1].decode()):
        for sample in family.samples:
            metrics[sample.name] = metrics.get(sample.name, 0) + sample.value
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert metrics["vllm:generation_tokens_total"] == sum(row["new_tokens"] for row in rows)
    assert {row["status"] for row in rows} <= {200, 499, 504} and not any("prompt" in row for row in rows)


def test_clients_that_hang_up_while_they_are_answered_end_nothing(server):
    """A write to a connection that was closed, then reset, raises SIGPIPE."""
    for i in range(500):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20)
            connection.shutdown(socket.SHUT_WR)
    assert server.ask("/health")[0].status == 200


def test_whatever_comes_every_good_request_gets_its_answer(folder, server):
    """Good requests among broken bodies, unknown names, clients that leave and adapters that can't be loaded."""
    names = ["tiny", *ADAPTERS, "both"]
    good = [{"model": names[i % len(names)], "prompt": "red is " * (1 + i % 9), "max_tokens": 1 + i % 5, "temperature": 0,
             "logprobs": 0} for i in range(len(names) * 3)]
    alone = [server.json("/v1/completions", body)["choices"] for body in good]
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")

    def leave(i):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            body = json.dumps({"prompt": "red", "max_tokens": 50, "ignore_eos": True, "stream": i % 2 == 0}).encode()
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:i % 80 or None])
            time.sleep(0.01 * (i % 3))

    def act(i):
        kind = i % 6
        if kind == 0:
            return leave(i)
        if kind == 1:
            return server.ask("/v1/completions", raw=b"{" * (i % 300))[0].status == 400
        if kind == 2:
            return server.ask("/v1/load_lora_adapter", {"lora_name": f"x{i}", "lora_path": str(folder / "broken")})[0].status == 422
        number = i % len(good)
        return server.json("/v1/completions", good[number])["choices"] == alone[number]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        outcomes = list(pool.map(act, range(600)))
    assert all(outcome is not False for outcome in outcomes)
    assert server.idle() and server.json("/ready")["status"] == "ready"


# --- other models ----------------------------------------------------------------------------------------------------

def test_a_composition_answers_with_adapters_beside_its_anchor(folder, tmp_path):
    make_augmenting(tmp_path / "aug")
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump({
        "anchor": str(folder / "model"), "augmenting": str(tmp_path / "aug"), "output_dir": str(tmp_path / "calm"),
        "connections": [{"anchor": 0, "aug": 1}, {"anchor": 1, "aug": 3}], "output_init": "normal"}))
    run("compose", tmp_path / "compose.yaml")
    with Server("--model", tmp_path / "calm", "--adapter", folder / "lora") as server:
        alone = [completion(server, prompt="cat dog is", model=name, logprobs=0)["choices"] for name in ("base", "lora")]
        for flags, choices in (((), alone[0]), (("--adapter", folder / "lora"), alone[1])):
            out = run("generate", "--model", tmp_path / "calm", "--raw", "--json", "--max_new_tokens", 6, "-p", "cat dog is", *flags)
            assert json.loads(out)["text"] == choices[0]["text"]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda i: completion(server, prompt="cat dog is" if i < 8 else "red " * i,
                                                          model=("base", "lora")[i % 2], logprobs=0)["choices"], range(16)))
        assert together[:8] == alone * 4


def test_an_encoder_decoder_answers(tmp_path):
    test_seq2seq.make_model(tmp_path / "model")
    with Server("--model", tmp_path / "model") as server:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda i: completion(server, prompt=("red cat", "dog")[i % 2])["choices"][0]["text"], range(6)))
    for prompt, text in (("red cat", together[0]), ("dog", together[1])):
        out = run("generate", "--model", tmp_path / "model", "--raw", "--json", "--max_new_tokens", 6, "-p", prompt)
        assert json.loads(out)["text"] == text
    assert together == together[:2] * 3


# --- life ------------------------------------------------------------------------------------------------------------

class Pet(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    kind: typing.Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)
    friends: list["Pet"] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A random model whose tokenizer writes bytes."""
    folder = tmp_path_factory.mktemp("bytes") / "model"
    golden = tiny_run.ROOT / "tests" / "compose" / "golden" / "gpt2.json"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizers.Tokenizer.from_file(str(golden)).get_vocab_size() + 3, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.3)).save_pretrained(folder)
    shutil.copy(golden, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with Server("--model", folder) as running:
        yield running


def test_answers_are_held_to_schemas_and_grammars(byte_level, server):
    """Whatever a random model says: what ended by itself is of the schema, for the openai client and on the wire."""
    client = byte_level.client()
    ask = dict(model="model", messages=[{"role": "user", "content": "a pet"}], temperature=1, max_tokens=1500)
    kinds, ended = set(), 0
    for seed in range(12):
        choice = client.beta.chat.completions.parse(response_format=Pet, seed=seed, **ask).choices[0] if seed < 4 else \
            client.chat.completions.create(seed=seed, response_format={"type": "json_schema", "json_schema": {
                "name": "pet", "strict": True, "schema": Pet.model_json_schema()}}, **ask).choices[0]
        if choice.finish_reason == "stop":
            ended += 1
            kinds.add(Pet.model_validate_json(choice.message.content).kind)
    assert ended >= 6 and kinds == {"cat", "dog"}

    def text(**more):
        return byte_level.json("/v1/chat/completions", {**ask, **more})["choices"][0]

    assert isinstance(json.loads(text(seed=3, response_format={"type": "json_object"})["message"]["content"]), dict)
    said = text(seed=1, structured_outputs={"choice": ["a+b", "c (d)"]}, n=8)
    assert said["finish_reason"] == "stop" and said["message"]["content"] in ("a+b", "c (d)")
    for outputs, pattern in (({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
                             ({"grammar": 'start: "<" N ("," N)* ">"\nN: /[0-9]/'}, "<[0-9](,[0-9])*>")):
        assert re.fullmatch(pattern, text(seed=5, structured_outputs=outputs)["message"]["content"])
    cut = text(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "array", "items": {"type": "integer"}, "minItems": 50}}}, max_tokens=8)
    assert cut["finish_reason"] == "length"
    # With log-probabilities the model's own: those of tokens that it was kept from are higher.
    scored = byte_level.json("/v1/completions", {"prompt": "a pet", "max_tokens": 3, "temperature": 0, "logprobs": 1,
                                                 "structured_outputs": {"regex": "[0-9]{3}"}})["choices"][0]
    assert re.fullmatch("[0-9]{3}", scored["text"])
    assert any(max(top.values()) > own for top, own in zip(scored["logprobs"]["top_logprobs"],
                                                          scored["logprobs"]["token_logprobs"]))
    stream = client.chat.completions.create(seed=3, stream=True, response_format={"type": "json_object"}, **ask)
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert joined == text(seed=3, response_format={"type": "json_object"})["message"]["content"]

    for body, says in (({"response_format": {"type": "json_schema", "json_schema": {"schema": {
                            "type": "array", "uniqueItems": True}}}}, "uniqueItems"),
                       ({"response_format": {"type": "xml"}}, "text, json_object or json_schema"),
                       ({"response_format": {"type": "json_schema"}}, 'an object with "schema"'),
                       ({"structured_outputs": {"regex": "("}}, "regex"),
                       ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "one of json"),
                       ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "none beside")):
        error = byte_level.json("/v1/chat/completions", {**ask, **body}, expect=400)["error"]
        assert says in error["message"] and error["param"].startswith(list(body)[0]), error
    refused = server.json("/v1/chat/completions", {**ask, "model": "tiny", "max_tokens": 3,
                                                   "response_format": {"type": "json_object"}}, expect=400)
    assert "what its tokens write is not known one by one" in refused["error"]["message"]


# Qwen's way: tools shown, calls and their results in the conversation.
TOOL_TEMPLATE = ("{% for t in tools or [] %}{{ t | tojson }} {% endfor %}{% for m in messages %}{{ m.role }}: "
                 "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>\n{\"name\": {{ c.function.name | tojson }}, "
                 "\"arguments\": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n{% endfor %}"
                 "{% if add_generation_prompt %}assistant: {% endif %}")


def test_tools_are_called(byte_level, tmp_path):
    """Asked for, calls come whatever a random model would say, whole and streamed; what it says by itself is text."""
    folder = shutil.copytree(byte_level.arguments[1], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    schema = {"type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"type": "integer", "minimum": 1,
                                                                                           "maximum": 9}},
              "required": ["place", "days"], "additionalProperties": False,
              "$defs": {"Place": {"enum": ["Oslo", "Lima"]}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Of a place", "parameters": schema}},
             {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}}]
    messages = [{"role": "user", "content": "weather in Oslo?"}]
    with Server("--model", folder) as running:
        client = running.client()
        ask = dict(model="model", messages=messages, tools=tools, temperature=1, max_tokens=400)
        for seed in range(4):
            choice = client.chat.completions.create(tool_choice="required", seed=seed, **ask).choices[0]
            if choice.finish_reason == "length":
                continue
            assert choice.finish_reason == "tool_calls" and choice.message.content is None, choice.message.content
            for call in choice.message.tool_calls:
                assert call.function.name in ("weather", "now") and re.fullmatch("[0-9a-z]{9}", call.id)
        named = {"type": "function", "function": {"name": "weather"}}
        whole = client.chat.completions.create(tool_choice=named, seed=1, **ask).choices[0]
        arguments = json.loads(whole.message.tool_calls[0].function.arguments)
        assert arguments["place"] in ("Oslo", "Lima") and 1 <= arguments["days"] <= 9
        name, streamed, reasons = "", "", []
        for chunk in client.chat.completions.create(tool_choice=named, seed=1, stream=True, **ask):
            delta = chunk.choices[0].delta
            assert not delta.content
            for call in delta.tool_calls or []:
                name, streamed = name + (call.function.name or ""), streamed + (call.function.arguments or "")
            reasons.append(chunk.choices[0].finish_reason)
        assert (name, json.loads(streamed), reasons[-1]) == ("weather", arguments, "tool_calls")
        # The conversation goes on; what a template gets of a call is an object.
        more = messages + [whole.message.model_dump(exclude_none=True),
                           {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "rain"}]
        said = client.chat.completions.create(**{**ask, "messages": more, "max_tokens": 5}).choices[0]
        assert said.message.tool_calls is None and said.message.content
        plain = running.json("/v1/chat/completions", {**ask, "temperature": 0, "max_tokens": 5, "tool_choice": "none"})
        none = running.json("/v1/chat/completions", {**ask, "temperature": 0, "max_tokens": 5, "tools": None})
        assert plain["choices"][0]["message"] == none["choices"][0]["message"]
        for body, says in (({"tools": [{"type": "function"}]}, "tools[0].type"), ({"tools": {}}, "a list of tools"),
                           ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "64 letters"),
                           ({"tool_choice": "always"}, "none, auto, required"),
                           ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "one of the tools"),
                           ({"tools": None, "tool_choice": "required"}, "there are no tools"),
                           ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "none beside")):
            assert says in running.json("/v1/chat/completions", {**ask, **body}, expect=400)["error"]["message"]
    refused = byte_level.json("/v1/chat/completions", ask, expect=400)
    assert "the model's chat template takes none" in refused["error"]["message"]


def test_the_anthropic_client_asks(folder, server, byte_level, tmp_path):
    """The same answers as a chat's, in Anthropic's words: whole, streamed, stopped, counted, refused."""
    def client_of(running, **changes):
        return anthropic.Anthropic(**{"base_url": f"http://127.0.0.1:{running.port}", "api_key": "none", "max_retries": 0,
                                      **changes})

    def chat(running, **body):
        return running.json("/v1/chat/completions", {"temperature": 0, **body})

    greedily = dict(extra_body={"temperature": 0})  # the package has no temperature of its own
    client = client_of(server)
    blocks = [{"type": "text", "text": "cat "}, {"type": "text", "text": "dog", "cache_control": {"type": "ephemeral"}}]
    ask = dict(model="tiny", system=[{"type": "text", "text": "red"}], messages=[{"role": "user", "content": blocks}])
    plain = dict(model="tiny", messages=[{"role": "system", "content": "red"}, {"role": "user", "content": "cat dog"}])
    wanted = chat(server, max_tokens=6, **plain)
    text, usage = wanted["choices"][0]["message"]["content"], wanted["usage"]
    whole = client.messages.create(max_tokens=6, **ask, **greedily)
    assert [(block.type, block.text) for block in whole.content] == [("text", text)]
    assert (whole.type, whole.role, whole.model, whole.stop_sequence) == ("message", "assistant", "tiny", None)
    assert whole.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[wanted["choices"][0]["finish_reason"]]
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == usage["prompt_tokens"]
    assert whole.usage.output_tokens == usage["completion_tokens"]
    with client.messages.stream(max_tokens=6, **ask, **greedily) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().model_dump(exclude={"id", "usage"}) == whole.model_dump(exclude={"id", "usage"})
    _, raw = server.ask("/v1/messages", {**ask, "max_tokens": 6, "temperature": 0, "stream": True})
    kinds = re.findall("^event: (.*)$", raw.decode(), re.M)
    assert [kind for i, kind in enumerate(kinds) if kind != "content_block_delta" or kinds[i - 1] != kind] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"]
    assert client.messages.count_tokens(**ask).input_tokens == usage["prompt_tokens"]
    word = text.split()[1]
    stopped = client.messages.create(max_tokens=6, stop_sequences=["nothing", word], **ask, **greedily)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert "".join(block.text for block in stopped.content) == text[:text.index(word)]
    assert chat(server, max_tokens=6, stop=[word], **plain)["choices"][0]["stop_reason"] == word
    assert server.json("/m/tiny/v1/messages", {**ask, "max_tokens": 6, "temperature": 0})["content"][0]["text"] == text
    with pytest.raises(anthropic.NotFoundError, match="not_found_error.*nobody"):
        client.messages.create(max_tokens=6, **{**ask, "model": "nobody"})
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}]
    opened = [*ask["messages"], {"role": "assistant", "content": "a"}]
    for body, says in (({"max_tokens": None}, "max_tokens: got nothing, expected how many"), ({"n": 2}, "ask /v1/chat/completions"),
                       ({"messages": image}, "messages[0].content[0].type: got \"image\", expected text or tool_result"),
                       ({"messages": opened}, "expected a user's"), ({"messages": []}, "a list of messages"),
                       ({"messages": [{"role": "system", "content": "a"}]}, "user or assistant"),
                       ({"messages": [{"role": "user", "content": []}]}, "a list of blocks"),
                       ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "no such thing"),
                       ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
                       ({"tool_choice": {"type": "required"}}, "auto, any, tool or none"), ({"stop_sequence": ["a"]}, "stop_sequences")):
        refused = server.json("/v1/messages", {**ask, "max_tokens": 6, **body}, expect=400)
        assert refused["type"] == "error" and refused["error"]["type"] == "invalid_request_error"
        assert says in refused["error"]["message"], refused

    held = client_of(byte_level).messages.create(
        model="model", max_tokens=1500, messages=[{"role": "user", "content": "a pet"}], extra_body={
            "seed": 3, "output_config": {"format": {"type": "json_schema", "schema": {"enum": ["cat", "dog"]}}}})
    assert json.loads(held.content[0].text) in ("cat", "dog") and held.stop_reason == "end_turn"

    own = shutil.copytree(byte_level.arguments[1], tmp_path / "model")
    (own / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    schema = {"type": "object", "properties": {"place": {"enum": ["Oslo", "Lima"]}}, "required": ["place"],
              "additionalProperties": False}
    tools = [{"name": "weather", "description": "Of a place", "input_schema": schema}]
    messages = [{"role": "user", "content": "weather in Oslo?"}]
    with Server("--model", own) as running:
        client = client_of(running)
        ask = dict(model="model", max_tokens=400, tools=tools, **greedily, tool_choice={
            "type": "tool", "name": "weather", "disable_parallel_tool_use": True})
        whole = client.messages.create(messages=messages, **ask)
        assert whole.stop_reason == "tool_use"
        call, = whole.content
        assert call.type == "tool_use" and call.name == "weather" and call.input["place"] in ("Oslo", "Lima")
        with client.messages.stream(messages=messages, **ask) as stream:
            final = stream.get_final_message()
        assert (final.stop_reason, final.content[0].name, final.content[0].input) == ("tool_use", "weather", call.input)
        calls = [[len(client.messages.create(messages=messages, **{**ask, "tool_choice": {
            "type": "any", "disable_parallel_tool_use": alone}, "extra_body": {"seed": seed, "temperature": 100}}).content)
            for seed in range(12)] for alone in (False, True)]
        assert max(calls[0]) > 1 and max(calls[1]) == 1, calls
        # What is answered to it reaches the template as a chat's does.
        more = [*messages, {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": [
                    {"type": "text", "text": "rain"}]}, {"type": "text", "text": "and now?"}]}]
        said = client.messages.create(messages=more, **{**ask, "max_tokens": 5, "tool_choice": {"type": "auto"}})
        alike = chat(running, model="model", max_tokens=5, tools=[{"type": "function", "function": {
            "name": "weather", "description": "Of a place", "parameters": schema}}], messages=[*messages, {
                "role": "assistant", "content": "", "tool_calls": [{"id": call.id, "type": "function", "function": {
                    "name": "weather", "arguments": json.dumps(call.input)}}]},
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}, {"role": "user", "content": "and now?"}])
        assert said.content[0].text == alike["choices"][0]["message"]["content"]
        assert said.usage.input_tokens + said.usage.cache_read_input_tokens == alike["usage"]["prompt_tokens"]

    keys = tmp_path / "keys"
    keys.write_text(f"ann {hashlib.sha256(b'secret').hexdigest()}\n")
    with Server("--model", folder / "model", "--api_keys", keys) as running:
        ask = dict(model="model", max_tokens=1, messages=[{"role": "user", "content": "cat"}])
        assert client_of(running, api_key="secret").messages.create(**ask).usage.output_tokens == 1
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            client_of(running, api_key="wrong").messages.create(**ask)


def test_the_openai_client_asks_for_responses(server, byte_level, tmp_path):
    """The same answers as a chat's, in the words of the Responses API: whole, streamed, held, with tools, refused."""
    client = server.client()
    ask = dict(model="tiny", instructions="red", input="cat dog", temperature=0, max_output_tokens=6, store=False)
    plain = dict(model="tiny", temperature=0, max_tokens=6)
    wanted = server.json("/v1/chat/completions", {**plain, "messages": [
        {"role": "system", "content": "red"}, {"role": "user", "content": "cat dog"}]})
    text, usage = wanted["choices"][0]["message"]["content"], wanted["usage"]
    whole = client.responses.create(**ask)
    cut = wanted["choices"][0]["finish_reason"] == "length"
    assert whole.output_text == text and whole.status == whole.output[0].status == ("incomplete" if cut else "completed")
    assert (whole.incomplete_details.reason if cut else whole.incomplete_details) == ("max_output_tokens" if cut else None)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (whole.instructions, whole.max_output_tokens, whole.temperature, whole.store) == ("red", 6, 0, False)
    events = list(client.responses.create(stream=True, **ask))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", "incomplete" if cut else "completed"]
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == text
    apart = {"id", "created_at", "usage"}
    last, first = events[-1].response.model_dump(exclude=apart), whole.model_dump(exclude=apart)
    for response in (last, first):
        for item in response["output"]:
            item.pop("id")
    assert last == first
    with client.responses.stream(**ask) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == text
    items = [{"role": "developer", "content": "red"}, {"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "cat "}, {"type": "input_text", "text": "dog"}]}, {"type": "reasoning", "summary": []}]
    assert client.responses.create(**{**ask, "instructions": None, "input": items}).output_text == text
    for body, says in (({"input": None}, "input: got nothing"), ({"input": []}, "a list of items"),
                       ({"input": [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}]},
                        "input[0].content[0].type"),
                       ({"input": [{"type": "web_search_call"}]}, "input[0].type"), ({"store": True}, "keeps nothing"),
                       ({"previous_response_id": "resp_1"}, "send the whole conversation"), ({"background": True}, "keeps nothing"),
                       ({"truncation": "auto"}, "leaves nothing out"), ({"include": ["message.output_text.logprobs"]}, "include"),
                       ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"max_tokens": 3}, "chat/completions"),
                       ({"text": {"format": {"type": "xml"}}}, "text.format.type"), ({"max_outputtokens": 3}, "max_output_tokens")):
        assert says in server.json("/v1/responses", {**ask, **body}, expect=400)["error"]["message"], body
    assert server.json("/v1/responses/resp_1", expect=404)["error"]["code"] == 404

    held = byte_level.client().responses.parse(model="model", input="a pet", text_format=Pet, extra_body={"seed": 3})
    assert held.status == "incomplete" or held.output_parsed.kind in ("cat", "dog")

    own = shutil.copytree(byte_level.arguments[1], tmp_path / "model")
    (own / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    schema = {"type": "object", "properties": {"place": {"enum": ["Oslo", "Lima"]}}, "required": ["place"],
              "additionalProperties": False}
    function = {"name": "weather", "description": "Of a place", "parameters": schema}
    with Server("--model", own) as running:
        client = running.client()
        ask = dict(model="model", temperature=0, tools=[{"type": "function", **function}], parallel_tool_calls=False,
                   tool_choice={"type": "function", "name": "weather"})
        whole = client.responses.create(input="weather?", **ask)
        call, = whole.output
        place = json.loads(call.arguments)["place"]
        assert (call.type, call.name, whole.status) == ("function_call", "weather", "completed") and place in ("Oslo", "Lima")
        with client.responses.stream(input="weather?", **ask) as stream:
            streamed, = stream.get_final_response().output
        assert (streamed.name, json.loads(streamed.arguments), streamed.status) == ("weather", {"place": place}, "completed")
        more = [{"role": "user", "content": "weather?"}, call.model_dump(exclude_none=True, exclude={"parsed_arguments"}),
                {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}, {"role": "user", "content": "now?"}]
        said = client.responses.create(input=more, **{**ask, "tool_choice": "auto"}, max_output_tokens=5)
        alike = running.json("/v1/chat/completions", {
            "model": "model", "temperature": 0, "max_tokens": 5, "tools": [{"type": "function", "function": function}],
            "messages": [more[0], {"role": "assistant", "content": "", "tool_calls": [{
                "id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": call.arguments}}]},
                {"role": "tool", "tool_call_id": call.call_id, "content": "rain"}, more[3]]})
        assert said.output_text == alike["choices"][0]["message"]["content"]
        assert said.usage.input_tokens == alike["usage"]["prompt_tokens"]


def test_keys_limits_and_the_end(folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}{role}\n" for name, role in (("ann", ""), ("bob", " admin"))))
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {folder / 'model'}\nadapters: {{a: {folder / 'lora'}}}\nmixtures: {{half: {{a: 0.5}}}}\n"
                      f"api_keys: {keys}\nmax_queue: 2\nmax_seqs: 1\nmax_request_time: 30\n")
    with Server("--config", config) as server:
        assert server.json("/v1/models", expect=401) and server.ask("/health")[0].status == 200
        ann = {"authorization": "Bearer ann"}
        assert [model["id"] for model in server.json("/v1/models", headers=ann)["data"]] == ["model", "a", "half"]
        assert server.json("/v1/load_lora_adapter", {"lora_name": "x"}, expect=403, headers={"authorization": "Bearer bob"})
        long = {"prompt": "red", "max_tokens": 60, "ignore_eos": True, "temperature": 1, "n": 16}
        with concurrent.futures.ThreadPoolExecutor(60) as pool:
            asked = [pool.submit(server.ask, "/v1/completions", long, None, ann) for _ in range(60)]
            answers = [one.result()[0] for one in asked]
        statuses = [answer.status for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        assert all(int(answer.getheader("retry-after")) >= 1 for answer in answers if answer.status == 429)
        with pytest.raises(openai.InternalServerError, match="time is over"):
            server.client(api_key="ann").completions.create(model="a", prompt="red", max_tokens=60, timeout=30, 
                                                              extra_body={"timeout": 0.001, "ignore_eos": True})
        slow = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", long, None, ann)[0]))
        slow.start()
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        slow.join()
        assert answers[-1].status in (200, 503) and server.process.wait(timeout=60) == 0


@pytest.mark.parametrize("arguments, message", [
    (["--host", "0.0.0.0"], "expected a loopback address"), (["--allow_runtime_load"], "adapter_root"),
    (["--max_seqs", "0"], "max_seqs: got 0"), (["--mixture", "x=nobody:1"], "got 'nobody:1'"),
    (["--config", "missing.yaml"], "missing.yaml"), (["--max_model_len", "1000"], "max_model_len: got 1000"),
    (["--api_keys", "missing"], "can't read this file"), (["--kv_memory", "1e9GiB"], "kv_memory")])
def test_settings_that_can_not_be_are_refused(folder, arguments, message):
    done = tiny_run.moesaic("serve", "--model", folder / "model", "--port", 0, *arguments)
    assert done.returncode in (2, 3) and message in done.stderr, done.stderr


def test_a_dry_run_says_what_it_takes(folder):
    done = tiny_run.moesaic("serve", folder / "molora", "--dry_run")
    assert done.returncode == 0 and "keys and values" in done.stderr and "model molora" in done.stderr, done.stderr


def test_a_config_with_an_unknown_key_is_refused(folder, tmp_path):
    (tmp_path / "serve.yaml").write_text("max_seq: 3\n")
    done = tiny_run.moesaic("serve", "--model", folder / "model", "--config", tmp_path / "serve.yaml")
    assert done.returncode == 2 and "did you mean 'max_seqs'" in done.stderr


def test_a_router_that_reads_a_sentence_encoder(folder, tmp_path):
    """Loaded at the start or later; a text that begins as one read before has its own sentence's vector."""
    (tmp_path / "encoder").mkdir()
    sentence_t5(tmp_path / "encoder", dense=False)
    out = tiny_run.train(folder, "sentences", num_experts=4, router={
        "input": "sentence", "sentence_source": str(tmp_path / "encoder"), "init_std": 2.0})
    begins = "red is cat one two " * 7
    asked = {"prompt": begins + "blue dog blue dog green", "max_tokens": 4, "logprobs": 1, "temperature": 0}
    with Server(folder / "model", "--adapter", out) as server:
        alone = server.json("/v1/completions", asked | {"model": "sentences", "cache_salt": "alone"})
        server.json("/v1/completions", asked | {"model": "sentences", "prompt": begins + "red"})
        again = server.json("/v1/completions", asked | {"model": "sentences"})
        assert again["choices"][0]["logprobs"] == alone["choices"][0]["logprobs"]
        assert alone["choices"][0]["text"] == run("generate", folder / "model", "--adapter", out, "-p", asked["prompt"],
                                                  "--raw", "--max_new_tokens", 4).strip("\n")
    with Server(folder / "model", "--allow_runtime_load", "--adapter_root", folder) as server:
        server.ask("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": str(out)})
        late = server.json("/v1/completions", asked | {"model": "late"})
        assert late["choices"][0]["logprobs"] == alone["choices"][0]["logprobs"]
