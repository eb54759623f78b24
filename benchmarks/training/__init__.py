"""Optimizers trained on one footing: the same pre-declared trials for all, one row a run, curves by Benchopt.

A study (study.py) is problems, methods on each, and rules. There are three, run by the same commands: LocoProp's, whose
rules these are, that of alternating minimization (altmin/__init__.py), and that of curvature (curvature/__init__.py).

- Trials: eight Sobol points in each method's own ranges (methods.py, trials.json), three epochs, one seed; the lowest
  train loss wins, failures excluded. Finals: the winner, three other seeds, twenty epochs. The rate is constant.
- 10,000 images to tune and to finish on, not the 60,000 of MNIST: what seven core-hours allow. Test loss on 2,000.
- First-order methods also run at batch 100 (N/T of LocoProp's ten steps on 1,000 rows), tuned on their own.
- A run that diverges, lacks memory or exceeds its CPU time is a row with infinite loss and time to target. An error
  that says nothing of the method stops the study instead.
- Seconds are steps times the seconds a step of an interleaved run with Adam (step_time.py), never a run's own clock.

To add a method: an entry in a study's methods.py, and `python -m benchmarks.training --study <its name> declare`.
When a method's rule changes, raise its `revision`: its rows and times no longer count, and are made anew.

What is built here beside Benchopt, and why. Benchopt performs each run: data, objective, solver, callback and curve
are its own; `benchopt run` and its pools (processes, dask, SLURM) work on these files, where a method or a problem is
a value of one plugin's parameter. Five things it does not do. (1) Its cache (1.10) keeps what a run returned as a
pickle, under a hash of the parameters, the checkout's path and the plugins' files: a method whose rule has changed in
another file is answered from before, what ended as an error is not kept and runs again each time, and the pickles do
not travel. Here a run is a line of JSON in the repository, under a key with its configuration and the code's
revision, and a study killed at any moment goes on to the same rows, byte for byte (rows.py). (2) Its results are one
file, written when all that was asked for has ended; here each run is on the disk when it ends. (3) It has no trials:
that all methods get equally many points, declared before, and that the best one alone is run to the end, is plan.py
and trials.py. (4) It runs in the process that asks or in a worker of a pool, limited by the wall clock; here a run
has a process of its own and a limit of CPU seconds, so that one that takes all memory or time is a row like another
(runner.py), and the cost of all is known before (budget.py). (5) Its seconds are the run's own, which on a shared
machine compare nothing; here steps are timed apart, interleaved (step_time.py). Its plots show one result file;
report.py is made from the rows. Nothing else is built again.
"""
