"""How code is written here: sizes, and what is never done."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
MATPLOTLIB_AND_CO = ("transformers", "matplotlib", "datasets", "pyarrow", "huggingface_hub", "peft")

Trees = dict[str, ast.Module]
Fault = tuple[int, str]


def faults_in(trees: Trees, rule: Callable[[ast.Module], Iterator[Fault]]) -> str:
    """Return what `rule` finds in all files, one `path:line: message` a line."""
    return "\n".join(
        f"{p}:{line}: {text}" for p, tree in trees.items() for line, text in rule(tree)
    )


def check_rule(rule: Callable[[ast.Module], Iterator[Fault]], bad: str, good: str) -> None:
    """Fail unless `rule` objects to every statement of `bad` and to nothing in `good`."""
    for statement in bad.strip().split("\n\n"):
        assert list(rule(ast.parse(statement))), f"the rule misses\n{statement}"
    assert not list(rule(ast.parse(good)))


def called_name(node: ast.AST) -> str:
    """Return the dotted name that a call calls, or ""."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def evaluated_text(tree: ast.Module) -> Iterator[Fault]:
    """Text is never run as code."""
    for node in ast.walk(tree):
        if called_name(node) in ("exec", "eval", "builtins.exec", "builtins.eval"):
            yield node.lineno, "runs text as code"  # type: ignore[attr-defined]


def unsafe_reading(tree: ast.Module) -> Iterator[Fault]:
    """A file from elsewhere never runs code: no pickle, no yaml.load, weights only."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called_name(node)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve"):
            yield node.lineno, f"{name} can run code: use JSON or safetensors"
        if (
            name in ("torch.load", "load_file_with_pickle")
            and keywords.get("weights_only") != "True"
        ):
            yield node.lineno, "torch.load needs weights_only=True"
        if name in ("yaml.load", "yaml.unsafe_load"):
            yield node.lineno, "use yaml.safe_load"
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") == "True":
            yield node.lineno, "numpy's pickles can run code"


def swallowed_errors(tree: ast.Module) -> Iterator[Fault]:
    """Only what is expected is caught; a catch-all raises again what it does not know."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = ast.unparse(node.type) if node.type else "everything"
        is_broad = node.type is None or {"Exception", "BaseException"} & set(
            kinds.strip("()").replace(",", " ").split()
        )
        raises = (child for child in ast.walk(node) if isinstance(child, ast.Raise))
        if is_broad and all(child.exc is not None for child in raises):
            yield node.lineno, f"catches {kinds} and never raises it again"


def probed_objects(tree: ast.Module) -> Iterator[Fault]:
    """What we built is known: nobody asks an object what it has, or takes what may be there."""
    for node in ast.walk(tree):
        if called_name(node) in ("hasattr", "builtins.hasattr"):
            yield node.lineno, "hasattr: use a protocol or isinstance"  # type: ignore[attr-defined]
        if called_name(node) == "getattr" and isinstance(node, ast.Call) and len(node.args) == 3:
            yield node.lineno, "getattr with a default: use a protocol or isinstance"


def work_at_import(tree: ast.Module) -> Iterator[Fault]:
    """Importing a module defines things and does nothing."""
    for node in tree.body:
        is_doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_entry = isinstance(node, ast.Expr) and called_name(node.value) == "sys.exit"
        is_guard = isinstance(node, ast.If) and (
            ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            or _only_defines(node)
        )
        defines = isinstance(
            node,
            ast.Import
            | ast.ImportFrom
            | ast.FunctionDef
            | ast.AsyncFunctionDef
            | ast.ClassDef
            | ast.Assign
            | ast.AnnAssign,
        )
        if not (is_doc or is_guard or defines or is_entry):
            yield node.lineno, f"does something when imported: {ast.unparse(node)[:60]}"


def _only_defines(node: ast.If) -> bool:
    """Whether both branches import and define, by whether an optional package is there."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    parts = [*node.body, *node.orelse]
    is_there = isinstance(node.test, ast.Name) and node.test.id.startswith("HAS_")
    return is_there and all(isinstance(part, kinds) for part in parts)


def borrowed_modules(tree: ast.Module) -> Iterator[Fault]:
    """Nothing is assigned into a module or a class that was imported."""
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            name = ast.unparse(target)
            # Settings that torch offers, and the class of the very module that is imported.
            is_backend = name.startswith(("torch.backends.", "sys.modules[__name__]."))
            is_theirs = isinstance(target, ast.Attribute) and name.split(".")[0] in imported
            if is_theirs and not is_backend:
                yield node.lineno, f"assigns into what it imported: {name}"


def early_optional_imports(tree: ast.Module) -> Iterator[Fault]:
    """Heavy and optional packages are imported in the function that needs them."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] in MATPLOTLIB_AND_CO:
                yield node.lineno, f"imports {name} at the top: import it where it is used"


def missing_docstrings(tree: ast.Module) -> Iterator[Fault]:
    """Modules, public classes and public functions say in a sentence what they are."""
    if tree.body and not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    for node in tree.body:
        is_named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_named and "overload" in map(ast.unparse, node.decorator_list):
            continue  # its text is that of the function, which follows
        if is_named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def long_functions(tree: ast.Module) -> Iterator[Fault]:
    """A function's body fits on a screen; a signature may be as long as the list of its flags."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[min(ast.get_docstring(node) is not None, len(node.body) - 1)]
            lines = (node.end_lineno or node.lineno) - first.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                text = f"{node.name} has {lines} lines, {MAX_FUNCTION_LINES} is the most"
                yield node.lineno, text


RULES = (
    evaluated_text,
    unsafe_reading,
    swallowed_errors,
    probed_objects,
    work_at_import,
    borrowed_modules,
    early_optional_imports,
    missing_docstrings,
    long_functions,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(
    rule: Callable[[ast.Module], Iterator[Fault]], product: Trees
) -> None:
    faults = faults_in(product, rule)
    assert not faults, f"{rule.__doc__}\n{faults}"


@pytest.mark.parametrize("rule", [evaluated_text, unsafe_reading, swallowed_errors])
def test_tests_and_benchmarks_keep_the_rules_of_safety(
    rule: Callable[[ast.Module], Iterator[Fault]], trees: Trees
) -> None:
    faults = faults_in(trees, rule)
    assert not faults, f"{rule.__doc__}\n{faults}"


def test_modules_are_of_a_size_that_can_be_read(root: Path, trees: Trees) -> None:
    sizes = {p: len((root / p).read_text(encoding="utf-8").splitlines()) for p in trees}
    # A test file may be longer than what it tests.
    most = {p: MAX_MODULE_LINES * (2 if p.startswith("tests/") else 1) for p in sizes}
    faults = [f"{p} has {n} lines" for p, n in sizes.items() if n > most[p]]
    assert not faults, "\n".join([*faults, f"{MAX_MODULE_LINES} is the most: split it by owner."])


def unescaped_messages(tree: ast.Module) -> Iterator[Fault]:
    """Messages go through lora/terminal.py, which escapes what is from outside; an OSError's
    text comes from `os_reason`, because some have none."""
    for node in ast.walk(tree):
        if called_name(node) == "logging.getLogger":
            yield node.lineno, "take escaping_log of lora/terminal.py"  # type: ignore[attr-defined]
        if called_name(node) == "print" and "file=sys.stderr" in ast.unparse(node):
            yield node.lineno, "take print_note of lora/terminal.py"  # type: ignore[attr-defined]
        is_reason = isinstance(node, ast.Attribute) and node.attr == "strerror"
        if is_reason and ast.unparse(node) != "os.strerror":
            yield node.lineno, "take os_reason of lora/runs/disk.py"  # type: ignore[attr-defined]


def test_messages_are_escaped(product: Trees) -> None:
    own = ("lora/terminal.py", "lora/runs/disk.py")
    trees = {path: tree for path, tree in product.items() if path not in own}
    faults = faults_in(trees, unescaped_messages)
    assert not faults, f"{unescaped_messages.__doc__}\n{faults}"
    bad = "log = logging.getLogger(n)\n\nprint(x, file=sys.stderr)\n\nf'{error.strerror}'"
    check_rule(unescaped_messages, bad, "print(x)\nos.strerror(n)\nescaping_log(n)")


def test_modules_have_names_that_say_something(trees: Trees) -> None:
    faults = [path for path in trees if Path(path).name in VAGUE_NAMES]
    assert not faults, f"{faults}: put each function beside what it serves"


CASES = [
    (evaluated_text, "exec('x')\n\neval('x')", "model.eval()"),
    (
        unsafe_reading,
        "pickle.loads(b)\n\ntorch.load(p)\n\nyaml.load(f)\n\nnp.load(p, allow_pickle=True)",
        "torch.load(p, weights_only=True)\nyaml.safe_load(f)\nnp.load(p)\nload(p)",
    ),
    (
        swallowed_errors,
        "try:\n    f()\nexcept:\n pass\n\ntry:\n    g()\nexcept (OSError, Exception):\n    pass",
        "try:\n    f()\nexcept BaseException:\n    undo()\n    raise\nexcept ValueError:\n    pass",
    ),
    (
        probed_objects,
        "hasattr(model, 'x')\n\nif not hasattr(model, 'x'):\n    pass\n\ngetattr(x, name, None)",
        "getattr(config, name)\nisinstance(model, Linear)\nattr.has(x)",
    ),
    (
        work_at_import,
        "print('hello')\n\nfor x in y:\n    pass\n\nif x:\n    y = 1",
        "'''doc'''\nimport x\nA = 1\nA: int = 1\nif __name__ == '__main__':\n    main()\n"
        "if HAS_X:\n    import y\nelse:\n    y = None",
    ),
    (
        borrowed_modules,
        "import torch\ntorch.add = f\n\nfrom torch import nn\nnn.Linear.forward = f",
        "import torch\nx = 1\nself.x = torch.add\ntorch.backends.cudnn.benchmark = True",
    ),
    (
        early_optional_imports,
        "import matplotlib.pyplot as plt\n\nfrom transformers import AutoModel",
        "def f():\n    import matplotlib\nimport torch",
    ),
    (
        missing_docstrings,
        "x = 1\n\n'''doc'''\ndef f():\n    pass\n\n'''doc'''\nclass A:\n    def f(self): ...",
        "'''doc'''\ndef _f():\n    pass\ndef g():\n    '''doc'''",
    ),
    (long_functions, "def f():\n" + "    x = 1\n" * 61, "def f(\n):\n" + "    x = 1\n" * 60),
]


@pytest.mark.parametrize(("rule", "bad", "good"), CASES, ids=lambda value: "")
def test_each_rule_finds_what_it_forbids(
    rule: Callable[[ast.Module], Iterator[Fault]], bad: str, good: str
) -> None:
    check_rule(rule, bad, good)


def test_each_rule_is_tried() -> None:
    assert [rule for rule, _, _ in CASES] == list(RULES)
