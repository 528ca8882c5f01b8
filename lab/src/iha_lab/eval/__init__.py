"""Evaluation by EleutherAI's lm-eval: its tasks, its prompts, its scores; `iha eval`.

- suites.py: which tasks, and the paper's protocols
- tasks.py: the harness's own task, given our data and settings
- data.py: examples from a folder, where there is no network
- answers.py: what a model wrote, kept as it comes
- harness.py: one model and one task
- compare.py: intervals, paired differences, ranks
- run.py: several models, several tasks, resumed
- report.py: the page
- sandbox.py, sandboxed.py: model-written programs, by bubblewrap
"""
