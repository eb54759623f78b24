"""Diagonal and Kronecker preconditioners against momentum and Adam, on the problems of DeepOBS.

- Problems: logistic regression on MNIST, 2C2D on Fashion-MNIST, 3C3D and All-CNN-C on CIFAR-10 (All-CNN-C with 10
  classes: the published problem's 100 need a set that is not at hand), with the published batch sizes and
  initial weights; a deep autoencoder on MNIST and a small transformer on characters. Subsets of the sets, as the
  titles say, for a few epochs, so without the published penalties and dropout: what is compared is how fast a loss
  falls.
- Trials are chosen by accuracy on rows held out of the training rows where there are classes, else by train loss;
  finals train on all training rows, with a constant rate, as in the paper.
- Every method searches two hyperparameters: rate and momentum, rate and β₁, or rate and damping. Preconditioners make
  the paper's plain update; `kfac-momentum` is the library's K-FAC with momentum and a clipped step, as it comes.
- Curves: loss and error by epoch and by second, median and quartiles over seeds. Seconds are steps times the
  seconds a step of the interleaved run.
Sources: Schneider, Balles and Hennig, "DeepOBS: A Deep Learning Optimizer Benchmark Suite" (2019); Dangel, Kunstner
and Hennig, "BackPACK: Packing More into Backprop" (2020), section 4 and appendix C.
"""
