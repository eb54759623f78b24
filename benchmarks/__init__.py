"""What is measured with the library, by question.

speed/          what quantities, steps and the library's own parts cost, in time and memory
training/       how far optimizers get: three studies on Benchopt, and how defaults were chosen
distributed/    what a step costs over several processes
device.py       what works on a GPU and what it costs there, in one command
papers/         what the papers state, shown again
results/        what was found, as JSON and pictures; the rows of the studies are training/rows/

probe.py        how all of them time, record and write
read.py         what others read of the results
data.py         the data sets, with checksums
"""
