"""U2A, "Cross-Modal Proxy Tokens" (arXiv 2501.17823), in plain PyTorch.

h_m = E_m([CLS_m ; X_m ; MT_m])        c_m = class token of h_m      p_{m->j} = row of mask token m->j
z = sum_j (c_j, or the mean of p_{m->j} over the available m where j is missing)         logits = W z + b
L = L_task + lambda sum_{(m, j)} mean (p_{m->j} - sg(c_j))^2       over samples that have m and j, and over d

With separate_heads (ours): c and p are normalised over d, z = sum_j z_j and logits = sum_j W_j z_j + b.
"""

import torch
from torch import Tensor, nn

from .common import Inputs, ReferenceOutput, mean, presence, require_one_modality, take, task_loss
from .encoder import ReferenceEncoder


class ReferenceU2A(nn.Module):
    """Frozen encoders with LoRA; one mask token per other modality in each; one linear head.

    Encoder m carries the mask tokens of the other modalities, in modality order: `mask_tokens[m]` [M - 1, D_m]. The
    common width d is the largest; a narrower modality gets `translators[m]`, applied to its class token, its proxies
    and (all_absent="prior") its mask tokens; with translate_all (ours) every modality does. With separate_heads the
    head holds the W_j side by side, [C, M * d].

    LoRA factors: `lora_factors()`.
    """

    def __init__(
        self,
        encoders: dict[str, nn.Module],
        num_labels: int,
        r: int = 4,
        lora_alpha: float = 8,
        target_modules: tuple[str, ...] = ("q", "k", "v", "o"),
        use_rslora: bool = False,
        align_weight: float = 0.2,
        stop_gradient: bool = True,
        translate_all: bool = False,
        separate_heads: bool = False,
        all_absent: str = "error",
        problem_type: str | None = None,
    ):
        super().__init__()
        self.modalities = list(encoders)
        self.encoders = nn.ModuleDict({m: ReferenceEncoder(model) for m, model in encoders.items()})
        for encoder in self.encoders.values():
            encoder.add_lora(r, lora_alpha, target_modules, use_rslora)
        widths = {m: encoder.width for m, encoder in self.encoders.items()}
        d = max(widths.values())
        others = len(encoders) - 1
        self.mask_tokens = nn.ParameterDict({m: 0.02 * torch.randn(others, widths[m]) for m in self.modalities})
        self.translators = nn.ModuleDict(
            {m: nn.Linear(width, d) for m, width in widths.items() if translate_all or width != d}
        )
        for linear in self.translators.values():
            if linear.in_features == d:  # it starts from the plain sum
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
        self.separate_heads = separate_heads
        self.head = nn.Linear(d * len(encoders) if separate_heads else d, num_labels)
        self.align_weight, self.stop_gradient = align_weight, stop_gradient
        self.all_absent, self.problem_type = all_absent, problem_type

    def lora_factors(self) -> dict[tuple[str, int, str], tuple[nn.Parameter, nn.Parameter]]:
        """(modality, layer, role) -> A [r, in], B [out, r]."""
        return {(m, *key): ab for m, encoder in self.encoders.items() for key, ab in encoder.lora_factors().items()}

    def forward(
        self,
        inputs: Inputs,
        modality_mask: Tensor | None = None,
        labels: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> ReferenceOutput:
        """modality_mask bool [B, M], True = present; drop bool [B, M], True = treated as absent (modality dropout)."""
        present = presence(inputs, self.modalities, modality_mask)
        if drop is not None:
            present = present & ~drop
        if self.all_absent == "error":
            require_one_modality(present)
        classes, proxies = self.encode(inputs, present)
        fused = torch.stack([self.fuse(sample, classes, proxies) for sample in range(len(present))])  # [B, d or M * d]
        logits = self.head(fused)
        if labels is None:
            return ReferenceOutput(logits)
        task, align = task_loss(logits, labels, self.problem_type), self.alignment(classes, proxies)
        return ReferenceOutput(logits, task + self.align_weight * align, task, align)

    def encode(self, inputs: Inputs, present: Tensor) -> tuple[dict, dict]:
        """classes[m, b] = c_m and proxies[m, j, b] = p_{m->j} of sample b, both [d], for the present (m, b)."""
        classes, proxies = {}, {}
        for column, m in enumerate(self.modalities):
            rows = present[:, column].nonzero().flatten()
            if len(rows) == 0:
                continue
            class_tokens, mask_rows = self.encoders[m].read(take(inputs[m], rows), self.mask_tokens[m])
            class_tokens, mask_rows = self.common(m, class_tokens), self.common(m, mask_rows)
            for place, b in enumerate(rows.tolist()):
                classes[m, b] = class_tokens[place]
                for index, j in enumerate(self.others(m)):
                    proxies[m, j, b] = mask_rows[place, index]
        return classes, proxies

    def others(self, m: str) -> list[str]:
        return [j for j in self.modalities if j != m]

    def common(self, m: str, rows: Tensor) -> Tensor:
        """[..., D_m] -> [..., d] in the head's dtype."""
        rows = rows.to(self.head.weight.dtype)
        rows = self.translators[m](rows) if m in self.translators else rows
        if not self.separate_heads:
            return rows
        centred = rows - rows.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    def fuse(self, b: int, classes: dict, proxies: dict) -> Tensor:
        """Sample b -> z [d], or its z_j side by side; with no modality at all: the mean of all mask tokens."""
        available = [m for m in self.modalities if (m, b) in classes]
        if not available:
            prior = torch.cat([self.common(m, self.mask_tokens[m]) for m in self.modalities]).mean(dim=0)
            return prior.repeat(len(self.modalities)) if self.separate_heads else prior
        chosen = []
        for j in self.modalities:
            chosen.append(classes[j, b] if j in available else mean([proxies[m, j, b] for m in available]))
        return torch.cat(chosen) if self.separate_heads else torch.stack(chosen).sum(dim=0)

    def alignment(self, classes: dict, proxies: dict) -> Tensor:
        """Sum over ordered pairs of the mean over samples that have both; 0 for a pair without such samples."""
        total = self.head.weight.new_zeros(())
        samples = sorted({b for _, b in classes})
        for m in self.modalities:
            for j in self.others(m):
                both = [b for b in samples if (m, b) in classes and (j, b) in classes]
                if both:
                    predicted = torch.stack([proxies[m, j, b] for b in both])
                    target = torch.stack([classes[j, b] for b in both])
                    target = target.detach() if self.stop_gradient else target
                    total = total + (predicted - target).square().mean()
        return total
