"""Starts the scripts of this folder, each with an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Scripts that import each other as scripts do: from their own folder.
collect_ignore = [path.name for path in HERE.glob("*.py") if not path.name.startswith("test_")]


def _environment() -> dict[str, str]:
    # What a distributed run left behind in this process would be taken for the cluster of the next one.
    foreign = ("MASTER_", "LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "GROUP_RANK", "PL_GLOBAL_SEED")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Start a script in a process group of its own, in an empty folder: without a logger, pictures become files."""

    def starting(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, HERE / script, *map(str, arguments)]
        return subprocess.Popen(
            command,
            env=_environment(),
            cwd=tmp_path_factory.mktemp("run"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return starting


@pytest.fixture(scope="session")
def finish() -> Callable[..., str]:
    """Wait for a script; one that hangs is killed with all its processes, and is a failure, as one that fails is."""

    def finishing(process: subprocess.Popen[str], timeout: float = 120) -> str:
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            pytest.fail(f"{process.args} still ran after {timeout} s; it said:\n{said}")
        assert process.returncode == 0, said
        return said

    return finishing
