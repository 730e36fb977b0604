"""What stands in the repository's texts: no foreign places, and commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError

from lora import cli
from lora.cli.flags.values import name_pairs
from lora.errors import LoraError

# Written in pieces, so that this file keeps its own rule.
REGISTRY_HOSTS = (
    *("pypi" + ".org", "python" + "hosted.org", "npm" + "js.org", "deb." + "debian.org"),
    *("download." + "pytorch.org", "crates" + ".io", "conda." + "anaconda.org"),
)
MACHINE_PATHS = (
    r"(?<![\w./~}-])/(?:work|root|tmp|home/(?!someone\b)\w+|Users/\w+|opt|mnt|scratch)/[\w.]"
    r"|(?<![\w./~}-])/(?:work|root|tmp)(?=[\s\"'`,;)]|$)"
)
ISSUE_NUMBERS = r"(?i)\b(?:issue|pull request|PR|fixe[sd]|close[sd]|bug)s? ?#\d+"
# Who or what wrote the code, and papers that do not come with it.
OUTSIDE_TOOLS = "|".join(
    [
        r"(?i:\b(?:" + "clau" + "de|anthro" + "pic|copi" + "lot|code" + r"x|sub-?agents?)\b)",
        r"\b(?:DE" + "SIGN|ST" + "YLE|SP" + "EED|bri" + r"ef)\.md\b",
        r"\.(?:libr" + "ary|mir" + r"ror)/",
    ]
)
FORBIDDEN = {
    "a registry's host": "|".join(map(re.escape, REGISTRY_HOSTS)),
    "a path of one machine": MACHINE_PATHS,
    "an issue's number": ISSUE_NUMBERS,
    "an outside tool": OUTSIDE_TOOLS,
}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ".jsonl", ".html"}
OTHER_TEXTS = {"Makefile", "run", "LICENSE", ".gitignore"}


@pytest.fixture(scope="session")
def texts(root: Path, tracked: list[Path]) -> dict[str, str]:
    """By path inside the repository: the content of each text file."""
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in tracked
        if path.suffix in TEXT_SUFFIXES or path.name in OTHER_TEXTS
    }


@pytest.fixture(scope="session")
def make_targets(root: Path) -> set[str]:
    """The Makefile's targets."""
    text = (root / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_text_names(what: str, texts: dict[str, str]) -> None:
    faults = [
        f"{path}:{number}: {line.strip()[:90]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert not faults, "\n".join([f"{what} stands in", *faults])


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a registry's host", "see https://" + REGISTRY_HOSTS[0] + "/x"),
        ("a path of one machine", "cd /" + "work/main"),
        ("a path of one machine", '"/' + 'home/ada/x"'),
        ("a path of one machine", 'open("/' + 'tmp/x.json")'),
        ("a path of one machine", "cd /" + "work"),
        ("an issue's number", "see issue" + " #12"),
        ("an outside tool", "written with Clau" + "de"),
        ("an outside tool", "as DE" + "SIGN.md says"),
        ("an outside tool", "see x/.libr" + "ary/env"),
    ],
)
def test_the_patterns_find_what_they_forbid(what: str, line: str) -> None:
    assert re.search(FORBIDDEN[what], line)


@pytest.mark.parametrize(
    "line",
    [
        *("runs/lora-r8/adapter", "./network/home", "../opt/x", "a #3 b", "work/tmp/x"),
        *("the cursor moves", "chatgpt and openai are roles of data", "docs/design.md"),
    ],
)
def test_the_patterns_let_ordinary_words_pass(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN.values())


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each command line in the fenced blocks of a Markdown text.

    Comments, prompts and environment variables before the command are left out.
    """
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        if language in ("", "bash", "sh", "console", "shell"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _commands_of(line)


def _commands_of(line: str) -> Iterator[list[str]]:
    for part in re.split(r"&&|\|\|?|;", line.removeprefix("$ ")):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue  # prose or a drawing, not a command
        if ">" in words:  # what follows is a file of the shell's, not of the command's
            words = words[: words.index(">")]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if ">" in words:  # into a file
            words = words[: words.index(">")]
        if words:
            yield words


def fault_of(words: list[str], root: Path, make_targets: set[str]) -> str | None:
    """Return what is wrong with a command of our documentation, or None."""
    program = Path(words[0]).name
    if program == "make":
        wanted = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        missing = [w for w in wanted if w not in make_targets]
        return f"the Makefile has no target {missing}" if missing else None
    if program.startswith("python"):
        words = words[1:]
        if words[:2] == ["-m", "lora"]:
            return fault_of_lora(words[2:])
        script = words[0] if words else ""
        is_gone = script.endswith(".py") and not (root / script).is_file()
        return f"there is no {script}" if is_gone else None
    return fault_of_lora(words[1:]) if program == "lora" else None


def fault_of_lora(words: list[str]) -> str | None:
    """Return what is wrong with the arguments of a `lora` command, or None.

    They are parsed as a call would parse them, values too; the command is not run.
    """
    if not words or words[0] in ("--help", "--version", "COMMAND"):
        return None
    if words[0] not in cli.COMMANDS:
        return f"lora has no command {words[0]}"
    if "--help" in words:
        return None
    given, has_config = without_config(words)
    is_part = has_config or "…" in given or "..." in given
    given = [word for word in given if word not in ("…", "...", "--debug")]
    app = cli.build_app(words[0])
    try:
        app.parse_args(name_pairs(given), exit_on_error=False, print_error=False)
    except MissingArgumentError as error:  # the rest is in the file, or left out
        return None if is_part else str(error)
    except (CycloptsError, LoraError) as error:
        return str(error)
    return None


def without_config(words: list[str]) -> tuple[list[str], bool]:
    """Return the words without a file of settings, and whether there is one or a `--resume`."""
    found = [word for word in words if word != "--config" and not word.endswith((".yaml", ".yml"))]
    if words[0] == "convert-config":
        return words, False
    return found, found != words or "--resume" in words


def inline_commands(text: str) -> str:
    """Return the commands in a module's texts, in a block of their own."""
    found = re.findall(r"[`\"](lora [a-z-]+ [^`{}]*?)(?:`|\"$)", text, flags=re.M)
    return "```\n" + "\n".join(line for line in found if "FILE" not in line) + "\n```\n"


def test_every_command_in_the_documentation_exists(
    root: Path, texts: dict[str, str], make_targets: set[str]
) -> None:
    documents = {path: text for path, text in texts.items() if path.endswith(".md")}
    documents["coming_from.py"] = inline_commands(texts["docs/site/coming_from.py"])
    assert "LORA_USAGE.md" in documents
    faults = [
        f"{path}: `{shlex.join(words)}`: {fault}"
        for path, text in documents.items()
        for words in commands_in(text)
        if (fault := fault_of(words, root, make_targets))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("make tset", "no target"),
        ("USE_LORA=True .venv/bin/python trainings.py", "no trainings.py"),
        (".venv/bin/lora fientune --rank 3", "no command fientune"),
        ("python -m lora fientune", "no command fientune"),
        ("lora finetune --data x --rnak 3", "rnak"),
        ("lora finetune --data x --rank many", "many"),
        ("lora finetune --rank 3", "requires an argument"),
    ],
)
def test_a_wrong_command_is_found(line: str, seen: str, root: Path, make_targets: set[str]) -> None:
    (words,) = commands_in(f"text\n```\n{line}   # why\n```\n")
    assert seen in (fault_of(words, root, make_targets) or "")


@pytest.mark.parametrize("line", ["make test", "make test PYTHON=python3.12", "lora --help", "ls"])
def test_a_right_command_passes(line: str, root: Path, make_targets: set[str]) -> None:
    (words,) = commands_in(f"```bash\n$ {line}\n```\n")
    assert fault_of(words, root, make_targets) is None


def test_scripts_can_be_run(root: Path) -> None:
    done = subprocess.run(["bash", "-n", str(root / ".ci" / "run")], check=False)
    assert done.returncode == 0
