"""The stock `openai` package against a server process, feature by feature: the table of docs/serving.md."""

import asyncio
import time

import httpx2
import openai
import pytest
from PIL import Image as PilImage

from tests import tiny
from tests.serve import fixtures
from tests.serve.fixtures import HELLO, data_url, image_part, text_part
from vila.chat.content import parse_messages
from vila.cli.main import main
from vila.core.types import Image, Message
from vila.engine.engine import Engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def engine(model_folder):
    return Engine.load(model_folder, dtype="float32")


@pytest.fixture
def ask(client):
    def call(messages=HELLO, **options):
        return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 8, **options})

    return call


def text_of(answer):
    return answer.choices[0].message.content


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_text_has_an_answer_with_its_reason_usage_and_name(ask, engine):
    answer = ask()
    assert text_of(answer) == engine.generate(HELLO, max_new_tokens=8)
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert (answer.model, answer.object, answer.choices[0].finish_reason) == ("tiny", "chat.completion", "length")
    prompt = len(engine.processor.prompt([Message.of("user", "hello")]).ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 8)
    assert answer.usage.total_tokens == prompt + 8


def test_pieces_of_a_stream_are_the_answer_and_its_usage(ask):
    events = list(ask(stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == text_of(ask())
    assert len([piece for piece in pieces if piece]) > 1
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert [event.usage.completion_tokens for event in events if event.usage] == [8]
    assert len({event.id for event in events}) == 1
    assert not any(event.usage for event in ask(stream=True))


def test_a_stream_ends_with_the_protocols_last_line(server):
    answer = httpx2.post(f"{server.url}/chat/completions", json=fixtures.body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_the_asynchronous_client_asks_several_at_once(server, ask):
    async def many():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8) for _ in range(6)]
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, stream=True)
            pieces = [event.choices[0].delta.content or "" async for event in stream]
            return [text_of(answer) for answer in await asyncio.gather(*asked)], "".join(pieces)

    answers, streamed = asyncio.run(many())
    assert set(answers) == {text_of(ask())} == {streamed}


def test_images_from_data_urls_and_http_in_order(ask, engine):
    first, second = tiny.image(1), tiny.image(2)
    wanted = [Message.of("user", first, "and", second, "differ how?")]
    with fixtures.pages({"/b.png": second.source}) as web:
        parts = (
            image_part(data_url(1)),
            text_part("and"),
            image_part(f"{web}/b.png"),
            text_part("differ how?"),
        )
        assert text_of(ask(user(*parts))) == engine.generate(wanted, max_new_tokens=8)
        other = text_of(ask(user(parts[2], parts[1], parts[0], parts[3])))
    assert other != engine.generate(wanted, max_new_tokens=8)


def test_a_video_equals_its_frames(ask, engine, tmp_path):
    frames = [PilImage.new("RGB", (28, 28), (40 * number, 80, 90)) for number in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    with fixtures.pages({"/clip.gif": (tmp_path / "clip.gif").read_bytes()}) as web:
        part = {"type": "video_url", "video_url": {"url": f"{web}/clip.gif", "num_frames": 2}}
        answer = ask(user(part, text_part("what happens?")))
    video = {"type": "video", "path": str(tmp_path / "clip.gif"), "num_frames": 2}
    with_frames = parse_messages(user(video, text_part("what happens?")))
    assert text_of(answer) == engine.generate(with_frames, max_new_tokens=8)
    assert answer.usage.prompt_tokens == len(engine.processor.prompt(with_frames).ids)


def test_system_text_and_earlier_turns_with_images_are_read(ask, engine):
    turns = [
        {"role": "system", "content": "be brief"},
        *user(image_part(data_url(1)), text_part("colour?")),
        {"role": "assistant", "content": "red"},
        *user(image_part(data_url(2)), text_part("colour?")),
    ]
    wanted = [
        Message.of("system", "be brief"),
        Message.of("user", tiny.image(1), "colour?"),
        Message.of("assistant", "red"),
        Message.of("user", tiny.image(2), "colour?"),
    ]
    answer = ask(turns)
    assert text_of(answer) == engine.generate(wanted, max_new_tokens=8)
    assert answer.usage.prompt_tokens == len(engine.processor.prompt(wanted).ids)
    assert text_of(ask([{"role": "developer", "content": "be brief"}, *turns[1:]])) == text_of(answer)


def test_an_answer_can_be_sent_back_as_the_client_got_it(ask):
    answer = ask()
    turns = [*HELLO, answer.choices[0].message, {"role": "user", "content": "go on"}]
    assert ask(turns).usage.prompt_tokens > answer.usage.prompt_tokens


def test_sampling_is_that_of_the_engine(ask, engine):
    settings = {"temperature": 1.3, "top_p": 0.9, "seed": 11}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
    answer = text_of(ask(**settings, extra_body=extra))
    assert answer == engine.generate(HELLO, max_new_tokens=8, **settings, **extra)
    assert text_of(ask(**settings, extra_body=extra)) == answer
    assert len({text_of(ask(temperature=1.5)) for _ in range(4)}) > 1


def test_several_answers_differ_and_the_first_is_that_of_the_seed(ask):
    answer = ask(n=3, temperature=1.5, seed=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == text_of(ask(temperature=1.5, seed=3))
    assert answer.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for event in ask(n=3, temperature=1.5, seed=3, stream=True):
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == texts


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(ask):
    whole = text_of(ask())
    middle = whole[3:5]
    for stop in (middle, [middle, "\x00"]):
        answer = ask(stop=stop)
        assert text_of(answer) == whole[: whole.index(middle)].rstrip()
        assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_name_tokens_and_the_likeliest(ask):
    answer = ask(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content).strip() == text_of(answer)
    assert len(content) == 8
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert [one.logprob for one in token.top_logprobs] == sorted([t.logprob for t in token.top_logprobs])[::-1]
        assert token.top_logprobs[0].token == token.token
    assert ask(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask().choices[0].logprobs is None
    events = list(ask(logprobs=True, top_logprobs=3, stream=True))
    streamed = [token for event in events if (found := event.choices[0].logprobs) for token in found.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_both_names_of_the_limit_work_and_without_one_the_answer_ends_where_the_context_does(ask):
    assert ask(max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3
    free = ask(user(text_part("x" * 1700)), max_tokens=openai.omit)
    assert free.usage.total_tokens == 2048
    assert ask(max_tokens=openai.omit).usage.completion_tokens == 512


def test_a_repeated_prompt_is_counted_as_cached(ask):
    turns = user(text_part("the same question, twice in a row, long enough to be worth keeping"))
    ask(turns)
    assert ask(turns).usage.prompt_tokens_details.cached_tokens > 0


def test_models_are_listed_found_and_known_by_their_path_too(client, model_folder):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    answer = client.chat.completions.create(model=str(model_folder), messages=HELLO, max_tokens=1)
    assert answer.model == "tiny"


def test_errors_are_the_clients_own_classes_and_name_the_parameter(ask, client):
    with pytest.raises(openai.NotFoundError, match="'tiny'") as lost:
        ask(model="gpt-4o")
    assert (lost.value.param, lost.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty") as refused:
        ask(frequency_penalty=0.5)
    assert refused.value.param == "frequency_penalty"
    with pytest.raises(openai.BadRequestError, match="2048") as long:
        ask(user(text_part("x" * 3000)))
    assert long.value.code == "context_length_exceeded"
    assert "max_new_tokens" not in str(long.value)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    assert text_of(ask(frequency_penalty=0, user="u", response_format={"type": "text"}, tools=[]))


def test_disconnecting_while_streaming_frees_the_slot(ask, server):
    before = _metric(server, "vila_cancelled_total")
    stream = ask(max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if _metric(server, "vila_cancelled_total") > before:
            break
        time.sleep(0.05)
    assert _metric(server, "vila_cancelled_total") == before + 1
    assert _metric(server, "vila_running") == 0
    assert _metric(server, "vila_requests_total", 'status="499"') >= 1


def test_metrics_count_requests_tokens_and_times(ask, server):
    before = _metric(server, "vila_new_tokens_total")
    ask()
    assert _metric(server, "vila_new_tokens_total") == before + 8
    assert _metric(server, "vila_requests_total", 'path="/v1/chat/completions",status="200"') > 0
    for name in ("time_to_first_token", "time_per_token", "request"):
        assert _metric(server, f"vila_{name}_seconds_count") > 0
    assert httpx2.get(f"{server.root}/health").json() == {"status": "ok"}


def test_the_log_has_the_request_id_and_no_prompt(server):
    given = {"X-Request-Id": "mine-77"}
    secret = [{"role": "user", "content": "the secret word"}]
    answer = httpx2.post(f"{server.url}/chat/completions", json=fixtures.body(messages=secret), headers=given)
    assert answer.headers["x-request-id"] == "mine-77"
    other = httpx2.get(f"{server.url}/models", headers={"X-Request-Id": "bad id\t!"})
    assert len(other.headers["x-request-id"]) == 16
    for _ in range(50):
        if any("mine-77" in line for line in server.log_lines):
            break
        time.sleep(0.05)
    assert any("mine-77 POST /v1/chat/completions 200" in line for line in server.log_lines)
    assert not any("secret" in line for line in server.log_lines)


def test_the_same_words_over_http_on_the_command_line_and_in_python(ask, engine, model_folder, capsys, tmp_path):
    (tmp_path / "p.png").write_bytes(tiny.image(5).source)
    wanted = [Message.of("user", Image(tmp_path / "p.png"), "what shape is it?")]
    over_http = text_of(ask(user(image_part(data_url(5)), text_part("what shape is it?")), max_tokens=24))
    with pytest.raises(SystemExit):
        main([
            "run", str(model_folder), "-i", str(tmp_path / "p.png"), "-p", "what shape is it?", "--dtype", "float32",
            "--max-new-tokens", "24",
        ])  # fmt: skip
    assert capsys.readouterr().out.strip() == over_http == engine.generate(wanted, max_new_tokens=24)


def _metric(server, name, labels=""):
    text = httpx2.get(f"{server.root}/metrics").text
    rows = [line for line in text.splitlines() if line.startswith(f"{name}{{") and labels in line]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows)
