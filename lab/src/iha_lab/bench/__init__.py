"""What the operator costs: every backend of a device on the same inputs, in one run.

cases.py        what is measured, as plain data
contestants.py  what runs: the backends, plain attention, the published recipe; and the check
measure.py      time and peak memory of one of them
ceilings.py     what the machine itself can do
model.py        a whole model's training step
run.py          all of it in order, written to a file as it comes
report.py       the file's figures as tables and a picture
"""
