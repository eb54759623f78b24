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
"""
