"""A process in which accelerate shards on CPUs as on GPUs.

accelerate 1.15 reads `ACCELERATE_USE_FSDP` only `elif self.distributed_type in [DistributedType.MULTI_GPU, ..]`
(`AcceleratorState.__init__`, accelerate/state.py), a list without MULTI_CPU: there it goes on as DDP without a word.
Here MULTI_CPU gets what those lines give MULTI_GPU. All else is accelerate's and Trainer's own.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_on_cpus():
    usual = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **given):
        usual(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
