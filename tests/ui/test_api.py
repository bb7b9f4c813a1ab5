"""The API as the real `openai` client sees it, against a running server with tiny random models."""

import base64
import gzip
import json
import logging
import re
import time
from io import BytesIO

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from studio import VisualQuestionPipeline, decoding_named
from studio.errors import StudioError
from studio.ui.server import models, worker
from studio.ui.server.keys import Keys, read_keys
from studio.ui.server.logs import use_json_lines
from studio.ui.server.rate_limits import RateLimiter, Rates
from studio.ui.server.scheduler import Overloaded

KEY, OTHER = "key-of-anna-1", "key-of-ben-22"
SITE = "https://example.org"


@pytest.fixture(scope="module")
def server(serve_api):
    """A server with keys: its address."""
    return serve_api(Keys([("anna", KEY), ("ben", OTHER)]), [SITE])


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}v1", api_key=KEY, max_retries=0) as found:
        yield found


def opened(data):
    return Image.open(BytesIO(base64.b64decode(data)))


def alone(pipe, prompt, seed, **settings):
    """The image that a single call of the pipeline samples."""
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, generator=generator, decoding=decoding_named("ar").settings(), **settings).images[0])


def data_url(size=(16, 16)):
    file = BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(url, text="what"):
    return [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]}
    ]


def image_part(given):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": given}]}]


def test_images_are_those_of_a_single_call(client, tiny_pipeline):
    found = client.images.generate(prompt="a red apple", n=2, user="u1", extra_body={"seed": 7, "guidance_scale": 2.0})
    assert [each.seed for each in found.data] == [7, 8] and found.size == "16x16" and found.output_format == "png"
    assert found.usage.output_tokens == 32 and found.usage.input_tokens == 3
    for seed, each in zip((7, 8), found.data):
        image = opened(each.b64_json)
        assert np.array_equal(image, alone(tiny_pipeline, "a red apple", seed, guidance_scale=2.0))
        assert json.loads(image.info["studio"])["seed"] == seed
    assert re.fullmatch(r"req_\w{24}", found._request_id)


@pytest.mark.parametrize(("form", "quality"), [("webp", 50), ("jpeg", 90), ("png", None)])
def test_every_format_is_what_it_says(client, form, quality):
    more = {} if quality is None else {"output_compression": quality}
    found = client.images.generate(prompt="a pear", size="16x16", output_format=form, **more)
    assert opened(found.data[0].b64_json).format == form.upper()


def test_an_address_needs_no_key_and_cannot_be_guessed(client, server):
    [found] = client.images.generate(prompt="a pear", response_format="url").data
    assert found.url.startswith(server) and Image.open(BytesIO(httpx.get(found.url).content)).size == (16, 16)
    assert httpx.get(f"{server}v1/images/{'a' * 43}.png").status_code == 404
    assert httpx.get(f"{server}v1/images/..%2f..%2fetc%2fpasswd").status_code in (401, 404)


def test_a_stream_has_partial_images_and_then_each_image(client, tiny_pipeline):
    events = list(client.images.generate(prompt="a pear", n=2, stream=True, partial_images=2, extra_body={"seed": 3}))
    *partial, first, second = events
    assert {each.type for each in partial} == {"image_generation.partial_image"} and 2 <= len(partial) <= 4
    assert [each.partial_image_index for each in partial] == sorted(each.partial_image_index for each in partial)
    assert all(opened(each.b64_json).mode == "RGBA" for each in partial)
    for seed, each in ((3, first), (4, second)):
        assert each.type == "image_generation.completed" and each.usage.output_tokens == 32
        assert np.array_equal(opened(each.b64_json), alone(tiny_pipeline, "a pear", seed))


def test_options_of_a_decoding_stand_beside_the_rest(client, tiny_pipeline):
    exact = {"seed": 5, "decoding": "jacobi", "window": 3}
    [found] = client.images.generate(prompt="a pear", extra_body=exact).data
    image = opened(found.b64_json)
    assert np.array_equal(image, alone(tiny_pipeline, "a pear", 5))
    assert json.loads(image.info["studio"])["call"]["decoding"] == {"name": "jacobi", "window": 3}


@pytest.mark.parametrize(
    ("given", "param", "word"),
    [
        ({"background": "transparent"}, "background", "Unsupported parameter: 'background'"),
        ({"moderation": "low"}, "moderation", "nothing is moderated"),
        ({"quality": "high"}, "quality", "quality"),
        ({"extra_body": {"colour": "red"}}, "colour", "Unknown parameter: 'colour'"),
        ({"extra_body": {"delta": 0.1}}, None, "delta belongs to lantern"),
        ({"extra_body": {"num_inference_steps": 4}}, "num_inference_steps", "the option steps"),
        ({"extra_body": {"decoding": "magic"}}, "decoding", "The decoding is one of"),
        ({"extra_body": {"decoding": ""}}, "decoding", "The decoding is one of"),
        ({"extra_body": {"decoding": "mar"}}, "decoding", "LlamaGen samples with"),
        ({"extra_body": {"top_k": 10**30}}, "top_k", "a whole number from 0 to 1000000"),
        ({"extra_body": {"temperature": -1}}, "temperature", "temperature"),
        ({"extra_body": {"seed": "7"}}, "seed", "integer"),
        ({"n": 9}, "n", "from 1 to 3, not 9"),
        ({"size": "1024x1024"}, "size", "16x16"),
        ({"partial_images": 2}, "partial_images", "stream"),
        ({"output_compression": 50}, "output_compression", "PNG loses nothing"),
        ({"output_format": "gif"}, "output_format", "'png', 'webp' or 'jpeg'"),
        ({"response_format": "url", "stream": True}, "response_format", "b64_json"),
        ({"prompt": "a" * 41}, "prompt", "41 characters; at most 40"),
        ({"prompt": " "}, "prompt", "prompt is empty"),
        ({"stream": True, "prompt": " "}, "prompt", "prompt is empty"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, given, param, word):
    with pytest.raises(openai.BadRequestError) as found:
        client.images.generate(**{"prompt": "a pear", **given})
    error = found.value
    assert error.status_code == 400 and error.type == "invalid_request_error" and error.code
    assert (error.param, word in str(error)) == (param, True), str(error)
    assert error.request_id


@pytest.mark.parametrize(
    ("body", "kind", "word"),
    [
        (b"", "application/json", "Send the parameters as a JSON object"),
        (b"[]", "application/json", "Send the parameters as a JSON object"),
        (b'{"prompt": "a pear"}', "text/plain", "with Content-Type: application/json"),
        (b'{"prompt": ', "application/json", "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", "too many digits"),
        (b"[" * 100_000, "application/json", "nested too deeply"),
        (b'{"prompt": "\xff"}', "application/json", "not UTF-8"),
        (gzip.compress(b'{"prompt": "a pear"}', mtime=0), "application/json", "without compression"),
    ],
)
def test_a_body_that_has_no_parameters_is_refused(server, body, kind, word):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
    answer = httpx.post(f"{server}v1/images/generations", headers=headers, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_json", None), error
    assert word in error["message"], error


def test_a_parameter_called_body_is_named(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server}v1/images/generations", headers=headers, json={"prompt": "a pear", "body": 1})
    assert answer.json()["error"]["param"] == "body"


def test_other_methods_and_paths_are_named(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    for method, path, allowed in (
        ("GET", "images/generations", "POST"),
        ("PUT", "images/edits", "POST"),
        ("GET", "chat/completions", "POST"),
        ("POST", "models", "GET, HEAD"),
        ("DELETE", "models/tiny", "GET, HEAD"),
    ):
        answer = httpx.request(method, f"{server}v1/{path}", headers=headers)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path
        assert answer.json()["error"]["code"] == "method_not_allowed"
    for path in ("v1", "v1/", "v1/files", "v1/images/a.png"):
        answer = httpx.get(f"{server}{path}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url"), path
    for path in ("healthz", "readyz", "metrics", "v1/models", "v1/models/tiny"):
        answer = httpx.head(f"{server}{path}", headers=headers)
        assert (answer.status_code, answer.content) == (200, b""), path


def test_a_model_that_is_not_here_is_not_found(client, server):
    for name in ("gpt-image-1", "/etc", "emoji-vlm", "emoji-vq"):
        with pytest.raises(openai.NotFoundError) as found:
            client.images.generate(prompt="a pear", model=name)
        assert found.value.code == "model_not_found" and found.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-image-1")
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/images/variations"):
        client.images.create_variation(image=b"x")


def test_models_are_listed(client):
    found = {each.id: each.kind for each in client.models.list()}
    assert found["tiny"] == "pipeline" and found["emoji-vlm"] == "reader" and "emoji-vq" not in found
    assert client.models.retrieve("tiny").id == "tiny" == next(iter(found))


def test_a_question_is_answered_whole_and_as_a_stream(client, tiny_reader):
    pipe = VisualQuestionPipeline(*tiny_reader, models._readers["emoji-vlm"].compressor)
    image = Image.new("RGB", (16, 16), "red")
    for extra in ({}, {"prune": "divprune", "keep": 0.5}, {"tokens": 4}, {"merge": "diffrate:40+9"}):
        expected = pipe(image, "what", max_new_tokens=6, **extra)
        call = {"model": "emoji-vlm", "messages": question(data_url()), "max_tokens": 6, "extra_body": extra}
        found = client.chat.completions.create(**call)
        assert found.choices[0].message.content == expected.answer
        assert found.usage.completion_tokens == expected.answer_tokens > 0
        assert found.choices[0].finish_reason == ("length" if expected.answer_tokens == 6 else "stop")
        assert found.studio["kept_tokens"] == expected.kept_tokens
        tower = expected.tower and {"patches": expected.tower.patches, "tokens": expected.tower.tokens}
        assert found.studio["tower"] == tower and (tower is None) == ("merge" not in extra)
        chunks = list(client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}))
        text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
        assert text == expected.answer and chunks[-1].usage.completion_tokens == expected.answer_tokens


@pytest.mark.parametrize(
    ("given", "param", "word"),
    [
        ({"messages": question("https://example.org/a.png")}, "messages", "fetches nothing"),
        ({"messages": question("file:///etc/passwd")}, "messages", "fetches nothing"),
        ({"messages": question("data:image/png;base64,%%%")}, "messages", "not valid base64"),
        ({"messages": question("data:image/png;base64,aaaa")}, "messages", "not an image"),
        ({"messages": question(data_url((100, 51)))}, "messages", "at most 5000"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "what"}]}]}, "messages", "one image_url"),
        ({"messages": [*question(data_url()), *question(data_url())]}, "messages", "one user message"),
        ({"messages": [{"role": "system", "content": "x"}, *question(data_url())]}, "messages", "one user message"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "a list of one text and one image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "[0].content[0]", "text or image_url"),
        ({"messages": question("data:image/png;base64,")}, "messages", "The image is empty"),
        ({"messages": image_part("data:")}, "messages[0].content[0].image_url", "give an object"),
        ({"messages": image_part({"url": "data:", "detail": "low"})}, ".content[0].image_url.detail", "'auto'"),
        ({"messages": image_part({"link": "data:"})}, "messages[0].content[0].image_url.link", "Unknown parameter"),
        ({"temperature": 0.7}, "temperature", "answers are greedy: give 0"),
        ({"extra_body": {"keep": 0.5}}, "keep", "needs a pruning method"),
        ({"extra_body": {"prune": "magic"}}, "prune", "The pruning method is one of"),
        ({"extra_body": {"tokens": 9}}, "tokens", "to 1, 4 tokens, not to 9"),
        ({"extra_body": {"tokens": 9}, "stream": True}, "tokens", "to 1, 4 tokens, not to 9"),
        ({"extra_body": {"tokens": 0}}, "tokens", "at least 1"),
        ({"extra_body": {"tokens": 4, "prune": "divprune"}}, "tokens", "exclude each other"),
        ({"extra_body": {"tokens": 4, "keep": 0.5}}, "keep", "not keep"),
        ({"extra_body": {"merge": "half"}}, "merge", "not 'half'"),
        ({"extra_body": {"merge": ""}}, "merge", "not ''"),
        ({"extra_body": {"merge": 9}}, "merge", "valid string"),
        ({"extra_body": {"merge": "145"}}, "merge", "can lose 72"),
        ({"extra_body": {"merge": "1,1,1"}}, "merge", "give 1 numbers"),
        ({"extra_body": {"merge": "diffrate"}, "stream": True}, "merge", "studio train diffrate"),
        ({"extra_body": {"merge": "1," * 1000}}, "merge", "2000 characters"),
        ({"max_tokens": 65}, "max_tokens", "from 1 to 64"),
        ({"stop": ["."]}, "stop", "max_tokens"),
        ({"tools": []}, "tools", "tools"),
        ({"stream": True, "messages": question("data:image/png;base64,aaaa")}, "messages", "not an image"),
    ],
)
def test_what_the_reader_cannot_do_is_refused_by_name(client, given, param, word):
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**{"model": "emoji-vlm", "messages": question(data_url()), **given})
    message = str(found.value)
    assert param in str(found.value.param) and word in message, message


def test_without_a_key_there_is_no_way_in(server):
    with openai.OpenAI(base_url=f"{server}v1", api_key="wrong-key-1", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="needs a key") as found:
            stranger.images.generate(prompt="a pear")
    assert found.value.code == "invalid_api_key" and found.value.request_id
    for path in ("", "config", "metrics", "docs", "gradio_api/info", "v1/models"):
        assert httpx.get(f"{server}{path}").status_code == 401, path
    assert httpx.get(server).headers["www-authenticate"].startswith("Basic")
    assert httpx.get(server, auth=("anyone", KEY)).status_code == 200
    for path in ("healthz", "readyz"):
        assert httpx.get(f"{server}{path}").status_code == 200


def test_operators_see_numbers_and_a_description(server, client):
    client.images.generate(prompt="a pear")
    headers = {"Authorization": f"Bearer {OTHER}"}
    text = httpx.get(f"{server}metrics", headers=headers).text
    assert re.search(r'studio_images_total\{model="tiny"\} [1-9]', text) and "studio_waiting_images 0.0" in text
    assert 'studio_requests_total{endpoint="/v1/images/generations",status="200"}' in text
    assert re.search(r'studio_phase_seconds_total\{phase="decode"\} \d', text) and "studio_batch_images_count" in text
    described = httpx.get(f"{server}openapi.json", headers=headers).json()
    fields = described["components"]["schemas"]["ImageRequest"]["properties"]
    assert {"prune", "keep", "tokens", "merge"} <= set(described["components"]["schemas"]["ChatRequest"]["properties"])
    assert {"prompt", "guidance_scale", "delta", "window"} <= set(fields) and "/v1/images/generations" in described[
        "paths"
    ]


def test_only_sites_that_were_named_may_ask(server):
    key = {"Authorization": f"Bearer {KEY}"}
    for origin, is_open in ((SITE, True), ("https://evil.example", False)):
        named = "authorization,x-stainless-lang"
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": named}
        before = httpx.options(f"{server}v1/images/generations", headers=headers)
        asked = httpx.post(f"{server}v1/images/generations", headers={**headers, **key}, json={"prompt": "a pear"})
        assert ("access-control-allow-origin" in before.headers) == is_open == (asked.status_code == 200)
        assert (asked.headers.get("access-control-allow-origin") == origin) == is_open
        assert (before.headers.get("access-control-allow-headers") == named) == is_open
        assert (asked.headers.get("access-control-expose-headers") == "X-Request-ID, Retry-After") == is_open
    foreign = httpx.post(f"{server}gradio_api/call/generate", headers={"Origin": SITE, **key}, json={"data": []})
    assert foreign.status_code == 403 and "access-control-allow-origin" not in foreign.headers


def test_bodies_are_bounded_and_must_be_json(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    large = httpx.post(f"{server}v1/images/generations", headers=headers, json={"prompt": "a" * (1 << 20)})
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
    broken = httpx.post(f"{server}v1/images/generations", headers=headers, content=b"{")
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "invalid_request_error"


def test_the_rate_of_a_client_is_bounded(client, monkeypatch):
    monkeypatch.setattr(worker, "_rates", RateLimiter(Rates(requests=3, images=4)))
    for wrong in ({"prompt": " "}, {"prompt": "a pear", "size": "9x9"}, {"prompt": "a pear", "decoding": "mar"}):
        with pytest.raises(openai.BadRequestError):
            client.post("/images/generations", body=wrong, cast_to=object)
    client.images.generate(prompt="a pear", n=3)
    with pytest.raises(openai.RateLimitError, match="4 images a minute") as found:
        client.images.generate(prompt="a pear", n=2)
    assert found.value.code == "rate_limit_exceeded" and 0 < int(found.value.response.headers["retry-after"]) <= 60
    with openai.OpenAI(base_url=client.base_url, api_key=OTHER, max_retries=0) as ben:
        ben.images.generate(prompt="a pear", n=2)


def test_a_server_that_stops_says_when_to_come_back(client, server, monkeypatch):
    monkeypatch.setattr(worker._workers[0], "_closing", True)
    with pytest.raises(openai.InternalServerError, match="about to stop") as found:
        client.images.generate(prompt="a pear")
    assert (found.value.status_code, found.value.code) == (503, "overloaded")
    assert found.value.response.headers["retry-after"] == "30"
    ready = httpx.get(f"{server}readyz")
    assert ready.status_code == 503 and ready.headers["retry-after"] == "30"
    assert httpx.get(f"{server}healthz").status_code == 200


def test_who_hangs_up_frees_the_device(server, steps):
    headers, body = {"Authorization": f"Bearer {KEY}"}, {"prompt": "a pear", "decoding": "ar"}
    for more in ({}, {"stream": True}):
        steps.clear()
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as http:
            with http.stream("POST", f"{server}v1/images/generations", headers=headers, json=body | more) as answer:
                list(answer.iter_bytes())
        ends = time.monotonic() + 10
        while worker._workers[0].load and time.monotonic() < ends:
            time.sleep(0.01)
        assert 1 < len(steps) < 16 and not worker._workers[0].load


def test_requests_are_logged_as_json_without_what_they_say(client, capsys, monkeypatch):
    package = logging.getLogger("studio")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "level", package.level)
    use_json_lines()
    client.images.generate(prompt="a red apple", n=2, user="u7", extra_headers={"X-Request-ID": "mine-1"})
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a red apple", background="opaque")
    good, bad = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"request"' in line]
    assert good["request_id"] == "mine-1" and good["images"] == 2 and good["user"] == "u7" and good["status"] == 200
    assert good["model"] == "tiny" and good["client"] == "anna" and good["seconds"] > 0
    assert bad["status"] == 400 and "apple" not in json.dumps([good, bad])


def test_minutes_pass(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("studio.ui.server.rate_limits.time.monotonic", lambda: now[0])
    limiter = RateLimiter(Rates(requests=2))
    for moment in (0.0, 10.0):
        now[0] = moment
        limiter.check("anna", 1)
        limiter.count("anna", 1)
    with pytest.raises(Overloaded) as found:
        limiter.check("anna", 1)
    assert found.value.retry_after == 50
    now[0] = 61.0
    limiter.check("anna", 1)
    assert len(limiter._asked["anna"]) == 1
    with pytest.raises(StudioError, match="4 images a minute, not 5 at once") as refused:
        RateLimiter(Rates(images=4)).check("anna", 5)
    assert not isinstance(refused.value, Overloaded), "no pause would help"


def test_an_empty_variable_does_not_open_the_server(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDIO_API_KEY", " ")
    with pytest.raises(StudioError, match="STUDIO_API_KEY is empty: give a key or unset it"):
        read_keys([], None)
    (tmp_path / "keys").write_text(f"anna {KEY}")
    assert read_keys([], tmp_path / "keys").client_of(f"Bearer {KEY}") == "anna"


def test_keys_are_read_from_options_and_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("STUDIO_API_KEY", raising=False)
    file = tmp_path / "keys"
    file.write_text(f"# who may\nanna {KEY}\n\n")
    keys = read_keys([OTHER], file)
    assert keys.client_of(f"Bearer {KEY}") == "anna" and keys.client_of(f"bearer {OTHER}") == "key-1"
    assert keys.client_of("Bearer nobody-has-this") is None and keys.client_of(KEY) is None
    assert keys.client_of("Basic %%%") is None and read_keys([], None) is None
    for text, word in (
        (f"anna {KEY} more", "a name and a key"),
        ("anna short", "8 to 200"),
        (f"a {KEY}\nb {KEY}", "another"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=word):
            read_keys([], file)
