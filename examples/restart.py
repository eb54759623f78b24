"""Training that survives the loss of a process: layers over ranks, and checkpoints to start again from.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or a restart finds the addresses of the life before
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/restart.py --folder run

With --kill STEP rank 1 is killed once, in the middle of that step.
"""

import argparse
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import layerwise as lw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="restart")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--kill", type=int, default=-1)
    args = parser.parse_args()

    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    opt = lw.LocoProp(model, parallel=True)
    start = lw.distributed.load(args.folder, model, opt)
    for step in range(start.step, args.steps):
        batch = torch.Generator().manual_seed(step)  # the same on every rank
        x, y = torch.randn(100, 20, generator=batch), torch.randint(4, (100,), generator=batch)

        def closure(x=x, y=y, step=step):
            if step == args.kill and first_life and dist.is_initialized() and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return F.cross_entropy(model(x), y)

        loss = opt.step(closure)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            lw.distributed.save(args.folder, step + 1, model, opt)
    if start.step < args.steps and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"loss {loss:.4f} after step {args.steps}, started from {start.step}")
    if dist.is_initialized():
        dist.barrier()  # gloo's threads have let go of the last messages before Python ends
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
