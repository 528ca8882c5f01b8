"""Placeholder until the helper writes it."""
from iha.call import Call
NAME = "flash"
def refusal(call: Call) -> str | None:
    return "not written yet"
def run(call: Call): ...
