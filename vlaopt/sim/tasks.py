"""The Meta-World tasks of the reference policy and the English that asks for them, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlaopt.errors import InputError

Phrasings = Literal["training", "held-out"]


@dataclass(frozen=True)
class Task:
    """One task: its name here (`environment` minus the version), and instructions a policy has seen and has not."""

    name: str
    environment: str
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    max_steps: int = 200

    def phrasings(self, split: Phrasings) -> tuple[str, ...]:
        return self.training if split == "training" else self.held_out


TASKS: tuple[Task, ...] = (
    Task(
        "button-press-topdown",
        "button-press-topdown-v3",
        training=(
            "press the button",
            "push the red button down",
            "press the button from above",
            "please push down on the button",
            "hit the red button from the top",
            "press down the big red button",
            "move above the button and push it",
            "go to the red button and press it down",
        ),
        held_out=("push the button down from above", "please press the red button", "hit the big button"),
    ),
    Task(
        "coffee-button",
        "coffee-button-v3",
        training=(
            "press the coffee machine button",
            "start the coffee machine",
            "make some coffee",
            "push the button on the coffee machine",
            "please make me a coffee",
            "turn on the coffee machine",
            "get the coffee machine going",
            "brew a cup of coffee",
        ),
        held_out=("please start the coffee machine", "make a cup of coffee", "turn the coffee machine on now"),
    ),
    Task(
        "drawer-close",
        "drawer-close-v3",
        training=(
            "close the drawer",
            "shut the drawer",
            "push the drawer in",
            "please close the green drawer",
            "push the drawer shut",
            "the drawer should be closed",
            "slide the drawer closed",
            "move to the drawer and push it closed",
        ),
        held_out=("please shut the green drawer", "push the open drawer closed", "close that drawer now"),
    ),
    Task(
        "drawer-open",
        "drawer-open-v3",
        training=(
            "open the drawer",
            "pull the drawer open",
            "pull out the drawer",
            "please open the green drawer",
            "grab the handle and pull the drawer",
            "the drawer should be open",
            "slide the drawer open",
            "pull the drawer by its handle",
        ),
        held_out=("please pull the green drawer open", "pull the handle to open the drawer", "open that drawer now"),
    ),
    Task(
        "faucet-close",
        "faucet-close-v3",
        training=(
            "close the faucet",
            "turn off the water",
            "turn the faucet off",
            "shut the faucet",
            "please close the tap",
            "rotate the faucet handle to close it",
            "stop the water at the tap",
            "the faucet should be closed",
        ),
        held_out=("please turn the tap off", "shut off the water at the faucet", "close that faucet now"),
    ),
    Task(
        "faucet-open",
        "faucet-open-v3",
        training=(
            "open the faucet",
            "turn on the water",
            "turn the faucet on",
            "open up the faucet",
            "please open the tap",
            "rotate the faucet handle to open it",
            "let the water run from the tap",
            "the faucet should be open",
        ),
        held_out=("please turn the tap on", "let the water run at the faucet", "open that faucet now"),
    ),
    Task(
        "window-close",
        "window-close-v3",
        training=(
            "close the window",
            "shut the window",
            "slide the window shut",
            "please close the window",
            "push the window handle to close it",
            "move the window closed",
            "slide the window closed",
            "the window should be closed",
        ),
        held_out=("please shut the window", "push the window closed", "close that window by its handle"),
    ),
    Task(
        "window-open",
        "window-open-v3",
        training=(
            "open the window",
            "slide the window open",
            "push the window open",
            "please open the window",
            "push the window handle to open it",
            "move the window open",
            "open up the window",
            "the window should be open",
        ),
        held_out=("please slide the window open", "open that window by its handle", "push open the window"),
    ),
)


def tasks_named(names: Sequence[str] | None) -> tuple[Task, ...]:
    """The tasks of these names in that order; all of them for None. Raises InputError for a name that is not there."""
    if names is None:
        return TASKS
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            raise InputError(f"no task named {name!r}", hint="tasks: " + ", ".join(known))
    return tuple(known[name] for name in names)
