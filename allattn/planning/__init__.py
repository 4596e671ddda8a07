"""Will a training step fit in memory, and how much does it communicate? Needs no accelerator.

`compilation.py` compiles the step for the machine that `chips.py` describes, `collectives.py` reads
the compiled text, and `communication.py` says what each collective is for and which ones no rule
allows. `allattn compile` prints it; docs/scaling.md is for its users.
"""
