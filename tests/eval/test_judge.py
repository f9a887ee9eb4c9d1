"""Judge: published requests, reply parsing, metrics, cache, retries."""

import hashlib
import json
import math
import time

import pytest

from tests.eval.chat_server import chat_server, completion
from tests.eval.checks import refused
from tests.pages import numbers
from vila.core.errors import ConfigError, DataError, UnknownNameError
from vila.eval.judge import (
    JudgeCase,
    OpenAIJudge,
    ReplyFile,
    RequestFile,
    estimate_cost,
    judge_prompts,
    parse_reply,
    read_cases,
    read_verdicts,
    request_body,
    summarize_verdicts,
    verdict_is_yes,
    verdict_score,
)
from vila.eval.openai_client import OpenAIClient, RetryPolicy, ServerError, chat_completions_url

QUICK = RetryPolicy(attempts=3, backoff_s=0.01, max_wait_s=1)

# The messages of Video-ChatGPT's evaluation, filled in by hand.
VIDEO_QA = {
    "model": "gpt-3.5-turbo",
    "messages": [
        {
            "role": "system",
            "content": "You are an intelligent chatbot designed for evaluating the correctness of generative outputs "
            "for question-answer pairs. Your task is to compare the predicted answer with the correct answer and "
            "determine if they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - "
            "Focus on the meaningful match between the predicted answer and the correct answer.\n- Consider synonyms "
            "or paraphrases as valid matches.\n- Evaluate the correctness of the prediction compared to the answer.",
        },
        {
            "role": "user",
            "content": "Please evaluate the following video-based question-answer pair:\n\nQuestion: what is a man "
            "doing?\nCorrect Answer: ride\nPredicted Answer: The man rides a horse.\n\nProvide your evaluation only as "
            "a yes/no and score where the score is an integer value between 0 and 5, with 5 indicating the highest "
            "meaningful match. Please generate the response in the form of a Python dictionary string with keys 'pred' "
            "and 'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not "
            "STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. "
            "For example, your response should look like this: {'pred': 'yes', 'score': 4.8}.",
        },
    ],
}
RIDE = JudgeCase("7", {"question": "what is a man doing?", "answer": "ride", "pred": "The man rides a horse."})
CONSISTENCY_USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion 1: who runs?\nQuestion 2: who is "
    "running?\nCorrect Answer: a dog\nPredicted Answer to Question 1: a cat\nPredicted Answer to Question 2: a dog\n\n"
    "Provide your evaluation only as a consistency score where the consistency score is an integer value between 0 "
    "and 5, with 5 indicating the highest level of consistency. Please generate the response in the form of a Python "
    "dictionary string with keys 'score', where its value is the consistency score in INTEGER, not STRING.DO NOT "
    "PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. For example, your "
    "response should look like this: {''score': 4.8}."
)


def case(number, pred="x", question="q?"):
    return JudgeCase(str(number), {"question": question, "answer": "a", "pred": pred})


def judge(served, tmp_path, **options):
    options = {"rounds": 2, **options}
    return OpenAIJudge(
        OpenAIClient(served.url, key="", retry_policy=QUICK, concurrency=4), tmp_path / "cache", **options
    )


def test_the_request_is_the_published_one():
    assert request_body("video_qa", RIDE) == VIDEO_QA
    assert list(request_body("video_qa", RIDE)) == ["model", "messages"]


def test_the_request_about_two_questions_is_the_published_one():
    fields = {"question1": "who runs?", "question2": "who is running?", "answer": "a dog", "pred1": "a cat"}
    body = request_body("consistency", JudgeCase("1", {**fields, "pred2": "a dog"}), "m")
    assert body["messages"][1]["content"] == CONSISTENCY_USER
    with refused(record="case 1", field="pred2"):
        request_body("consistency", JudgeCase("1", fields))


# Of the filled messages, worked out from the published text by replacing each line as a whole.
HASHES = {
    "video_qa": "12ee9c23ec1f1696",
    "correctness": "70cebca5424eb638",
    "detail": "c977f44d008844af",
    "context": "a6963c9c82d4b4eb",
    "temporal": "7d0657f29b95c11a",
}


@pytest.mark.parametrize("kind", HASHES)
def test_placeholders_in_field_values_are_not_filled(kind):
    fields = {"question": "What is he doing?", "answer": "cooking {pred}", "pred": "he cooks {question}"}
    messages = [[m["role"], m["content"]] for m in request_body(kind, JudgeCase("1", fields))["messages"]]
    assert hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16] == HASHES[kind]


def test_judge_prompts_are_video_qa_and_the_five_dimensions():
    assert set(judge_prompts()) == {*HASHES, "consistency"}
    with refused("'temporal'", error=UnknownNameError, name="temporl"):
        request_body("temporl", RIDE)


# (reply, whether it is readable, the score, yes or no, rule)
REPLIES = [
    ("{'pred': 'yes', 'score': 5}", True, 5, True, "as asked for"),
    ("{'pred': 'no', 'score': 0}", True, 0, False, "as asked for"),
    ("{'pred': 'yes', 'score': 4.8}", True, 4, True, "a fraction is cut, not rounded"),
    ("{'pred': 'no', 'score': -0.9}", True, 0, False, "cut towards zero"),
    ("{'pred': 'yes', 'score': '4'}", True, 4, True, "a score in quotes that is a whole number"),
    ("{'pred': 'yes', 'score': '4.8'}", True, None, None, "a fraction in quotes is no score: no yes either"),
    ("{'pred': 'yes'}", True, None, None, "no score: the yes is not counted"),
    ("{'score': 3}", True, 3, None, "no pred: the score counts alone"),
    ("{'pred': 'YES, it matches', 'score': 4}", True, 4, True, "yes anywhere, in any letters"),
    ("{'pred': 'eyes', 'score': 1}", True, 1, True, "yes inside a word"),
    ("{'pred': 'not at all', 'score': 1}", True, 1, False, "no inside a word"),
    ("{'pred': 'no, not yes', 'score': 1}", True, 1, True, "yes is looked for first"),
    ("{'pred': 'maybe', 'score': 2}", True, 2, None, "neither: the score counts alone"),
    ("{'pred': True, 'score': 2}", True, 2, None, "pred is no text"),
    ("{'pred': 'yes', 'score': None}", True, None, None, "None is no score"),
    ("{'pred': 'yes', 'score': True}", True, 1, True, "True is the whole number 1 in Python"),
    ("{'pred': 'yes', 'score': 1e999}", True, None, None, "infinity is no whole number"),
    ("{'pred': 'yes', 'score': 11}", True, 11, True, "above 5 is not refused"),
    ('{"pred": "yes", "score": 5}', True, 5, True, "JSON that is Python too"),
    ('{"pred": "yes", "score": null}', False, None, None, "null is a name in Python, not a literal"),
    (" {'pred': 'yes', 'score': 5}\n", True, 5, True, "white space around"),
    ("{'pred': 'yes', 'score': 5}.", False, None, None, "a full stop behind"),
    ("```{'pred': 'yes', 'score': 5}```", False, None, None, "in a code fence"),
    ("Sure! {'pred': 'yes', 'score': 5}", False, None, None, "words before"),
    ("{''score': 4.8}", False, None, None, "the prompt's own example for the dimensions is no literal"),
    ("yes", False, None, None, "a name, not a literal"),
    ("'yes'", True, None, None, "a literal without a score: counted in the average as 0"),
    ("5", True, None, None, "a number is no mapping"),
    ("[{'pred': 'yes', 'score': 5}]", True, None, None, "a list is no mapping"),
    ("__import__('os').getcwd()", False, None, None, "a call is never run"),
    ("", False, None, None, "empty"),
    ("[" * 3000, False, None, None, "too deep to parse"),
    ("'" + "x" * 20_000 + "'", False, None, None, "longer than any verdict"),
    ("{'pred': 'да', 'score': 3}", True, 3, None, "other letters"),
]


@pytest.mark.parametrize(("reply", "readable", "score", "yes", "rule"), REPLIES, ids=[r[-1] for r in REPLIES])
def test_replies_are_read_as_upstream_reads_them(reply, readable, score, yes, rule):
    verdict = parse_reply("1", reply)
    assert verdict.readable == readable
    assert (verdict_score(verdict.value), verdict_is_yes(verdict.value)) == (score, yes)


def test_denominators():
    # Worked out from the table: 34 replies, 10 of them not readable.
    found = summarize_verdicts(parse_reply(str(number), row[0]) for number, row in enumerate(REPLIES))
    assert found.count == 24
    # yes: 5, 4.8, '4', YES, eyes, not yes, True, 11, JSON, white space; no: 0, -0.9, "not at all".
    assert (found.yes, found.no) == (10, 3)
    assert found.accuracy == pytest.approx(100 * 10 / 13)
    # 5+0+4+0+4 +3+4+1+1+1+2+2 +1+11+5+5 +3, those without a score adding nothing
    assert found.average_score == pytest.approx(52 / 24)
    assert len(found.no_score) == 7
    assert len(found.undecided) == 4
    nothing = summarize_verdicts([parse_reply("1", "?")])
    assert (nothing.accuracy, nothing.average_score, nothing.count) == (0, 0, 0)


def test_equal_ids_are_counted_each():
    assert summarize_verdicts([parse_reply("1", "{'pred': 'yes', 'score': 5}")] * 3).yes == 3


def test_request_has_the_published_body_and_the_key(tmp_path):
    with chat_server(lambda body, number: "{'pred': 'yes', 'score': 5}") as served:
        judge_client = OpenAIJudge(OpenAIClient(served.url, key="sk-secret", retry_policy=QUICK), tmp_path / "cache")
        (verdict,) = judge_client.verdicts("video_qa", [RIDE])
    assert served.bodies == [VIDEO_QA]
    assert served.paths == ["/v1/chat/completions"]
    assert served.headers[0]["authorization"] == "Bearer sk-secret"
    assert verdict.value == {"pred": "yes", "score": 5}
    kept = [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
    assert len(kept) == 1
    assert "sk-secret" not in kept[0]


def test_cached_replies_are_not_requested_again(tmp_path):
    cases = [case(n, pred=f"p{n}") for n in range(5)]
    with chat_server(lambda body, number: f"{{'pred': 'no', 'score': {number % 5}}}") as served:
        first = judge(served, tmp_path).verdicts("video_qa", cases)
        assert judge(served, tmp_path).verdicts("video_qa", cases) == first
        assert len(served.bodies) == 5
        judge(served, tmp_path, model="other").verdicts("video_qa", cases[:2])
        judge(served, tmp_path).verdicts("correctness", cases[:1])
    assert len(served.bodies) == 5 + 2 + 1


def test_equal_requests_are_sent_once(tmp_path):
    with chat_server(lambda body, number: "{'pred': 'yes', 'score': 5}") as served:
        verdicts = judge(served, tmp_path).verdicts("video_qa", [case("a"), case("b"), case("c", pred="y")])
    assert len(served.bodies) == 2
    assert [verdict.id for verdict in verdicts] == ["a", "b", "c"]


def test_unreadable_replies_are_retried_then_left_out(tmp_path):
    def answer(body, number):
        if "Predicted Answer: never" in body["messages"][1]["content"]:
            return "I cannot say."
        return "{'pred': 'yes', 'score': 4}" if number >= 2 else "hm"

    with chat_server(answer) as served:
        verdicts = judge(served, tmp_path, rounds=3).verdicts(
            "video_qa", [case(1, pred="later"), case(2, pred="never")]
        )
        # Round 1: two of garbage. Round 2: one reads. Rounds 3 to 5: three more without anything new.
        assert len(served.bodies) == 2 + 2 + 3
        assert [verdict.readable for verdict in verdicts] == [True, False]
        assert verdicts[1].reply == "I cannot say."
        before = len(served.bodies)
        judge(served, tmp_path, rounds=1).verdicts("video_qa", [case(1, pred="later"), case(2, pred="never")])
        assert len(served.bodies) == before + 1


def test_a_busy_server_is_retried_after_retry_after(tmp_path):
    def answer(body, number):
        return (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}) if number < 2 else "{'score': 1}"

    with chat_server(answer) as served:
        (verdict,) = judge(served, tmp_path).verdicts("context", [RIDE])
    assert len(served.bodies) == 3
    assert verdict.value == {"score": 1}


def test_retry_after_is_respected():
    waits = []
    with chat_server(lambda body, number: (429, {"Retry-After": "1"}, {}) if number == 0 else "yes") as served:
        client = OpenAIClient(served.url, key="", retry_policy=QUICK)

        def skip(seconds):
            waits.append(seconds)
            client._resume_at = 0.0  # as if the time had passed
            return False

        client._closed.wait = skip
        assert client.complete({}).text == "yes"
    assert waits == [pytest.approx(1, abs=0.5)]


@pytest.mark.parametrize(
    ("given", "words", "status", "attempts"),
    [
        ((500, {}, b"oops"), "oops", 500, 3),
        ((429, {"Retry-After": "600"}, {}), "600 s", 429, 1),
        ((200, {}, b"<html>"), "<html>", None, 3),
        ((200, {}, {"choices": []}), "chat completion", None, 3),
        ((400, {}, {"error": {"message": "too long"}}), "too long", 400, 1),
        ((401, {}, {"error": {"message": "bad key sk-1"}}), "bad key ***", 401, 1),
        ((429, {}, {"error": {"message": "pay", "code": "insufficient_quota"}}), "pay", 429, 1),
        ((302, {"Location": "http://elsewhere.example/"}, b""), "302", 302, 1),
        ((200, {}, completion(None, refusal="no thanks")), "no thanks", None, 1),
        ((200, {}, completion("half", "content_filter")), "content_filter", None, 1),
    ],
)
def test_errors_have_status_and_message_of_the_server(given, words, status, attempts):
    with chat_server(lambda body, number: given) as served:
        with pytest.raises(ServerError) as caught:
            OpenAIClient(served.url, key="sk-1", retry_policy=QUICK).complete({"model": "m"})
        assert (caught.value.file, caught.value.status) == (f"{served.url}/chat/completions", status)
        assert words in caught.value.problem and "sk-1" not in str(caught.value)
        assert len(served.bodies) == attempts


def test_a_refused_key_is_not_tried_for_every_question(tmp_path):
    with chat_server(lambda body, number: (401, {}, {"error": {"message": "wrong key"}})) as served:
        with pytest.raises(ServerError):
            judge(served, tmp_path).verdicts("video_qa", [case(n, pred=str(n)) for n in range(50)])
        assert len(served.bodies) <= 4  # those that were under way


def test_a_server_that_answers_nothing_ends_the_rounds(tmp_path):
    with chat_server(lambda body, number: (503, {}, b"")) as served:
        with pytest.raises(ServerError):
            judge(served, tmp_path, rounds=10).verdicts("video_qa", [RIDE])
        assert len(served.bodies) == 3


def test_unreachable_server():
    client = OpenAIClient("http://127.0.0.1:9/v1", key="", retry_policy=RetryPolicy(attempts=1))
    with pytest.raises(ServerError) as caught:
        client.complete({})
    assert (caught.value.file, caught.value.status) == ("http://127.0.0.1:9/v1/chat/completions", None)


def test_dropped_requests_are_not_sent():
    with chat_server(lambda body, number: "x") as served:
        client = OpenAIClient(served.url, key="", concurrency=1)
        replies = client.run_parallel([lambda: client.complete({})] * 50)
        assert next(replies)[1].text == "x"
        replies.close()
        time.sleep(0.1)
        sent = len(served.bodies)
        time.sleep(0.1)
        assert len(served.bodies) == sent < 50


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/chat/completions"),
        ("https://host/openai/v2", "https://host/openai/v2/chat/completions"),
        ("https://host/v1/chat/completions", "https://host/v1/chat/completions"),
    ],
)
def test_addresses(url, address):
    assert chat_completions_url(url) == address


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://me:pw@host/v1", ""])
def test_invalid_urls_are_refused(url):
    with pytest.raises(ConfigError) as caught:
        chat_completions_url(url)
    assert caught.value.value == url


def test_openai_without_a_key_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError) as caught:
        OpenAIClient()
    assert "OPENAI_API_KEY" in caught.value.hint


class Listener:
    def __init__(self):
        self.lines, self.done = [], 0

    def started(self, task, total=None, unit=""):
        self.total = total

    def advanced(self, task, amount=1, **facts):
        self.done += amount

    def log(self, text):
        self.lines.append(text)

    def finished(self, task, summary=""):
        pass


def test_the_cost_is_reported_before_the_start(tmp_path):
    events = Listener()
    with chat_server(lambda body, number: "{'pred': 'yes', 'score': 5}") as served:
        judge_client = judge(served, tmp_path, events=events)
        estimate = judge_client.estimate("video_qa", [RIDE])
        assert not served.bodies
        judge_client.verdicts("video_qa", [RIDE])
        judge_client.verdicts("video_qa", [RIDE, case(2)])
    characters = sum(math.ceil(len(m["content"]) / 4) + 4 for m in VIDEO_QA["messages"])
    assert (estimate.requests, estimate.input_tokens, estimate.output_tokens) == (1, characters, 20)
    assert estimate.dollars == pytest.approx((characters * 0.5 + 20 * 1.5) / 1e6)
    assert "gpt-3.5-turbo" in events.lines[0] and {1, characters} <= set(numbers(events.lines[0]))
    assert numbers(events.lines[1].partition(":")[2])[:2] == [1, 1]  # requests, and those in the cache
    assert (events.total, events.done) == (2, 1 + 2)


def test_prices():
    body = {"messages": [{"content": "x" * 4_000_000}]}
    assert estimate_cost([body], "gpt-4o-2024-11-20").dollars == pytest.approx(2.5, rel=1e-3)
    assert estimate_cost([body], "gpt-4o-mini").dollars == pytest.approx(0.15, rel=1e-3)
    assert estimate_cost([body], "mine").dollars is None
    own = estimate_cost([body], "mine", {"mine": (7.0, 0.0)})
    assert own.dollars == pytest.approx(7, rel=1e-3)
    assert "$7.00" in own.text


def test_without_a_judge_the_requests_are_written(tmp_path):
    with refused("gpt-3.5-turbo: 2", file="requests.jsonl"):
        RequestFile(tmp_path / "requests.jsonl").verdicts("video_qa", [RIDE, case(8)])
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert rows[0] == {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": VIDEO_QA}
    assert len(rows) == 2


def test_replies_from_a_batch_service(tmp_path):
    path = tmp_path / "replies.jsonl"
    rows = [
        {"custom_id": "8", "response": {"status_code": 200, "body": completion("{'pred': 'no', 'score': 1}")}},
        {"custom_id": "9", "response": None, "error": {"message": "expired"}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts = ReplyFile(path).verdicts("video_qa", [RIDE, case(8), case(9)])
    assert [verdict.readable for verdict in verdicts] == [False, True, False]
    for line in ('{"custom_id": "10", "resp', "[]", '{"custom_id": "10"}', "[" * 5000):
        path.write_text(path.read_text().rpartition("\n")[0] + f"\n{line}")
        with pytest.raises(DataError) as caught:
            read_verdicts(path)
        assert (caught.value.file, caught.value.record) == (str(path), "line 3")


def test_replies_on_other_answers_are_no_verdicts(tmp_path):
    (tmp_path / "7.json").write_text('[{"pred": "yes", "score": 5}, {}]')
    with refused("1 replies", ": 7", ": 8"):
        ReplyFile(tmp_path).verdicts("video_qa", [case(8)])


def test_verdict_files_of_upstream_are_parsed(tmp_path):
    kept = [{"pred": "yes", "score": 4.8}, {"q": "q", "a": "a", "pred": "p"}]
    (tmp_path / "v_1_3.json").write_text(json.dumps(kept))
    assert [(v.id, v.value) for v in read_verdicts(tmp_path)] == [("v_1_3", kept[0])]
    (tmp_path / "all.json").write_text(json.dumps({"v_1_3": kept, "v_2": kept}))
    assert summarize_verdicts(read_verdicts(tmp_path / "all.json")).average_score == 4
    (tmp_path / "all.json").write_text(json.dumps({"v_1_3": kept, "v_2": {}}))
    with refused(file="all.json", record="verdict v_2", value={}):
        read_verdicts(tmp_path / "all.json")


def test_files_of_predictions_become_cases(tmp_path):
    path = tmp_path / "preds.json"
    rows = [
        {"video_name": "v1", "Q": "who?", "A": "a dog", "pred": "x"},
        {"id": 7, "question": "q", "answer": 3, "pred": ""},
    ]
    path.write_text(json.dumps([*rows, rows[0]]))
    cases = read_cases(path, "temporal")
    assert [case.id for case in cases] == ["v1", "7", "v1 again (2)"]
    assert [dict(case.fields) for case in cases[:2]] == [
        {"question": "who?", "answer": "a dog", "pred": "x"},
        {"question": "q", "answer": "3", "pred": ""},
    ]
    path.write_text(json.dumps({"video_name": "v", "Q1": "a", "Q2": "b", "A": "c", "pred1": "d", "pred2": "e"}) + "\n")
    (case,) = read_cases(path, "consistency")
    assert dict(case.fields) == {"question1": "a", "question2": "b", "answer": "c", "pred1": "d", "pred2": "e"}
    with refused(file="preds.json", record="line 1", field="question or Q"):
        read_cases(path, "video_qa")
    path.write_text(path.read_text() + '{"video_name": "v", "Q1')
    with pytest.raises(DataError) as caught:
        read_cases(path, "consistency")
    assert (caught.value.file, caught.value.record) == (str(path), "line 2")
