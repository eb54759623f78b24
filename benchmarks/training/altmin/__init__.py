"""Online alternating minimization against backprop and offline methods: its problems and methods.

- Problems: MNIST and CIFAR-10 by dense nets, LeNet-5, an Elman net of 15 units that reads MNIST row by row and
  pixel by pixel, HIGGS, and a net of signs. CIFAR-10, HIGGS: subsets where the data folder holds subsets.
- Measured: accuracy on all test rows after each epoch, and in the finals on the first 1,000 test rows after each of
  the first 100 minibatches of 200 samples (methods with batch 100 take two steps for each, with batch 25 eight).
- Trials are chosen by accuracy on rows held out of the training rows; nothing is chosen by the test rows. Finals
  train on all training rows.
- Baselines also at batch B/T (T is 2, and 8 on recurrent nets), and with two steps on every minibatch. `offline-am`
  and `admm` see all rows in each sweep and take five sweeps an epoch, for 20 epochs at most; their step time says
  what that costs.
- AM-mem forgets with a window of 20 minibatches in all trials; its rate and coupling are searched.
- The rate is constant, except in the problems of one epoch, of signs and of rows: there it rises over a twentieth of
  the steps and falls linearly, for all methods alike.
"""
