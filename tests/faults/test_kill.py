"""Whatever is killed whenever: the next `spacy project run all` ends with what an undisturbed run ends with.

`make test` kills three commands; `make test-faults` kills each of the ten commands of the workflow five times.
"""

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest

from killing import PRODUCTS, SEED, SLOW, UNFINISHED, contents, options, run, unused_copy, workflow

LIVE = ("metrics/training.jsonl", "metrics/training.png")
TRIES = 5  # a run may end before the moment comes at which it was to be killed


@pytest.fixture(scope="module")
def variables(project, tiny_encoder):
    return options(project, tiny_encoder)


@pytest.fixture(scope="module")
def seconds(project, variables, tmp_path_factory):
    """How long each command takes, from a second undisturbed run, which must make the same."""
    root = tmp_path_factory.mktemp("undisturbed")
    copy = unused_copy(project, root / "project")
    taken = {}
    for command in workflow(copy):
        ended = run(copy, command, variables, root / "scratch", kill_in=command, moment=at(float("inf")))
        assert ended.code == 0, ended.text
        taken[command] = ended.seconds
    assert contents(copy) == contents(project)
    return taken


def state(project: Path) -> set[tuple[str, int]]:
    """What is in the folders of the products, not below, and when it changed."""
    found = set()
    for name in PRODUCTS:
        with contextlib.suppress(FileNotFoundError), os.scandir(project / name) as entries:
            found |= {(entry.path, entry.stat(follow_symlinks=False).st_mtime_ns) for entry in entries}
    return found


def at(seconds):
    return lambda: lambda passed: passed >= seconds


def after_first_write(project, delay):
    """So many seconds after the first change in the project's products."""

    def moment():
        before, changed = state(project), None

        def is_time(passed):
            nonlocal changed
            if changed is None and state(project) != before:
                changed = passed
            return changed is not None and passed >= changed + delay

        return is_time

    return moment


def kill(project, name, command, variables, scratch, chance, whole, seconds=None):
    """Runs `name`, killed in `command` at a moment by chance: in as many seconds as it takes, or soon after it has
    written something. Gives what was printed.

    whole: what may be in its place then, and only whole; but for the table of a training that goes on.
    """
    printed = ""
    for _ in range(TRIES):
        if seconds is not None and (chance.random() < 0.5 or command == "check"):
            how, moment = "whenever", at(chance.random() * seconds)
        else:
            how, moment = "while it writes", after_first_write(project, 10 ** chance.uniform(-3, 0))
        ended = run(project, name, variables, scratch, kill_in=command, moment=moment)
        printed += ended.text
        if ended.code < 0:
            print(f"killed {how}: {command} after {ended.seconds:.2f} s, when the run was in {ended.command}")
            left = {(path, sum_) for path, sum_ in contents(project).items() if sum_ != UNFINISHED and path not in LIVE}
            assert left - whole.items() == set()
            return printed
        assert ended.code == 0, ended.text
        shutil.rmtree(project / "packages")  # the last command has to run again
    return pytest.fail(f"{command} could not be killed in {TRIES} runs")


def goes_on(copy, variables, scratch, whole):
    """The next run ends with what the undisturbed one ended with, and says so if it starts a training over.

    What a killed command left unfinished stays where that command has nothing to do.
    """
    stopped = (copy / "training" / "unfinished").exists()
    ended = run(copy, "all", variables, scratch)
    assert ended.code == 0, ended.text
    assert ("Training starts over" in " ".join(ended.text.split())) == stopped
    assert {path: sum_ for path, sum_ in contents(copy).items() if sum_ != UNFINISHED} == whole
    shutil.rmtree(scratch)


@SLOW
def test_each_run_is_killed_in_a_later_command(project, variables, seconds, tmp_path):
    """From a fresh project on, each run going on from where the one before was killed."""
    chance, whole = random.Random(SEED), contents(project)
    copy = unused_copy(project, tmp_path / "project")
    for command in workflow(copy):
        stopped = (copy / "training" / "unfinished").exists()
        printed = kill(copy, "all", command, variables, tmp_path / "scratch", chance, whole, seconds[command])
        assert ("Training starts over" in " ".join(printed.split())) == stopped
    goes_on(copy, variables, tmp_path / "scratch", whole)


@SLOW
@pytest.mark.parametrize("number", range(2))
def test_every_command_is_killed_twice_in_a_finished_project(project, variables, seconds, tmp_path, number):
    """The last command first, so that each still has what it needs; the lock calls all of them done."""
    chance, whole = random.Random(f"{SEED} {number}"), contents(project)
    copy = shutil.copytree(project, tmp_path / "project")
    for command in reversed(workflow(copy)):
        for _ in range(2):
            options = [*variables, "--force"]
            kill(copy, command, command, options, tmp_path / "scratch", chance, whole, seconds[command])
    goes_on(copy, variables, tmp_path / "scratch", whole)


def test_commands_killed_while_they_write(project, variables, tmp_path):
    chance, whole = random.Random(SEED), contents(project)
    copy = shutil.copytree(project, tmp_path / "project")
    for command in ("package", "evaluate", "download"):
        kill(copy, command, command, [*variables, "--force"], tmp_path / "scratch", chance, whole)
    goes_on(copy, variables, tmp_path / "scratch", whole)
