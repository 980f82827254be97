import os
import socket
import subprocess
import sys

import pytest

from scripts.common import replacing


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    host = socket.gethostname()
    left, living, elsewhere = (
        tmp_path / f".encoder.partial-{name}-{pid}"
        for name, pid in ((host, killed.pid), (host, os.getppid()), (f"{host}-2", killed.pid))
    )
    for folder in (left, living, elsewhere):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with replacing(tmp_path / "encoder") as folder:
        folder.mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere, tmp_path / "encoder"])


def test_the_reason_of_an_error_that_is_not_the_file_systems_is_kept(tmp_path):
    with pytest.raises(OSError, match="^Data corruption detected$"), replacing(tmp_path / "file"):
        raise OSError("Data corruption detected")
