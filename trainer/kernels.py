"""Which of PyTorch's attention kernels a process may take on a GPU."""

from __future__ import annotations

import logging


def avoid_plans_for_each_shape() -> None:
    """Leave out cuDNN's attention, which builds a plan for each new shape, forward and backward.

    PyTorch asks it first on Hopper and Blackwell. Micro-batches of text come in hundreds of shapes, and few come
    twice: on an H200 a 1 B model's micro-step of 16 x 480 tokens took 91 ms over and over again, and about
    300 ms among micro-steps of other widths (torch 2.11, 2026-11-26); others saw 0.44 s forward and 0.55 s backward for
    each new shape on a B200 (modelscope/FunASR#3704). FlashAttention's kernels, next in PyTorch's order, need no plan.
    For the whole process: called where a model is loaded, in worker and trainer.
    """
    import torch

    if torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        logging.getLogger(__name__).debug("attention: without cuDNN's kernels")
