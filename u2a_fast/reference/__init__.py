"""The three methods in plain PyTorch on Hugging Face's own modules: the oracle that the fast models are tested against.

Obviously right comes first, speed last: loops over samples and pairs, no kernels, no `Block`.
"""

from .encoder import ReferenceEncoder
from .joint_embedding import ReferenceJointEmbedding
from .pmf import ReferencePMF
from .u2a import ReferenceU2A

__all__ = ["ReferenceEncoder", "ReferenceJointEmbedding", "ReferencePMF", "ReferenceU2A"]
