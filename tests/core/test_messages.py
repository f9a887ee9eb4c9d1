"""Golden error messages: the reference for the style of all others. No other test asserts whole sentences.

A message is `FILE, record RECORD: FIELD: PROBLEM, got VALUE, expected EXPECTED; HINT`, without the absent parts: where,
what is wrong, what would be accepted, what to do. Lower case, no full stop, one line.
"""

import pytest

from vila.chat.content import parse_messages
from vila.chat.render import render
from vila.chat.templates import find_template
from vila.config.load import load_recipe
from vila.core.errors import (
    CancelledError,
    CheckpointError,
    ClosedError,
    ConfigError,
    ContextOverflowError,
    DataError,
    DeadlineError,
    DirectoryInUseError,
    DownloadError,
    EngineDeadError,
    Interrupted,
    LayoutError,
    MediaError,
    NumericsError,
    Preempted,
    QueueFullError,
    RunChangedError,
    TemplateError,
    TrainingError,
    UnknownNameError,
    VilaError,
    WeightMismatchError,
)
from vila.core.optional import MissingExtraError
from vila.core.reading import Fields, parse_json
from vila.core.system import current_process
from vila.core.types import Message

GOLDEN = [
    (VilaError("is not a regular file; nothing was written", file="/dev/null"),
     "/dev/null: is not a regular file; nothing was written"),
    (ConfigError("unknown key", field="optim.warmup_ration", hint="did you mean 'warmup_ratio'?"),
     "optim.warmup_ration: unknown key; did you mean 'warmup_ratio'?"),
    (ConfigError(field="stage.lr", value="fast", expected="a number > 0 and < 1"),
     "stage.lr: got 'fast', expected a number > 0 and < 1"),
    (ConfigError("missing", field="stage.lr", expected="a number > 0 and < 1"),
     "stage.lr: missing, expected a number > 0 and < 1"),
    (ConfigError("cannot be written (Permission denied)", field="--out", value="/runs", hint="choose another"),
     "--out: cannot be written (Permission denied), got '/runs'; choose another"),
    (ConfigError.collect("my.yaml", [ConfigError("unknown key", field="seeed"), "no mixture"]),
     "my.yaml: 2 problems\n  - seeed: unknown key\n  - no mixture"),
    (UnknownNameError("template", "vicuna", ["vicuna_v1", "page"]),
     "unknown template 'vicuna'; did you mean 'vicuna_v1'? (known: page, vicuna_v1)"),
    (MissingExtraError("vila demo", ["gradio"], extra="demo"),
     "vila demo: needs gradio, which is missing; pip install 'vila-vlm[demo]'"),
    (MediaError("no such file", file="images/a.png", hint="check data.mixture.N.image_root"),
     "images/a.png: no such file; check data.mixture.N.image_root"),
    (MediaError("no such file", file="a.png").within("train.jsonl", 4182),
     "train.jsonl, record 4182: a.png: no such file"),
    (DataError("image 3 of 5 is missing from images/", file="shard-017.jsonl", record=4182,
               hint="allow it with data.max_faults"),
     "shard-017.jsonl, record 4182: image 3 of 5 is missing from images/; allow it with data.max_faults"),
    (DataError(file="a.jsonl", record="line 2", field="messages[0].role", value="bot", expected="user or assistant"),
     "a.jsonl, line 2: messages[0].role: got 'bot', expected user or assistant"),
    (TemplateError("the tokenizer has no token '<|im_end|>'", field="template", value="chatml"),
     "template: the tokenizer has no token '<|im_end|>', got 'chatml'"),
    (WeightMismatchError("model", missing=["lm_head.weight"], unexpected=["norm.foo", "norm.bar"]),
     "model: 1 weights missing (lm_head.weight); 2 weights unexpected (norm.foo, norm.bar); refusing a partial load"),
    (LayoutError(file="config.json", field="rope_parameters.rope_type", value="su", expected="one of default, linear"),
     "config.json: rope_parameters.rope_type: got 'su', expected one of default, linear"),
    (DownloadError("SHA-256 differs", file="https://example.org/a.bin", hint="run the command again"),
     "https://example.org/a.bin: SHA-256 differs; run the command again"),
    (CheckpointError("2 of 8 files are missing", file="runs/a"), "runs/a: 2 of 8 files are missing"),
    (RunChangedError("the recipe", [("stage.lr", "0.001", "0.002")], "runs/a"),
     "runs/a: the recipe changed since the run was started (stage.lr: 0.001 -> 0.002); undo the change, allow it by "
     "name (--allow-changes stage.lr), choose another output.dir, or delete the directory to start over"),
    (ContextOverflowError("the prompt has 5,000 tokens", expected="at most 4,096"),
     "the prompt has 5,000 tokens, expected at most 4,096"),
    (TrainingError("the loss is not finite", field="step 17", value=float("nan"), hint="see budget.max_bad_steps"),
     "step 17: the loss is not finite, got nan; see budget.max_bad_steps"),
    (DirectoryInUseError("runs/a", "node7", 321, "2026-01-01"),
     "runs/a: in use by process 321 on node7 since 2026-01-01; wait until it ends or stop it, or choose another "
     "directory"),
    (Interrupted("interrupted after step 17"), "interrupted after step 17"),
    (Preempted("stopped by SIGTERM after step 17"), "stopped by SIGTERM after step 17"),
    (QueueFullError("the queue is full"), "the queue is full"),
    (ClosedError("the server is shutting down"), "the server is shutting down"),
    (EngineDeadError("the engine has stopped"), "the engine has stopped"),
    (CancelledError("cancelled by the client"), "cancelled by the client"),
    (DeadlineError("no answer within 60 s"), "no answer within 60 s"),
    (NumericsError("the logits are not finite"), "the logits are not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message"), GOLDEN, ids=[type(error).__name__ for error, _ in GOLDEN])
def test_the_message_of_each_error_class(error, message):
    assert str(error) == message


def test_every_error_class_has_a_golden_message():
    import vila.core.errors as module

    classes = {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, VilaError)}
    assert classes <= {type(error) for error, _ in GOLDEN}


def test_a_long_value_is_cut_and_a_rank_is_named():
    error = DataError("wrong", value="a" * 500)
    error.rank = 3
    assert str(error) == "rank 3: wrong, got '" + "a" * 119 + "..."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_template("llama3"), "unknown template 'llama3'; did you mean 'llama_3' or 'llama_2'? (known: "),
        (lambda: load_recipe("vila_7b/3_sft", ["stage.lrr=1e-5"]),
         "vila_7b/3_sft: stage.lrr: unknown key; did you mean 'lr'?"),
        (lambda: load_recipe("vila_7b/3_sft", ["data.packing=row"]),
         "vila_7b/3_sft: data.packing: got 'row', expected rows, grouped or none; did you mean 'rows'?"),
        (lambda: load_recipe("vila_7b/3_sft", ["stage.lr"]),
         "vila_7b/3_sft: override: got 'stage.lr', expected KEY=VALUE, such as stage.lr=1e-5"),
        (lambda: current_process({"RANK": "1"}),
         "WORLD_SIZE: not set; start the run with torchrun, which sets the variables, or unset them to train in one "
         "process"),
        (lambda: parse_json('{"a": ', file="a.jsonl", record="line 3"),
         "a.jsonl, line 3: not JSON (Expecting value at character 6); it ends inside a value: the file was cut, or a "
         "record spans several lines"),
        (lambda: Fields({"size": "big"}, "config.json").integer("size", maximum=9),
         "config.json: size: got 'big', expected an integer from 0 to 9"),
        (lambda: parse_messages([{"role": "user", "content": [{"type": "image"}]}]),
         "messages[0].content[0]: image part with no source, expected one of path, url, base64, image"),
        (lambda: render((), find_template("vicuna_v1")), "messages: the conversation is empty"),
        (lambda: render((Message.of("user", "a"), Message.of("user", "b")), find_template("vicuna_v1")),
         "messages[1]: unexpected role, got 'user', expected assistant"),
    ],
)  # fmt: skip
def test_messages_of_common_mistakes(call, message):
    with pytest.raises(VilaError) as caught:
        call()
    assert str(caught.value).startswith(message)
