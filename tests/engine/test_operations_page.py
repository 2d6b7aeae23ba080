"""docs/operations.md and docs/security.md: what they say to run is run, what they quote is said, each test is there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from jit_kernel import config, ready, warmup
from jit_kernel.commands import cache
from tests.support import children, tiny

ROOT = config.package_dir().parent
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
USER = 1000
_MAINS = {"jit_kernel.warmup": lambda words: warmup.main(words), "jit_kernel": lambda words: cache.main(words[1:])}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="jit_kernel-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def run(words: list[str]) -> int:
    """`python -m jit_kernel ...` in this process: a new one would import torch."""
    assert words[:2] == ["python", "-m"] and words[2] in _MAINS, words
    try:
        return _MAINS[words[2]](words[3:])
    except SystemExit as ended:
        return int(ended.code or 0)


def steps() -> list[str]:
    """The commands of the numbered steps, in order."""
    listed = PAGE.partition("## From a run to an image")[2].partition("A container image")[0]
    found = [" ".join(each.split()) for each in re.findall(r"`([^`]*)`", listed)]
    return [each for each in found if each.startswith(("python -m", "JIT_KERNEL_RECORD=", "jit_kernel.preload("))]


def test_the_steps_from_a_run_to_an_image(tmp_path):
    """Each command of the page as it stands there, with this test's folder in the place of /tmp."""
    commands = [each.replace("/tmp/", f"{tmp_path}/").replace("kernels.pack", f"{tmp_path}/k.pack") for each in steps()]
    record, warm, pack, unpack, check, preload = commands
    assert record.endswith("python serve.py") and preload.startswith('jit_kernel.preload("')
    built: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "built")}
    image: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "image"), "PATH": "", "CXX": None}
    name, _, value = record.split()[0].partition("=")
    assert children.run(tiny.both, environment={**built, name: value}, scratch=tmp_path).error == ""
    for environment, command in ((built, warm), (built, pack), (image, unpack), (image, check)):
        outcome = children.run(run, shlex.split(command), environment=environment, scratch=tmp_path)
        assert outcome.error == "" and outcome.result == 0, (command, outcome)
    work = partial(ready.preload, re.findall(r'"(.*)"', preload)[0])
    outcome = children.run(work, environment={**image, "JIT_KERNEL_SEALED": "1"}, scratch=tmp_path)
    assert outcome.error == "" and (outcome.result["loaded"], outcome.result["compiled"]) == (2, 0), outcome


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage of the container file."""
    (block,) = re.findall(r"```\n(FROM .*?)```", PAGE, re.DOTALL)
    lines = [tuple(line.split(" ", 1)) for line in block.splitlines() if line]
    starts = [place for place, (word, _) in enumerate(lines) if word == "FROM"]
    return [lines[begin:end] for begin, end in zip(starts, [*starts[1:], len(lines)], strict=True)]  # type: ignore[misc]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_container_file(folder):
    """Its RUN lines that run jit_kernel, with its ENV, each stage in a folder of its own; at last user 1000 calls."""
    recording: dict[str, str | None] = {
        "JIT_KERNEL_CACHE_DIR": str(folder / "run"), "JIT_KERNEL_RECORD": str(folder / "profile"),
    }  # fmt: skip
    assert children.run(tiny.both, environment=recording, scratch=folder).error == ""
    ran, user, image = [], 0, folder / "context"
    image.mkdir()
    shutil.copyfile(folder / "profile", image / "profile")
    environment: dict[str, str | None] = {}
    for stage in stages():
        last, image, environment = image, folder / f"image{len(ran)}", {}
        for word, rest in stage:
            parts = rest.split()
            if word == "ENV":
                environment |= dict(each.partition("=")[::2] for each in parts)
            elif word == "USER":
                user = int(rest)
            elif word == "COPY":
                _copy([each for each in parts if not each.startswith(("--from", "jit_kernel-"))], last, image)
            for command in rest.split(" && ") if word == "RUN" else ():
                here = _below(environment, image)
                words = [f"{image}{each}" if each.startswith("/") else each for each in shlex.split(command)]
                if words[0] == "rm":
                    os.unlink(words[1])
                elif words[0] == "python":
                    ran.append(shlex.split(command)[2:5])
                    outcome = children.run(run, words, environment=here, scratch=folder)
                    assert outcome.error == "" and outcome.result == 0, (command, outcome)
    assert [each[-1] for each in ran] == ["/profile", "pack", "unpack"] and user == USER
    bare = {**_below(environment, image), "PATH": "", "CXX": None}
    outcome = children.run(partial(tiny.as_user, user, tiny.both), environment=bare, scratch=folder)
    assert outcome.error == "" and outcome.result == 0, outcome


def _below(environment: dict[str, str | None], image: Path) -> dict[str, str | None]:
    return {name: f"{image}{each}" if str(each).startswith("/") else each for name, each in environment.items()}


def _copy(names: list[str], last: Path, image: Path) -> None:
    """COPY: files of the stage before, or of the context, into a folder of the image."""
    *sources, place = names
    (image / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for source in sources:
        found = last / source.lstrip("/")
        shutil.copyfile(
            found if found.exists() else last.parent / "context" / found.name, image / place.lstrip("/") / found.name
        )


def test_every_other_command_of_the_page_is_one(tmp_path, monkeypatch, capsys):
    """Those of the text, without `python -m jit_kernel`: the parser takes each."""
    found = {
        " ".join(each.split()) for each in re.findall(r"`(cache (?:prune|rm|why|clear|verify|show|list)[^`]*)`", PAGE)
    }
    assert len(found) >= 6, found
    for command in sorted(found):
        words = shlex.split(command.replace("KEY", "abcd").replace("my_kernels", "tests.support.tiny"))[1:]
        words += ["1GiB"] if words[-1] == "--limit" else []
        words += ["abcd"] if words == ["show"] else []
        assert cache._parser().parse_args(words).action == words[0], command


def test_every_message_of_the_page_is_said():
    """What the page quotes stands in the sources, up to what is filled in."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "jit_kernel").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*(?:f?)"', "", sources)
    rows = PAGE.partition("## By error message")[2].splitlines()
    messages = [each for row in rows if row.startswith("| `") for each in re.findall(r"`([^`]*)`", row.split(" | ")[0])]
    assert len(messages) >= 15
    for message in messages:
        for part in re.split(r"\.\.\.|\bN\b|\(|\)|\d+", message):
            words = part.strip(" :,")
            assert not words or words in joined, f"{message!r}: nothing says {words!r}"


def test_every_attack_names_a_test_that_is_there():
    """A file of tests/engine and, where it is named, a function of it."""
    rows = [row for row in SECURITY.splitlines() if row.startswith("| ") and "`test" in row]
    assert len(rows) >= 13
    for row in rows:
        for name, function in re.findall(r"`(?:tests/engine/)?(test_\w+\.py)(?:::(\w+))?`", row.rsplit(" | ", 1)[1]):
            text = (ROOT / "tests" / "engine" / name).read_text(encoding="utf-8")
            assert f"def {function or 'test_'}" in text, row
