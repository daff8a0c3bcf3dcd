"""Patching one instance, and taking the patch away again."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from lightning_robust.attach.patch import patch, unpatched


class Greeter:
    def __init__(self, name: str) -> None:
        self.name = name

    def greet(self, greeting: str, mark: str = "!") -> str:
        return f"{greeting} {self.name}{mark}"


def louder(self: Any, original: Any, *args: Any) -> str:
    return str(original(*args)).upper()


def test_only_this_instance_is_patched_and_its_signature_stays() -> None:
    one, other = Greeter("ann"), Greeter("bob")
    undo = patch(one, "greet", louder)
    assert (one.greet("hi"), other.greet("hi")) == ("HI ANN!", "hi bob!")
    assert inspect.signature(one.greet) == inspect.signature(other.greet)
    undo()
    assert vars(one) == {"name": "ann"}
    undo()  # twice is no error


def test_a_copy_greets_with_its_own_name() -> None:
    one = Greeter("ann")
    patch(one, "greet", louder)
    twin = copy.deepcopy(one)
    twin.name = "twin"
    assert twin.greet("hi") == "HI TWIN!"


def test_what_was_on_the_instance_is_called_and_put_back() -> None:
    one = Greeter("ann")
    mine = vars(one)["greet"] = lambda greeting: "mine"
    undo = patch(one, "greet", louder)
    assert one.greet("hi") == "MINE"
    undo()
    assert vars(one)["greet"] is mine


def test_a_later_patch_of_somebody_else_is_not_torn_out() -> None:
    one = Greeter("ann")
    undo = patch(one, "greet", louder)
    theirs = vars(one)["greet"] = lambda greeting: "theirs"
    undo()
    assert vars(one)["greet"] is theirs


def test_the_original_can_be_had_below_the_patch() -> None:
    one = Greeter("ann")
    patch(one, "greet", louder)
    assert unpatched(one, "greet")("hi") == "hi ann!"
    assert unpatched(Greeter("bob"), "greet")("hi") == "hi bob!"
