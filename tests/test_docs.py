"""The documents are true about files and commands: links, the README's table and tree, `ralf …`."""

import argparse
import dataclasses
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from ralf.__main__ import main
from ralf.train.cli import commands as train
from ralf.worker.cli.main import parser
from ralf.worker.contract import Label
from ralf.worker.errors import by_code
from ralf.worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    path
    for pattern in ("*.md", "bench/*.md", "docs/*.md", "kernels/*.md", "demo/portraits/*.md")
    for path in ROOT.glob(pattern)
)
ROOMS = ("kernels", "worker", "train")


def headings(text: str) -> set[str]:
    """The anchors of a page, made from its headings as code hosts make them."""
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_local_link_leads_to_a_file_and_a_heading(page: Path):
    """Links to other sites are not followed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in headings(path.read_text()), f"{page.name} links to {target}"


def commands(text: str) -> Iterator[list[str]]:
    """The words after `ralf` in each command line of the text, in code blocks and code spans."""
    code = re.findall(r"(?s:```[^\n]*\n(.*?)```)|(?m:^ {4}(.*)$)|`([^`\n]+)`", text)
    for block in map("".join, code):
        for line in block.splitlines():
            for command in re.split(r"[|;&]", line.split(" #")[0].split("  or ")[0]):
                before = r"(?:[A-Z_]+=\S+ +|docker compose .*--rm +)*"
                if found := re.fullmatch(rf"\s*{before}ralf +([a-z].*)", command):
                    yield found[1].split()


def choices(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser, by name."""
    found = [a for a in of._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_on_a_page_exists_with_its_options(page: Path):
    """A renamed subcommand or option would leave a reader with a usage error."""
    for words in commands(page.read_text()):
        here = parser([train])
        rest = list(words)
        while rest and rest[0] != "…" and (inside := choices(here)):
            assert rest[0] in inside, f"{page.name} says: ralf {' '.join(words)}"
            here = inside[rest.pop(0)]
        known = {option for action in here._actions for option in action.option_strings}
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert given <= known, f"{page.name} says: ralf {' '.join(words)}"


def all_parsers(
    of: argparse.ArgumentParser, name: str = "ralf"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of all commands in it, each with the words that lead to it."""
    yield name, of
    for word, inside in choices(of).items():
        yield from all_parsers(inside, f"{name} {word}")


def test_the_help_of_every_option_says_what_it_does_and_its_default():
    """A reader of --help needs no other page; a default that says nothing is not printed."""
    lacking, count = [], 0
    for name, each in all_parsers(parser([train])):
        for action in each._actions:
            commands_in_it = getattr(action, "_choices_actions", [])
            for one in commands_in_it or [action]:
                count += 1
                if one.help != argparse.SUPPRESS and len((one.help or "").split()) < 2:
                    lacking.append(f"{name} {one.option_strings or one.dest}: {one.help!r}")
        shown = each.format_help()
        assert "default: None" not in shown and "default: False" not in shown, name

    assert count > 200
    assert lacking == []


def test_a_default_is_printed_once():
    """By the formatter or by the sentence, and not by both."""
    text = {name: each.format_help() for name, each in all_parsers(parser([train]))}

    assert "(default: auto)" in " ".join(text["ralf scan"].split())
    for name, shown in text.items():
        for line in re.split(r"\n  (?=\S)", shown):
            assert line.count("(default") <= 1, f"{name}: {line}"


def lines_of_code(text: str) -> Iterator[str]:
    """Each whole `ralf …` line of the text's code blocks, without comments and redirects."""
    blocks = re.findall(r"(?s:```(?:bash|sh|console)?(?: [^\n]+)?\n(.*?)```)|(?m:^ {4}(.*)$)", text)
    for line in "\n".join(map("".join, blocks)).splitlines():
        for command in re.split(r" [|&] | & ?| +or +|;", re.split(r" #|  +", line.strip())[0]):
            if re.match(r"ralf [a-z]", command.strip()):
                yield re.sub(r"\$\(.*?\)", "EXPANDED", re.sub(r"\d?>\S+", "", command.strip()))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_line_of_a_code_block_parses(page: Path, capsys: pytest.CaptureFixture[str]):
    """The real parser takes it: no missing argument, no value of a wrong type or choice."""
    for line in lines_of_code(page.read_text()):
        try:
            parser([train]).parse_args(shlex.split(line)[1:])
        except SystemExit as end:
            if end.code != 0:
                pytest.fail(f"{page.name} says: {line}: {capsys.readouterr().err}")


@pytest.mark.usefixtures("one_thread")
def test_the_walk_from_portraits_to_a_promoted_model_goes_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each line of docs/training.md's first block; the scan is made with the model of that walk."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    for line in block.replace("/tmp/walk", str(tmp_path)).splitlines():
        capsys.readouterr()
        if not line.startswith("ralf "):
            subprocess.run(["bash", "-c", line], check=True)
            continue
        # The shell expands stars and $(…) as for a reader; the command runs here, to start once.
        printed = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {line}"], text=True)
        assert main(printed.split("\0")[1:-1]) == 0, line

    assert (
        f"mine@{(tmp_path / 'models/mine/current').read_text().strip()}" in capsys.readouterr().out
    )


def test_the_search_for_commands_sees_them():
    """A search that finds nothing would always pass."""
    text = "Run `ralf scan a.mp4`.\n\n    RALF_X=1 ralf worker --high 1 & ralf deliver  # text\n"

    assert list(commands(text)) == [["scan", "a.mp4"], ["worker", "--high", "1"], ["deliver"]]
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 50
    lines = "    ralf scan $(cat a).mp4 2>log | tee b  # text\n"
    assert list(lines_of_code(lines)) == ["ralf scan EXPANDED.mp4 "]
    assert sum(len(list(lines_of_code(page.read_text()))) for page in PAGES) > 40


def test_every_setting_and_make_target_on_a_page_exists():
    """Settings refuses an unknown RALF_ name, so a page must not show one."""
    text = "".join(page.read_text() for page in PAGES)
    settings = {f"RALF_{field.name.upper()}" for field in dataclasses.fields(Settings)}
    settings |= {f"{name}_FILE" for name in settings}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"\bRALF_[A-Z][A-Z_]*[A-Z]\b", text)) - settings == set()
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE)) - targets == set()


def test_every_test_that_the_table_of_threats_names_exists():
    """And each row names one."""
    page = (ROOT / "docs/operations.md").read_text()
    table = page.split("### Threats, and the tests that cover them")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25

    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, f"no test covers: {row}"
        for file, test in named:
            code = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^ *def {test}\(", code, re.MULTILINE), f"{file} has no {test}"


def test_the_table_of_failures_names_every_code_once_and_no_other():
    """A backend meets each of them; a new one needs a line that says what to do."""
    page = (ROOT / "docs/integration.md").read_text()
    table = page.split("## When there is no verdict\n")[1].split("\n## ")[0]
    named = [
        code
        for line in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", line)
    ]

    assert sorted(named) == sorted([*by_code(), "cancelled"])


def test_the_table_of_labels_names_every_label():
    """In the words of the contract."""
    page = (ROOT / "docs/integration.md").read_text()
    table = page.split("## What a verdict means\n")[1].split("\n## ")[0]

    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(get_args(Label))


def section(title: str) -> str:
    """The text under a heading of the README."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)
    assert found is not None, f"README has no section {title!r}"
    return found[1]


def test_where_do_i_change_names_files_that_exist():
    """Every row names at least one."""
    rows = re.findall(
        r"^\| (?!change|---)(.+?) \| (.+) \|$", section("Where do I change …"), re.MULTILINE
    )
    assert len(rows) >= 15

    for change, files in rows:
        named = re.findall(r"`([\w./-]+/[\w.-]*)`", files)
        assert named, f"the row {change!r} names no file"
        assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_named_in_a_text_exists(page: Path):
    """By its whole path or by its last part; the changelog also names files that are gone."""
    if page.name == "CHANGELOG.md":
        return
    names = re.findall(
        r"`(?!deploy/secrets/)([\w./-]+\.(?:py|lua|sh|mjs|ya?ml|html|acl|env))`", page.read_text()
    )
    ours = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for folder in (*ROOMS, "bench", "demo", "deploy", "docs", "ralf", "tests")
        for path in (ROOT / folder).rglob("*.*")
    ]

    assert [name for name in names if not any(each.endswith(f"/{name}") for each in ours)] == []


def tree() -> dict[str, bool]:
    """Each path in the README's tree, and whether the tree has lines below it."""
    (block,) = re.findall(r"```text\n(.*?)```", section("The files"), re.DOTALL)
    paths: dict[str, bool] = {}
    above: list[str] = []
    for line in block.splitlines():
        names, _, words = line.strip().partition("  ")
        assert len(words.split()) > 1, f"the tree does not say what this is: {line!r}"
        del above[(len(line) - len(line.lstrip())) // 2 :]
        for name in names.split(", "):
            if above:
                paths["/".join(above)] = True
            paths["/".join([*above, name.rstrip("/")])] = False
        if names.endswith("/"):
            above.append(names.split(", ")[-1].rstrip("/"))
    return paths


def test_the_tree_names_every_folder_and_every_file_or_its_folder():
    """A reader finds each file of the three rooms on the map, and nothing that is gone."""
    paths = tree()
    files = {
        path.relative_to(ROOT)
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".py", ".lua", ".sh"} and path.name != "__init__.py"
    }
    opened = {path for path, has_lines in paths.items() if has_lines}
    unnamed = {
        str(file)
        for file in files
        if str(file) not in paths and (str(file.parent) not in paths or str(file.parent) in opened)
    }

    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert sorted(unnamed) == []
