from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lora.report import write_report
from lora.report.write import report_on

Make = Callable[..., Path]
VOID = {"meta", "link", "br", "img", "hr", "input"}
BAIT = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """A page as it is: its elements, ids, addresses and text; nesting is checked."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def mixed(
    make_run: Make, make_sweep: Make, make_comparison: Make, tmp_path: Path
) -> tuple[Page, str]:
    """The page of a run, a sweep and a comparison, parsed and as text."""
    folders = [make_run(), make_sweep(), make_comparison()]
    text = write_report(folders, tmp_path / "out").html.read_text(encoding="utf-8")
    return Page(text), text


def test_one_run_with_times_among_others_is_named(
    make_run: Make, make_sweep: Make, tmp_path: Path
) -> None:
    run, ranks = make_run("single"), make_sweep()
    text = write_report([run, ranks], tmp_path / "out").html.read_text(encoding="utf-8")
    figure = next(f for f in text.split("<figure>") if "seconds of training steps" in f)
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
    assert [words for words in drawn if words.startswith("single ")]
    assert "Candidates of a sweep train together and have no times of their own." in figure
    alone = write_report([run], tmp_path / "alone").html.read_text(encoding="utf-8")
    assert not re.findall(r"<text[^>]*>single ", alone)
    assert "Candidates of a sweep" not in alone


def test_a_table_of_many_columns_has_the_whole_width(
    mixed: tuple[Page, str], make_sweep: Make, tmp_path: Path
) -> None:
    by_name = {a.get("aria-labelledby"): a.get("class") for a in mixed[0].all("section")}
    assert by_name["s-runs"] == "wide"
    assert by_name["s-loss"] is None
    few = Page(write_report([make_sweep("few")], tmp_path / "few").html.read_text("utf-8"))
    assert {a.get("class") for a in few.all("section")} == {None}


def test_the_page_needs_nothing_else(mixed: tuple[Page, str]) -> None:
    page, text = mixed
    style = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)[0]
    assert not re.search(r"url\(|@import", style)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "img", "object", "embed")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/svg+xml;base64,")), (tag, value)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)


def test_names_of_elements_are_unique_and_all_are_found(mixed: tuple[Page, str]) -> None:
    page, text = mixed
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text))
    used |= {(a.get("href") or "")[1:] for a in page.all("use")}
    used |= {a["aria-labelledby"] for a in page.all("section") if "aria-labelledby" in a}  # type: ignore[misc]
    assert used
    assert used <= set(ids)


def test_the_page_has_headings_and_its_pictures_are_told(mixed: tuple[Page, str]) -> None:
    page, _ = mixed
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    pictures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(pictures) == len(page.all("figure")) == 8
    assert all(len(a["aria-label"] or "") > 30 for a in pictures)
    assert all("aria-hidden" in a for a in page.all("svg") if a.get("role") != "img")
    assert all(a.get("scope") for a in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_pictures_take_the_colours_of_the_page(mixed: tuple[Page, str]) -> None:
    _, text = mixed
    body = text[text.index("</style>") :]
    pictures = "".join(
        re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', body, flags=re.DOTALL)
    )
    assert "var(--series-0)" in pictures
    assert "var(--ink)" in pictures
    assert not re.findall(r"#[0-9a-f]{6}\b", pictures), "a colour that does not follow the page"
    style = text[: text.index("</style>")]
    for variable in set(re.findall(r"var\((--[\w-]+)\)", text)):
        assert style.count(f"{variable}:") >= (1 if variable == "--mono" else 3), variable


def test_the_page_says_what_was_found(mixed: tuple[Page, str]) -> None:
    page, _ = mixed
    text = " ".join(page.text.split())
    for words in (
        "LoRA vs. full fine-tuning: 2.00 times the speed per step, 60 % less peak memory, "
        "validation loss 0.1000 lower.",
        "The best of 6 candidates is rank 16 at learning rate 1e-3: validation loss 0.3500, "
        "from 2.0000 without an adapter. "
        "Rank 8 is enough: 0.3520 is within noise of the best. "
        "With one seed the difference may be chance: try --seed 0,1,2.",
        "the loss of step 3 is nan",
        "halving at step 10: place 5 of 5",
        "best tried",
        "Forgetting is measured on: the prose.",
        "Before comparing The best rate is the highest tried.",
        "✓ as expected",
        "2 examples are there twice",
        "lora compare --data orders.jsonl",
        "held-1",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.0, 1.5, 1.0], "Validation loss went from 2.0000 to 1.0000 nats per token, its best"),
        (
            [2.0, 1.0, 1.5],
            "Best validation loss 1.0000 nats per token at step 10, from 2.0000 before training; "
            "1.5000 at the end, after 20 steps",
        ),
        ([2.0, 1.0, 2.5], "2.5000 at the end, worse than before training, after 20 steps"),
        ([2.0, 2.2, 2.5], "Training did not help: validation loss is 2.0000 nats per token before"),
    ],
)
def test_the_headline_has_the_best_loss(
    make_run: Make, tmp_path: Path, losses: list[float], said: str
) -> None:
    folder = make_run()
    rows = [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report([folder], tmp_path / "out").html.read_text(encoding="utf-8"))
    assert said in " ".join(page.text.split())


def test_answers_and_steps_come_before_memory_and_settings_are_folded(
    mixed: tuple[Page, str],
) -> None:
    page, text = mixed
    order = [text.index(f'id="s-{name}"') for name in ("loss", "answers", "course", "memory")]
    assert order == sorted(order)
    assert all("open" not in attributes for attributes in page.all("details"))
    drawn = [attributes.get("aria-label") or "" for attributes in page.all("svg")]
    assert any(label.startswith("Learning rate against") for label in drawn)
    assert any(label.startswith("Gradient norm against") for label in drawn)


def test_the_page_says_where_the_adapter_is_and_what_to_run_next(
    make_run: Make, make_sweep: Make, tmp_path: Path
) -> None:
    files = write_report([folder := make_run(), make_sweep()], tmp_path / "out")
    text = Page(files.html.read_text(encoding="utf-8")).text
    adapter = folder / "adapter"
    assert f"saved in {adapter}" in text
    for command in (f"generate 'Your prompt' --adapter {adapter}", f"merge {adapter} ", "export "):
        assert f"lora {command}" in text
    assert text.count("lora merge") == 1


def test_what_comes_from_files_is_shown_as_text(make_run: Make, tmp_path: Path) -> None:
    folder = make_run(f"a & b <i>{'$x_1$'}")
    rows = [
        {"step": step, "prompt": BAIT, "answer": f"{BAIT}\ud800\x00", "reference": BAIT}
        for step in (0, 20)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = json.loads((folder / "run.json").read_text())
    run |= {"device": BAIT, "model": BAIT, "from_adapter": BAIT}
    run["data"] |= {"source": BAIT, "warnings": [BAIT], "held_out_fingerprint": BAIT}
    run["environment"]["versions"]["torch"] = BAIT
    (folder / "run.json").write_text(json.dumps(run))
    files = write_report([folder], tmp_path / "out", f"</title>{BAIT}")
    page = Page(files.html.read_text(encoding="utf-8"))
    assert page.all("script") == page.all("img") == page.all("i") == []
    assert page.text.count("alert('x')") >= 8


def test_the_same_folders_give_the_same_bytes(
    make_run: Make, make_sweep: Make, tmp_path: Path
) -> None:
    folders = [make_run(), make_sweep()]
    contents = []
    for _ in range(2):
        files = write_report(folders, tmp_path / "out")
        contents.append([path.read_bytes() for path in (files.html, files.json, *files.pictures)])
    assert contents[0] == contents[1]


def test_report_json_says_what_the_page_says(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    files = write_report([folder], folder)
    found = json.loads(files.json.read_text(encoding="utf-8"))
    assert (found["kind"], found["schema_version"]) == ("report", 1)
    assert set(found) == {
        "kind", "schema_version", "title", "runs", "sweeps", "comparisons", "ratios", "notes",
        "command",
    }  # fmt: skip
    (run,) = found["runs"]
    assert run["folder"] == "."
    assert run["held_out"][-1] == {"step": 20, "loss": pytest.approx(0.5), "time_s": 5.0}
    assert run["memory"]["planned_total"] == 850_000_000
    assert run["settings"]["lora.rank"] == 8
    assert not {"training", "course"} & set(run)
    assert [path.name for path in files.pictures] == [
        "loss_by_steps.png", "loss_by_time.png", "learning_rate.png", "gradient_norm.png",
        "memory.png",
    ]  # fmt: skip
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in files.pictures)


def test_a_run_of_nothing_still_has_a_page(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    for name in ("result.json", "metrics.jsonl", "timings.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    files = write_report([folder], folder)
    assert files.pictures == ()
    assert "Nothing has been measured yet" in Page(files.html.read_text()).text


def test_a_disk_that_refuses_is_told_and_harms_nothing(make_run: Make, tmp_path: Path) -> None:
    folder, said = make_run(), list[str]()
    (folder / "pictures").write_text("a file in the way")
    assert report_on(folder, said.append) is None
    assert "no report" in said[0]
    assert not (folder / "report.html").exists()
    (folder / "pictures").unlink()
    assert report_on(folder, said.append) == folder / "report.html"
