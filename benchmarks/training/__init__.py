"""Optimizers trained on one footing: the same pre-declared trials for all, one row a run, curves by Benchopt.

A study (study.py) is problems, methods on each, and rules. There are two, run by the same commands: LocoProp's, whose
rules these are, and that of alternating minimization, whose rules are in altmin/__init__.py.

- Trials: eight Sobol points in each method's own ranges (methods.py, trials.json), three epochs, one seed; the lowest
  train loss wins, failures excluded. Finals: the winner, three other seeds, twenty epochs. The rate is constant.
- 10,000 images to tune and to finish on, not the 60,000 of MNIST: what six core-hours allow. Test loss on 2,000.
- First-order methods also run at batch 100 (N/T of LocoProp's ten steps on 1,000 rows), tuned on their own.
- A run that diverges, lacks memory or exceeds its CPU time is a row with infinite loss and time to target. An error
  that says nothing of the method stops the study instead.
- Seconds are steps times the seconds a step of an interleaved run with Adam (step_time.py), never a run's own clock.

To add a method: an entry in a study's methods.py, and `python -m benchmarks.training --study <its name> declare`.
When a method's rule changes, raise its `revision`: its rows and times no longer count, and are made anew.

What is built here beside Benchopt, and why. Benchopt runs each training: data, objective, solver, callback and curve are
its own, its `benchopt run` and its pools (processes, dask, SLURM) work on these files, and a method or problem is a value
of a parameter of one plugin. Five things it does not do. Its cache (1.10) keeps what a run returned as a pickle under a
hash of the parameters and of the plugin's file alone: a method whose rule changed elsewhere would be answered from before,
a failed run is never kept and is run again each time, and the pickles stay on one machine; here a run is a line of JSON
under a key with the configuration and the code's revision (rows.py), in the repository, and a study killed with -9 goes on
with the same rows byte for byte. It writes results once, when all that was asked for has ended; here each run is on the
disk when it ends. It has no notion of trials: that all methods get the same declared points, and that the winner alone goes
on to the finals, is plan.py and trials.py. It runs in the process that asks and limits seconds by the wall clock; here a
run has a process of its own and a limit of CPU seconds (runner.py), so that one that takes all memory or time is a row like
another, and the whole is estimated before (budget.py). And its seconds are the run's own clock, which on shared machines
compares nothing; steps are timed apart, interleaved (step_time.py). Its plots show one run of the command; report.py shows
what the rows of years say. Nothing else is rebuilt: without Benchopt no run takes place.
"""
