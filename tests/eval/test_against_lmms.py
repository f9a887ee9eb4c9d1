"""Our scores against lmms-eval's own functions on the same answers; needs lmms-eval (see docs/judge.md)."""

import importlib
import json
import random
import statistics

import pytest

from vila.eval.benchmark import BENCHMARKS, Answer

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see docs/judge.md")

WORDS = ["red", "stop", "coca cola", "7", "two", "exit sign", "ocean", "10:45", "nike", "girl's", "12.5", "the end"]
LETTERS = "ABCD"
YES_NO = ["Yes", "No", "yes", "no"]


@pytest.fixture
def rng():
    return random.Random(20)


def theirs(name):
    return importlib.import_module(f"lmms_eval.tasks.{name}.utils")


def write(path, rows, lines=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))


def scores(name, folder, answers, protocol=("upstream", "lmms-eval")):
    benchmark = BENCHMARKS[name](folder, 0)
    return [benchmark.score(answers, each) for each in protocol]


@pytest.mark.parametrize("messy", [False, True])
def test_textvqa(tmp_path, rng, messy):
    suffix = "\nReference OCR token: A, B\nAnswer the question using a single word or phrase."
    rows, asked, answers = [], [], []
    for number in range(150):
        humans = rng.choices(rng.sample(WORDS, 3), k=10)
        question, image = f"What is written on sign {number}?", f"im{number // 2}"
        rows.append({"question_id": number, "question": question, "image_id": image, "answers": humans})
        asked.append({"question_id": image, "image": f"{image}.jpg", "text": question + suffix})
        given = rng.choice([*humans, "other"])
        given = (
            rng.choice([given.upper(), f"the {given}.", f"{given}, {given}", f"\n{given}\t", f"{given}!", ""])
            if messy
            else given
        )
        answers.append(Answer(image, given, question + suffix))
    write(tmp_path / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", asked)
    write(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", {"data": rows}, lines=False)
    process = theirs("textvqa").textvqa_process_results
    docs = [{**row, "answers": list(row["answers"])} for row in rows]
    wanted = [process(doc, [answer.text])["exact_match"] for doc, answer in zip(docs, answers, strict=True)]
    for result in scores("textvqa", tmp_path, answers):
        assert result.score == pytest.approx(100 * statistics.mean(wanted), abs=1e-9)
        assert [mark.value for mark in result.question_scores] == pytest.approx(wanted)
    assert 0.1 < statistics.mean(wanted) < 0.9


@pytest.mark.parametrize("messy", [False, True])
def test_pope(tmp_path, rng, messy):
    asked, answers, docs = [], [], []
    for first, category in ((1, "adversarial"), (10_000_001, "random"), (20_000_001, "popular")):
        labels = []
        for number in range(100):
            image, text = f"COCO_{number // 6}.jpg", f"Is there a {category} thing {number} in the image?"
            label = rng.choice(["yes", "no"])
            labels.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            prompt = f"{text}\nAnswer the question using a single word or phrase."
            asked.append({"question_id": first + number, "image": image, "text": prompt, "category": category})
            answer = rng.choice(
                [label, label, label, *YES_NO, *(["maybe", "Yes.", " NO \n", "", "not"] if messy else [])]
            )
            answers.append(Answer(first + number, answer, prompt))
            docs.append({"question_id": str(first + number), "answer": label})
        write(tmp_path / "pope" / "coco" / f"coco_pope_{category}.json", labels)
    write(tmp_path / "pope" / "llava_pope_test.jsonl", asked)
    pope = theirs("pope")
    results = [pope.pope_process_results(d, [a.text])["pope_f1_score"] for d, a in zip(docs, answers, strict=True)]
    upstream, lmms = scores("pope", tmp_path, answers)
    assert lmms.score == pytest.approx(100 * pope.pope_aggregate_f1_score(results))
    for name in ("accuracy", "precision", "recall", "yes_ratio"):
        assert lmms.metrics[name] == pytest.approx(getattr(pope, f"pope_aggregate_{name}")(results))
    if not messy:  # theirs is over all questions together; ours is among the figures
        assert upstream.metrics["pooled"]["f1"] == pytest.approx(pope.pope_aggregate_f1_score(results))


@pytest.mark.parametrize("messy", [False, True])
def test_mme(tmp_path, rng, messy):
    mme = theirs("mme")
    asked, answers, docs = [], [], []
    for category in (*mme.eval_type_dict["Perception"], *mme.eval_type_dict["Cognition"]):
        for number in range(12):
            lines = []
            for question in (f"Is this {category} {number}?", f"Is this not {category} {number}?"):
                truth = rng.choice(["Yes", "No"])
                lines.append(f"{question} Please answer yes or no.\t{truth}\n")
                prompt = f"{question}\nAnswer the question using a single word or phrase."
                name = f"{category}/{number:04}.jpg"
                asked.append({"question_id": name, "image": name, "text": prompt, "category": category})
                mess = ["Yes.", "y", "n", "N.", "No way", "I know", "maybe", "", " yes"] if messy else []
                answers.append(Answer(name, rng.choice([truth] * 6 + YES_NO + mess), prompt))
                docs.append({"question_id": name, "category": category, "answer": truth})
            path = tmp_path / "MME" / "MME_Benchmark_release_version" / category / f"{number:04}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
    write(tmp_path / "MME" / "llava_mme.jsonl", asked)
    results = [mme.mme_process_results(doc, [a.text]) for doc, a in zip(docs, answers, strict=True)]
    for result in scores("mme", tmp_path, answers, ("lmms-eval",) if messy else ("upstream", "lmms-eval")):
        for part in ("perception", "cognition"):
            rows = [row[f"mme_{part}_score"] for row in results if f"mme_{part}_score" in row]
            assert result.metrics[part] == pytest.approx(mme.mme_aggregate_results(rows))
        assert result.score == result.metrics["perception"]


@pytest.mark.parametrize("messy", [False, True])
def test_scienceqa(tmp_path, rng, messy):
    problems, asked, answers, docs = {}, [], [], []
    for number in range(200):
        choices = [f"choice {letter}" for letter in "ABCDE"[: rng.randint(2, 5)]]
        truth, seen = rng.randrange(len(choices)), rng.random() < 0.5
        problem = {"question": f"Which is {number}?", "choices": choices, "answer": truth, "hint": "", "subject": "s"}
        problems[str(number)] = {**problem, "image": "image.png" if seen else None, "split": "test"}
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))
        text = ("<image>\n" if seen else "") + f"Which is {number}?\n{options}"
        row = {"id": str(number), "conversations": [{"from": "human", "value": text}]}
        asked.append({**row, "image": f"{number}/image.png"} if seen else row)
        letter = rng.choice(["ABCDE"[truth], rng.choice("ABCDE")])
        mess = [f" {letter}", letter.lower(), f"{letter}.", f"({letter})", f"{letter} and B", "", "The answer is A."]
        answer = rng.choice([letter, f"{letter}. choice", *(mess if messy else [])])
        prompt = f"{text}\nAnswer with the option's letter from the given choices directly."
        answers.append(Answer(str(number), answer, prompt))
        if seen:
            docs.append(({"choices": choices, "answer": truth}, answer))
    write(tmp_path / "scienceqa" / "problems.json", problems, lines=False)
    write(tmp_path / "scienceqa" / "pid_splits.json", {"test": list(problems)}, lines=False)
    write(tmp_path / "scienceqa" / "llava_test_CQM-A.json", asked, lines=False)
    process = theirs("scienceqa").sqa_process_results
    wanted = 100 * statistics.mean(process(doc, [answer])["exact_match"] for doc, answer in docs)
    for result in scores("scienceqa", tmp_path, answers, ("lmms-eval",) if messy else ("upstream", "lmms-eval")):
        assert result.score == pytest.approx(wanted)
    assert 20 < wanted < 90


@pytest.mark.parametrize("messy", [False, True])
def test_seed(tmp_path, rng, messy, monkeypatch):
    monkeypatch.chdir(tmp_path)  # theirs writes a file where it runs
    kinds = {f"Kind {number}": number for number in range(1, 13)}
    questions, asked, answers = [], [], []
    for number in range(240):
        kind = number % 12 + 1
        video = kind > 9
        name = f"v{number}" if video else str(number)
        truth = rng.choice(LETTERS)
        row = {"question_id": name, "question_type_id": kind, "answer": truth, "question": f"What is {number}?"}
        choices = {f"choice_{letter.lower()}": f"{letter} {number}" for letter in LETTERS}
        questions.append({**row, **choices, "data_type": "video" if video else "image", "data_id": f"d{number // 3}"})
        asked.append({"question_id": name if video else number, "image": f"{name}.png", "text": f"What is {number}?"})
        answer = rng.choice([truth, rng.choice(LETTERS)])
        mess = [answer.lower(), f"{answer}. text", f" {answer}", f"{answer} and B", "", "no", f"({answer})"]
        answers.append(
            Answer(name if video else number, rng.choice([answer, *(mess if messy else [])]), f"What is {number}?")
        )
    write(tmp_path / "seed_bench" / "SEED-Bench.json", {"question_type": kinds, "questions": questions}, lines=False)
    write(tmp_path / "seed_bench" / "llava-seed-bench.jsonl", asked)
    seed = theirs("seedbench")
    results = [seed.seed_process_result(row, [a.text]) for row, a in zip(questions, answers, strict=True)]
    for result in scores("seed", tmp_path, answers, ("lmms-eval",) if messy else ("upstream", "lmms-eval")):
        assert result.score == pytest.approx(100 * seed.seed_aggregation_result_all([r["seed_all"] for r in results]))
        for medium in ("image", "video"):
            rows = [row[f"seed_{medium}"] for row in results if f"seed_{medium}" in row]
            assert result.metrics[medium] == pytest.approx(100 * seed.seed_aggregation_result(rows))
