"""Kill the workflow: the next `spacy project run all` makes what an undisturbed run makes.

`make test` kills one training; `make test-faults` kills each command once, FAULT_SEED chooses the moments.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import srsly

from benchmarks.accuracy import copy_project
from workflow import contents, project_run


class Run:
    """Run `spacy project run NAME` of a project in a new process group."""

    def __init__(self, project, name, variables, *further):
        words = [word for key, value in variables.items() for word in (f"--vars.{key}", str(value))]
        self.log = project.with_suffix(".log")
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "spacy", "project", "run", name, ".", *words, *further],
                cwd=project,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, is_time):
        """Waits until `is_time()` or the end of the run."""
        while self.process.poll() is None and not is_time():
            time.sleep(0.01)

    def wait_for(self, command):
        """Waits until the command has begun."""
        self.wait(lambda: f"= {command} =" in self.log.read_text(errors="replace"))

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def finish(self):
        assert self.process.wait() == 0, self.log.read_text(errors="replace")


def test_a_training_killed_while_it_writes_is_done_again(project, variables, tmp_path):
    whole, copy = contents(project), shutil.copytree(project, tmp_path / "project")
    metrics = copy / "metrics"
    before = metrics.stat().st_mtime_ns
    run = Run(copy, "train", variables, "--force")
    try:
        run.wait(lambda: metrics.stat().st_mtime_ns != before)  # its table is made anew
        time.sleep(random.Random(os.environ.get("FAULT_SEED", "0")).random() / 2)
    finally:
        assert run.kill() == -signal.SIGKILL
    assert contents(copy) != whole
    project_run(copy, "all", variables)
    assert contents(copy) == whole


@pytest.mark.skipif("FAULTS" not in os.environ, reason="make test-faults runs it: minutes")
def test_a_workflow_killed_in_each_command_ends_as_an_undisturbed_one(project, variables, tmp_path):
    chance = random.Random(os.environ.get("FAULT_SEED", "0"))
    sources = ("data", "corpus/running")
    undisturbed, killed = (copy_project(tmp_path / name, project, sources) for name in ("undisturbed", "killed"))
    for command in srsly.read_yaml(project / "project.yml")["workflows"]["all"]:
        run = Run(undisturbed, command, variables)
        run.wait_for(command)
        began = time.monotonic()
        run.finish()
        took, code = time.monotonic() - began, 0
        while code == 0:  # the workflow may end before the moment in its last command
            shutil.rmtree(killed / "packages", ignore_errors=True)
            run = Run(killed, "all", variables)
            run.wait_for(command)
            end = time.monotonic() + chance.uniform(0, took)
            run.wait(lambda end=end: time.monotonic() >= end)
            code = run.kill()
        print(f"{command}: exit code {code}")
        assert code == -signal.SIGKILL
    Run(killed, "all", variables).finish()
    assert contents(killed) == contents(undisturbed) == contents(project)
