"""A forked run ends, however much is measured in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_robust.attach.monitor import CROWD


def test_more_metrics_than_a_forked_run_can_carry_home_do_not_make_it_hang(
    start: Callable[..., Any], finish: Callable[..., str], tmp_path: Path
) -> None:
    finish(start("crowd.py", tmp_path), timeout=120)  # 306 metrics would wait for ever
    keys = json.loads((tmp_path / "keys.json").read_text())
    assert len(keys) == CROWD
    assert {key.split("/")[0] for key in keys} == {"ood.one", "ood.two"}  # the first ones have theirs
