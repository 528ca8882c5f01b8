"""What the operator costs: every backend of a device on the same inputs, in one run.

cases.py            what is measured, as plain data
implementations.py  what runs: the backends, plain attention, the published recipe; and the check
measure.py          time and peak memory of one of them
ceilings.py         what the machine itself can do
training_step.py    a whole model's training step
against_plain.py    steps of whole models against the plain one, as one case of `iha bench`
run.py              all of it in order, written to a file as it comes
traffic.py          bytes moved, counted
peak_memory.py, prefill.py, kernels.py, tune.py    programs of their own
"""
