"""Placeholder until the helper writes it."""
from iha.call import Call
NAME = "flex"
def refusal(call: Call) -> str | None:
    return "not written yet"
def run(call: Call): ...
