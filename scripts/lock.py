"""Locks the requirements: every package, direct or not, with its version and the SHA-256 of its files.

`make lock` runs it after a change of a requirements file. uv resolves for all of Python 3.11 and up and all systems at
once. What PyTorch's build for CUDA needs besides (3 GB) is a file of its own, and so is the CPU build, without it.
"""

import re
import subprocess
import sys
from pathlib import Path

from wasabi import msg

from scripts.common import replacing

# PyTorch's builds for the CPU, which are not on PyPI: wheels' SHA-256 as `pip hash` gave it (Python 3.11, Linux)
CPU_BUILDS = {"2.13.0": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"]}
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
HEADER = "# Made by `make lock` with `uv pip compile --universal --generate-hashes`; change {} instead.\n"


def compile_requirements(*paths: str) -> dict[str, str]:
    """The locked lines of each package in the files and of all that they need, by name, as uv gives them.

    Raises subprocess.CalledProcessError where uv finds no versions that go together; uv has said then why.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--no-header"]
    output = subprocess.run([*command, *paths], stdout=subprocess.PIPE, text=True, check=True).stdout
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", output.strip()):
        # a package may be there twice, for two versions of Python
        name = re.match(r"[A-Za-z0-9._-]+", entry)[0]
        entries[name] = entries.get(name, "") + entry + "\n"
    return entries


def cpu_build(entry: str) -> str:
    """The CPU build of the version of PyTorch in its entry, as an entry. Exits where none is known here."""
    version = re.match(r"torch==([0-9.]+)", entry)[1]
    if version not in CPU_BUILDS:
        msg.fail(f"CPU_BUILDS in {__file__} has no hash for torch {version}; add what `pip hash` gives.", exits=1)
    return " \\\n".join([f"torch=={version}+cpu", *(f"    --hash=sha256:{x}" for x in CPU_BUILDS[version])]) + "\n"


def write(path: Path, entries: dict[str, str], sources: str) -> None:
    """Writes a lock file of these entries."""
    with replacing(path) as temporary:
        temporary.write_text(HEADER.format(sources) + "".join(entries.values()), encoding="utf8")
    msg.good(f"{path}: {len(entries)} packages")


def main() -> None:
    """Write a lock file for each of the requirements files, and of PyTorch for its CPU build and CUDA's libraries."""
    # resolved together, so that all of them go together
    locked = compile_requirements("requirements-dev.txt", "requirements-gpu.txt")
    dev = compile_requirements("requirements-dev.txt").keys()
    needed = compile_requirements("requirements.txt").keys()
    cuda = {name for name in needed if CUDA.match(name)}
    for path, names, sources in (
        ("requirements.lock", needed - cuda, "requirements.txt"),
        ("requirements-dev.lock", dev - needed, "requirements-dev.txt"),
        ("requirements-cuda.lock", cuda, "requirements.txt"),
        ("requirements-gpu.lock", locked.keys() - dev, "requirements-gpu.txt"),
    ):
        write(Path(path), {name: entry for name, entry in locked.items() if name in names}, sources)
    write(Path("requirements-cpu.lock"), {"torch": cpu_build(locked["torch"])}, "scripts/lock.py")


if __name__ == "__main__":
    main()
