"""README.md, docs/ and tests/README.md: every command parses, every link leads somewhere, house words are kept."""
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from conftest import ROOT
from test_scripts import SCRIPTS

DOCS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/README.md"]
RUN = r"(?:(?:venv/bin/)?python|torchrun(?: --?[\w-]+ [\w.:$]+)+)"
SCRIPT = "(?:train_|finetune_|pretrain_|predict|demo_data|benchmark|convert_labels|annotate)"


def commands(path):
    """Every `python SCRIPT.py ...` of code blocks, tables and text, as a list of words."""
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(rf"(?:^ *|[`&=\d]\s?){RUN} +({SCRIPT}\w*\.py[^`&#\n]*)", text, re.M):
        yield shlex.split(line)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_parse(path):
    for name, *words in commands(path):
        import_module(Path(name).stem).get_args_parser().parse_args(words)


def test_commands_are_found():
    """In the README one for each script, and none that a line of code shows is overlooked."""
    found = list(commands(ROOT / "README.md"))
    assert len(found) >= 15
    assert {f"{name}.py" for name in [*SCRIPTS, "convert_labels"]} <= {name for name, *_ in found}
    for path in DOCS:
        text = path.read_text().replace("\\\n", " ")
        lines = re.findall(rf"^    .*?\b(?:python|torchrun)\b[^\n]*?{SCRIPT}\w*\.py", text, re.M)
        assert len(lines) <= len(list(commands(path))), path


def links_of(path):
    """Links to files of the repository."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text())


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in links_of(path):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_every_script_and_document_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *(ROOT / "docs").glob("*.md")]:
        assert path.name in text or path.name == "utils.py", path.name
    shown = {(path.parent / link).resolve() for path in DOCS for link in links_of(path)}
    assert shown >= {*(ROOT / "gallery").iterdir(), *(ROOT / "docs").iterdir(), ROOT / "tests/README.md"}


def test_tables_have_rows_of_one_length():
    for path in DOCS:
        width = None
        for line in path.read_text().splitlines():
            count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
            assert width is None or count is None or count == width, f"{path.name}: {line}"
            width = count


def test_the_readme_s_test_command_is_what_ci_runs():
    command = "python -m pytest"
    for path in ("README.md", ".ci/run", ".github/workflows/tests.yml"):
        assert command in (ROOT / path).read_text(), path


def test_the_chinese_readme_keeps_step():
    """Section by section the same commands, numbers, links and rows; it has one section of its own."""
    def sections(name):
        parts = re.split(r"^## ", (ROOT / name).read_text(), flags=re.M)
        return [part for part in parts if not part.startswith("从文章到这里")]
    english, chinese = sections("README.md"), sections("README.zh-CN.md")
    assert len(english) == len(chinese)
    for one, other in zip(english, chinese):
        for pattern in (r"^    .*$", r"\]\(((?!README)[^)]+)\)", r"^\| ?-?", r"^!?\[|^- "):
            assert re.findall(pattern, one, re.M) == re.findall(pattern, other, re.M), one[:40]
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", re.sub(r"https?://\S+", "", text))) for text in (one, other)]
        assert numbers[0] == numbers[1], one[:40]
