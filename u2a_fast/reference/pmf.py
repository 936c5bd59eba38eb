"""PMF, "Efficient Multimodal Fusion via Interactive Prompting" (arXiv 2304.06306, section 3), in plain PyTorch.

    query stage:    y_s = Layer_s([x_s ; qcp_s ; qp_s])[:, -n:]         message s->t = translator_{s->t}(y_s)
    fusion stage:   x_t <- Layer_t([x_t ; fcp_t ; messages to t])[:, :N_t]

Both stages run the whole layer, as the official code does. The last L_f layers of each encoder are fusion layers,
paired from the top, with fresh prompts and translators in each; all messages of a layer start from the same x.
"""

import torch
from torch import Tensor, nn

from .common import Inputs, ReferenceOutput, mean, presence, require_one_modality, take, task_loss
from .encoder import ReferenceEncoder


def prompt(rows: int, width: int) -> nn.Parameter:
    """[rows, width], N(0, 0.02)."""
    return nn.Parameter(0.02 * torch.randn(rows, width))


def translator(source_width: int, target_width: int) -> nn.Sequential:
    """Linear(d -> h), ReLU, Linear(h -> d'), h = max(d // 2, d' // 2)."""
    hidden = max(source_width // 2, target_width // 2)
    return nn.Sequential(nn.Linear(source_width, hidden), nn.ReLU(), nn.Linear(hidden, target_width))


class FusionLayer(nn.Module):
    """One modality's prompts in one fusion layer, and its translators to the others ({modality: width})."""

    def __init__(self, width: int, targets: dict[str, int], query: int, query_context: int, fusion_context: int):
        super().__init__()
        self.query_prompt = prompt(query, width)
        self.query_context_prompt = prompt(query_context, width)
        self.fusion_context_prompt = prompt(fusion_context, width)
        translators = {t: translator(width, target_width) for t, target_width in targets.items()}
        # Two modalities need no target in the name: translator.0.weight, not translator.image.0.weight.
        self.translator = nn.ModuleDict(translators) if len(targets) > 1 else next(iter(translators.values()))

    def message(self, target: str, rows: Tensor) -> Tensor:
        """[B, n, d] -> [B, n, d_target]."""
        return (self.translator[target] if isinstance(self.translator, nn.ModuleDict) else self.translator)(rows)


class ReferencePMF(nn.Module):
    """Frozen encoders of any depth, `layers[i][m]` (i = 0: the lowest fusion layer), one linear head per modality.

    A missing modality (ours): its message is the translation of its own query prompts, and the logits are averaged
    over the present modalities only.
    """

    def __init__(
        self,
        encoders: dict[str, nn.Module],
        num_labels: int,
        fusion_layers: int = 2,
        query_prompts: int = 4,
        query_context_prompts: int = 4,
        fusion_context_prompts: int = 4,
        train_fusion_context: bool = True,
        problem_type: str | None = None,
    ):
        super().__init__()
        self.modalities, self.num_labels, self.problem_type = list(encoders), num_labels, problem_type
        self.encoders = nn.ModuleDict({m: ReferenceEncoder(model) for m, model in encoders.items()})
        depth = min(encoder.num_layers for encoder in self.encoders.values())
        if fusion_layers > depth:
            raise ValueError(f"fusion_layers={fusion_layers}, but an encoder has {depth} layers only")
        widths = {m: encoder.width for m, encoder in self.encoders.items()}
        counts = (query_prompts, query_context_prompts, fusion_context_prompts)
        self.layers = nn.ModuleList()
        for _ in range(fusion_layers):
            layer = {m: FusionLayer(widths[m], {t: widths[t] for t in widths if t != m}, *counts) for m in widths}
            self.layers.append(nn.ModuleDict(layer))
            for part in layer.values():
                part.fusion_context_prompt.requires_grad_(train_fusion_context)
        self.head = nn.ModuleDict({m: nn.Linear(width, num_labels) for m, width in widths.items()})

    def export_parameters(self) -> dict[str, Tensor]:
        """Everything but the encoders: `layers.{i}.{modality}.*` and `head.{modality}.*`."""
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("encoders.")}

    def forward(
        self, inputs: Inputs, modality_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ReferenceOutput:
        """modality_mask bool [B, M], True = present. Samples with the same modalities present are computed together."""
        present = presence(inputs, self.modalities, modality_mask)
        require_one_modality(present)
        dtype = self.head[self.modalities[0]].weight.dtype
        logits = torch.zeros(len(present), self.num_labels, dtype=dtype, device=present.device)
        for pattern in present.unique(dim=0):
            rows = (present == pattern).all(dim=1).nonzero().flatten()
            available = [m for m, is_present in zip(self.modalities, pattern.tolist(), strict=True) if is_present]
            logits[rows] = self.group_logits({m: take(inputs[m], rows) for m in available}, len(rows))
        if labels is None:
            return ReferenceOutput(logits)
        loss = task_loss(logits, labels, self.problem_type)
        return ReferenceOutput(logits, loss, loss)

    def group_logits(self, inputs: Inputs, batch: int) -> Tensor:
        """`inputs` holds the modalities that all of these samples have -> [batch, C]."""
        tokens, padding = {}, {}
        for m in inputs:
            tokens[m], padding[m] = self.encoders[m].embed(**inputs[m])
            for index in range(self.encoders[m].num_layers - len(self.layers)):
                tokens[m], _ = self.encoders[m].run_layer(index, tokens[m], padding[m])
        for index in range(len(self.layers)):
            tokens = self.fusion_layer(index, tokens, padding, batch)
        logits = []
        for m, head in self.head.items():
            if m in tokens:
                finished = self.encoders[m].finish(tokens[m])
                logits.append(head(self.encoders[m].class_token(finished, padding[m]).to(head.weight.dtype)))
        return mean(logits)

    def fusion_layer(self, index: int, tokens: dict, padding: dict, batch: int) -> dict[str, Tensor]:
        """tokens {m: [batch, N_m, d_m]} of the present modalities -> the same after fusion layer `index`."""
        queries = {m: self.query(index, m, tokens.get(m), padding.get(m), batch) for m in self.modalities}
        fused = {}
        for t in tokens:
            part = self.layers[index][t]
            messages = [self.layers[index][s].message(t, queries[s]) for s in self.modalities if s != t]
            learned = torch.cat([part.fusion_context_prompt.expand(batch, -1, -1), *messages], dim=1)
            fused[t], _ = self.encoders[t].run_layer(self.encoder_layer(index, t), tokens[t], padding[t], learned)
        return fused

    def query(self, index: int, m: str, tokens: Tensor | None, padding: Tensor | None, batch: int) -> Tensor:
        """y_m [batch, n, d]; of a missing modality: its query prompts as they are."""
        part = self.layers[index][m]
        if tokens is None:
            return part.query_prompt.expand(batch, -1, -1)
        learned = torch.cat([part.query_context_prompt, part.query_prompt])
        _, rows = self.encoders[m].run_layer(self.encoder_layer(index, m), tokens, padding, learned)
        return rows[:, len(part.query_context_prompt) :].to(part.query_prompt.dtype)

    def encoder_layer(self, index: int, m: str) -> int:
        """Fusion layers are the top ones: which layer of encoder m is fusion layer `index`?"""
        return self.encoders[m].num_layers - len(self.layers) + index
