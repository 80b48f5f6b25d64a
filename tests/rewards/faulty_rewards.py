"""A reward function that does what the response says: each way in which a user's code goes wrong."""

import ctypes
import math
import os
import re
import subprocess
import sys
import time


def obey(question, response, answer, record):
    """A number, or a fault."""
    what, _, argument = response.partition(" ")
    return FAULTS[what](argument) if what in FAULTS else float(response)


def _raise(argument):
    raise KeyError(argument)


def _print(argument):
    for line in range(int(argument)):
        print("line", line)
    print("to stderr", file=sys.stderr)
    return 1.0


def _hoard(argument):
    return float(len(bytearray(int(argument) << 30)))


def _crash(argument):
    ctypes.string_at(0)


def _hang_holding_the_interpreter(argument):
    return float(bool(re.match(r"(a+)+b", "a" * 64)))


def _hang_with_a_child(argument):
    child = subprocess.Popen(["sleep", "600"])
    with open(argument, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)


FAULTS = {
    "raise": _raise,
    "nan": lambda argument: math.nan,
    "infinity": lambda argument: -math.inf,
    "text": lambda argument: "good",
    "none": lambda argument: None,
    "list": lambda argument: [1.0, 2.0],
    "huge": lambda argument: 10**400,
    "print": _print,
    "hoard": _hoard,
    "crash": _crash,
    "exit": lambda argument: sys.exit(3),
    "leave": lambda argument: os._exit(4),
    "hang": lambda argument: time.sleep(600),
    "spin": _hang_holding_the_interpreter,
    "orphan": _hang_with_a_child,
    "pid": lambda argument: os.getpid(),
}


def fails_sometimes(question, response, answer, record):
    """In a run: raises for one question, is text for another; at least 1 for a response to any other. Prints."""
    print("judged", question)
    if question == "w1":
        raise RuntimeError("no judgement")
    if question == "w2":
        return "good"
    return 1.0 + (response == answer) + len(response)


def always_fails(question, response, answer, record):
    return math.nan


def always_the_same(question, response, answer, record):
    return 0.1
