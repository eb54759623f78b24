"""What extended backprop costs, beside every peer that is installed: time, peak memory, values.

    python -m benchmarks.speed.overhead [--models mlp 3c3d] [--quantities norms] [--peers backpack] [--repeats 15]

For each net and quantity, one cell: the plain gradient, ours and every peer that supports the cell run in one process
on one thread, in alternating order; the figure is (gradient + quantity) / gradient, lower quartiles of CPU time over at
least 15 repeats (5 where a round of all takes over 10 s, and the results say so). Deterministic values are compared
first. Peak memory above idle is measured in a process of its own for each. Results are written after each cell: a run
that was killed goes on where it stopped, and cells measured with other code or versions are measured again.

Peers are development extras, found by import and never needed: BackPACK, torch.func, Opacus, curvlinops, ASDL
(`pip install --no-deps -r requirements/peers.txt`, beside the project or into a folder on PYTHONPATH). One that is
missing is named as missing in the results. A contender is charged with the gradient as well, by its cheapest way to it.

    nets.py         the nets                   measure.py   one cell: values, then time
    quantities.py   the quantities             memory.py    one cell: peak memory
    contenders/     one file a library         store.py     results, kept by cell
    bounds.py       what bounds a step         report.py    table and chart
"""
