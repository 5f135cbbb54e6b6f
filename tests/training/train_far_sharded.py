"""`training.train_far` with FSDP2 on CPUs, as `accelerate launch --use_fsdp --fsdp_version 2` on GPUs.

accelerate leaves FSDP off where there is no GPU; torch and gloo can do it.
"""

import os
import sys

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffusers_far.training.train_far import main

initialise = Accelerator.__init__


def with_fsdp(accelerator: Accelerator, **options: object) -> None:
    initialise(accelerator, **options)
    # In the state that all of accelerate reads.
    accelerator.state.__dict__["distributed_type"] = DistributedType.FSDP
    accelerator.state.__dict__["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)


Accelerator.__init__ = with_fsdp
main(sys.argv[1:])
# Threads of gloo may still let go of FSDP's tensors, for which they want the interpreter: with one that is
# ending, the process would abort, or wait for ever.
sys.stdout.flush()
os._exit(0)
