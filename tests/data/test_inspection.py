from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora.config import DataConfig
from lora.data.inspection import inspect_data, inspect_prepared
from lora.data.inspection_report import DataReport
from lora.data.inspection_view import print_report
from lora.data.prepare import prepare_data
from lora.data.tokenizers.subword import TextTokenizer

ROWS = [{"instruction": f"Add {n} and 3.", "output": f"The sum is {n + 3}."} for n in range(20)]


def printed(report: DataReport, **options: Any) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120, **options))
    return stream.getvalue()


def test_notes_on_the_tokenizer_are_shown(chatml_tokenizer: TextTokenizer) -> None:
    noted = dataclasses.replace(chatml_tokenizer, notes=("BPE dropout is off",))
    assert inspect_data(ROWS, noted, DataConfig()).notes == ["BPE dropout is off"]


def test_settings_of_a_split_are_not_ignored_in_silence(chatml_tokenizer: TextTokenizer) -> None:
    report = inspect_data(ROWS, chatml_tokenizer, DataConfig(eval_fraction=0.2))
    assert report.notes == ["eval_fraction=0.2 is not used here: the figures cover all examples"]


def test_figures_are_those_of_training(chatml_tokenizer: TextTokenizer) -> None:
    for packing in (True, False):
        config = DataConfig(max_length=128, eval_fraction=0, packing=packing)
        report = inspect_data(ROWS, chatml_tokenizer, config)
        data = prepare_data(ROWS, chatml_tokenizer, config, seed=0)
        assert report.errors == report.warnings == report.notes == []
        assert report.formats == {"instruction and output": 20}
        assert report.n_learned_tokens == data.train.n_target_tokens
        n_tokens = int(data.train_encoded.lengths.sum())
        assert report.n_learned_tokens + report.n_ignored_tokens == n_tokens
        assert report.n_rows == len(data.train)
        assert report.fill_fraction == pytest.approx(data.train.fill_fraction)
        assert report.template_origin == "the model's chat template"
        lengths = data.train_encoded.lengths
        assert report.quantiles_tokens["shortest"] == lengths.min()
        assert report.quantiles_tokens["longest"] == lengths.max()


def test_sizes_are_counted_by_powers_of_two(tokenizer: TextTokenizer) -> None:
    rows = [{"text": "a" * n} for n in (1, 2, 3, 30)]  # and the end of the text
    config = DataConfig(max_length=16)
    report = inspect_data(rows, tokenizer, config)
    sizes = [n + 1 for n in (1, 2, 3, 30)]
    assert sum(count for _, _, count in report.histogram) == 4
    for fewest, most, count in report.histogram:
        assert count == sum(fewest <= size <= most for size in sizes)
    assert report.counts.n_truncated == 1
    assert report.n_without_end == 0  # the cut one has lost its end to the cut


def test_previews_show_the_targets(chatml_tokenizer: TextTokenizer) -> None:
    report = inspect_data(ROWS, chatml_tokenizer, DataConfig(), n_previews=2)
    assert [p.source for p in report.previews] == ["row 1", "row 2"]
    assert report.previews[0].spans[1:] == [("The sum is 3.<|im_end|>", True), ("\n", False)]
    assert (
        report.previews[0].spans[0][0].endswith("Add 0 and 3.<|im_end|>\n<|im_start|>assistant\n")
    )


def test_long_previews_are_cut(tokenizer: TextTokenizer) -> None:
    report = inspect_data([{"text": "é" * 500}], tokenizer, DataConfig(max_length=2000))
    (preview,) = report.previews
    assert preview.n_more_tokens == 1000 + 1 - 400
    assert f"{preview.n_more_tokens} more tokens" in printed(report)


def test_likely_mistakes_are_a_warning(
    chatml_tokenizer: TextTokenizer,
) -> None:
    question = {"role": "user", "content": "q"}
    rows = [
        *ROWS[:3],
        ROWS[0],
        {"instruction": "q", "output": " "},
        {"messages": [question]},
        {"instruction": "q" * 300, "output": "a"},
    ]
    report = inspect_data(rows, chatml_tokenizer, DataConfig(max_length=200))
    assert report.errors == []
    assert (report.n_duplicates, report.n_empty_answers) == (1, 1)
    warnings = "\n".join(report.warnings)
    assert "1 of 7 examples are copies" in warnings
    assert "1 of 7 examples have an empty answer" in warnings
    assert "2 of 7 examples have no target token" in warnings
    assert "1 of 7 examples are longer than max_length=200" in warnings
    assert "never stop" not in warnings


def test_a_few_cut_examples_are_a_note(chatml_tokenizer: TextTokenizer) -> None:
    rows = [*ROWS, {"instruction": "q", "output": "a" * 300}]
    report = inspect_data(rows, chatml_tokenizer, DataConfig(max_length=200))
    assert report.warnings == []
    assert "1 of 21 examples are longer than max_length=200 and lose" in report.notes[0]


def test_answers_without_an_end_are_a_warning(tokenizer: TextTokenizer) -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    tokenizer = dataclasses.replace(tokenizer, chat_template=endless)
    report = inspect_data(ROWS, tokenizer, DataConfig())
    assert report.n_without_end == 20
    assert "20 of 20 examples have no target token that ends an answer" in report.warnings[0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"txet": "a"}], "row 1: the keys txet fit no format"),
        ([], "it has none"),
        ([{"messages": [{"role": "user", "content": "q"}]}], "none of 1 examples has one"),
    ],
)
def test_what_prevents_training_is_an_error(
    chatml_tokenizer: TextTokenizer, rows: list[Any], words: str
) -> None:
    report = inspect_data(rows, chatml_tokenizer, DataConfig())
    assert words in report.errors[0]
    shown = printed(report)
    assert "error: " in shown
    assert report.errors[0].split("\n")[0][:60] in shown


def test_a_missing_template_file_is_an_error(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    report = inspect_data(ROWS, tokenizer, DataConfig(chat_template=tmp_path / "no.jinja"))
    assert "no.jinja: No such file" in report.errors[0]
    assert report.n_examples == 20


def test_the_report_is_json(chatml_tokenizer: TextTokenizer) -> None:
    report = inspect_data(ROWS, chatml_tokenizer, DataConfig())
    values = json.loads(report.to_json())
    assert values["counts"]["n_examples"] == 20
    assert values["previews"][0]["spans"][1] == ["The sum is 3.<|im_end|>", True]
    assert set(values) == {field.name for field in dataclasses.fields(DataReport)}


def test_target_text_is_coloured_and_marked_without_colours_too(
    chatml_tokenizer: TextTokenizer,
) -> None:
    report = inspect_data(ROWS, chatml_tokenizer, DataConfig(), n_previews=1)
    plain = printed(report, no_color=True)
    assert "\n⟦The sum is 3.<|im_end|>⟧" in plain
    assert "█" in plain
    coloured = printed(report, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m⟦The sum is 3.<|im_end|>⟧\x1b[0m" in coloured


def test_terminals_without_unicode_get_other_marks(chatml_tokenizer: TextTokenizer) -> None:
    rows = [{"prompt": "é", "completion": "The sum is 3."}]
    report = inspect_data(rows, chatml_tokenizer, DataConfig(raw=True), n_previews=1)
    report.errors.append("… and 3 more")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_report(report, Console(file=stream, width=120))
    stream.seek(0)
    shown = stream.read()
    assert r"\xe9[[The sum is 3.</s>]]" in shown
    assert r"error: \u2026 and 3 more" in shown
    assert "####" in shown


def test_data_cannot_control_the_terminal(chatml_tokenizer: TextTokenizer) -> None:
    rows = [{"prompt": "[red]p[/red]", "completion": "a\x1b[2J\x07\u202eb\tc\r\nd"}]
    report = inspect_data(rows, chatml_tokenizer, DataConfig(raw=True))
    shown = printed(report, no_color=True)
    assert "[red]p[/red]⟦a\\x1b[2J\\x07\\u202eb\\tc\\r\nd</s>⟧" in shown


def test_notes_of_reading_are_kept(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("the dog", encoding="utf-8")
    report = inspect_data(tmp_path, tokenizer, DataConfig())
    assert report.formats == {"text (whole files)": 1}
    assert "note: never trained on, as test data: test.txt" in printed(report)


def lossy(tokenizer: TextTokenizer) -> TextTokenizer:
    """A tokenizer whose template hides the answer of conversations of two turns."""
    source = "{% for m in messages %}{{ m.content if loop.length != 2 else '-' }};{% endfor %}"
    return dataclasses.replace(tokenizer, chat_template=source)


def test_answers_that_are_not_trained_on_are_a_warning(tokenizer: TextTokenizer) -> None:
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns[:2]}, {"messages": turns}] * 2
    config = DataConfig(eval_fraction=0)
    prepared = prepare_data(rows, lossy(tokenizer), config, seed=1)
    for report in (
        inspect_data(rows, lossy(tokenizer), config),
        inspect_prepared(prepared, rows, config),
    ):
        assert report.counts.n_lost_turns == 4
        (warning,) = (line for line in report.warnings if line.startswith("4 answers cannot be"))
        assert "set learn_on to 'all'" in warning


@pytest.mark.parametrize("packing", [True, False])
def test_prepared_data_give_the_same_report(chatml_tokenizer: TextTokenizer, packing: bool) -> None:
    rows = [*ROWS, ROWS[3], {"instruction": "q" * 300, "output": "a"}]
    config = DataConfig(max_length=128, eval_fraction=0, packing=packing)
    prepared = prepare_data(rows, chatml_tokenizer, config, seed=0)
    report = inspect_prepared(prepared, rows, config, n_previews=3)
    assert report == inspect_data(rows, chatml_tokenizer, config)
    assert report.n_duplicates == 1


def test_validation_examples_do_not_count(chatml_tokenizer: TextTokenizer) -> None:
    config = DataConfig(max_length=128, eval_fraction=0.2)
    prepared = prepare_data(ROWS, chatml_tokenizer, config, seed=0)
    report = inspect_prepared(prepared, "rows.jsonl", config)
    assert (report.source, report.n_examples) == ("rows.jsonl", 16)
    assert report.n_learned_tokens == prepared.train.n_target_tokens


def test_a_compact_report_is_short(chatml_tokenizer: TextTokenizer) -> None:
    rows = [{"instruction": "b" + "x" * 600 + "e", "output": "short"}, *ROWS]
    config = DataConfig(max_length=1000, eval_fraction=0)
    report = inspect_prepared(prepare_data(rows, chatml_tokenizer, config, 0), rows, config)
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120), is_compact=True)
    shown = stream.getvalue()
    assert "shortest " in shown
    assert "█" not in shown
    assert "[...]" in shown
    assert "x" * 241 not in shown
    assert "⟦short<|im_end|>⟧" in shown
    assert "x" * 600 in printed(report).replace("\n", "")
    assert len(shown.splitlines()) < len(printed(report).splitlines())


def test_unused_columns_and_loss_flags_are_told_once(chatml_tokenizer: TextTokenizer) -> None:
    rows = [{**row, "id": n, "source": "x" if n else None} for n, row in enumerate(ROWS)]
    rows[3]["weight"] = 0
    report = inspect_data(rows, chatml_tokenizer, DataConfig())
    assert report.unused_columns == {"id": 20, "source": 19}
    assert report.notes == [
        "columns that are not used: id (20 rows), source (19 rows)",
        "loss flags make answers of 1 of 20 examples context",
    ]
    data = prepare_data(rows, chatml_tokenizer, DataConfig(eval_fraction=0), seed=0)
    assert inspect_prepared(data, rows, DataConfig()).notes == report.notes


ANSWER = {"role": "assistant", "content": "A cat."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ANSWER]},
        {"messages": [{"role": "user", "content": "<|vision_start|><|image_pad|>"}, ANSWER]},
        {"prompt": "[IMG] What is it?", "completion": "A cat."},
        {"text": "<|audio|> says"},
    ],
)
def test_placeholders_of_images_are_a_warning(
    row: dict[str, Any], chatml_tokenizer: TextTokenizer
) -> None:
    html = {"text": "<video src='a'><video>film</video> <image>x</image> [img <images>"}
    report = inspect_data([html, row, row], chatml_tokenizer, DataConfig())
    assert report.n_media_placeholders == 2
    (warning,) = [text for text in report.warnings if "placeholder" in text]
    assert warning.startswith("2 of 3 examples have a placeholder")
    assert "in row 2" in warning


def test_tokens_without_an_embedding_row_are_an_error(chatml_tokenizer: TextTokenizer) -> None:
    number = chatml_tokenizer.ids_of(["<|im_end|>"])[0]
    report = inspect_data(ROWS, chatml_tokenizer, DataConfig(), n_rows=number)
    assert "'<|im_end|>', in row 1, has the id" in report.errors[0]
    grown = DataConfig(special_tokens=("<|im_start|>", "<|im_end|>"))
    assert not inspect_data(ROWS, chatml_tokenizer, grown, n_rows=number).errors


def test_prompts_that_are_formatted_already_are_told_of_plain_text(
    chatml_tokenizer: TextTokenizer,
) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": prompt, "completion": "Hello!<|im_end|>"}]
    report = inspect_data(rows, chatml_tokenizer, DataConfig())
    assert any("or raw if prompts and completions are formatted" in w for w in report.warnings)
    assert any("are a user and an assistant turn" in note for note in report.notes)
    assert not inspect_data(rows, chatml_tokenizer, DataConfig(raw=True)).warnings
