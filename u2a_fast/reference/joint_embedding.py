"""JointEmbedding (Kim & Kim, arXiv 2407.12616), in plain PyTorch.

    e_m = class token, r_m = mean of the K read-only prompt rows, both after encoder m and its final norm
    e^_{m->j} = predictor_{m->j}(r_m)          e_j missing: the mean of e^_{m->j} over the available m
    logits = W [e_1 ; ... ; e_M] + b           L = L_task + 0.1 sum_{(m, j)} VICReg(e^_{m->j}, sg(e_j))

Read-only (RPO, ICCV 2023): the prompts stand at the end, and their attention column is masked for every row.
"""

import torch
from torch import Tensor, nn

from .common import Inputs, ReferenceOutput, mean, presence, require_one_modality, take, task_loss
from .encoder import ReferenceEncoder


def vicreg(predicted: Tensor, real: Tensor) -> Tensor:
    """VICReg (Bardes et al., arXiv 2105.04906, equations 1-6) of predicted, real [N, d]; `real` gets no gradient.

        25 mean (p - r)^2 + 25 mean_i relu(1 - sqrt(var_i(p) + 1e-4)) + (1 / d) sum_{i != k} cov_ik(p)^2

    Variance and covariance are of the predicted side, over samples, unbiased (N - 1). At least in float32. Fewer than
    two samples: 0.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    predicted, real = predicted.to(dtype), real.detach().to(dtype)
    samples, width = predicted.shape
    if samples < 2:
        return predicted.sum() * 0
    invariance = (predicted - real).square().mean()
    variance = (1 - (predicted.var(dim=0, unbiased=True) + 1e-4).sqrt()).relu().mean()
    centred = predicted - predicted.mean(dim=0)
    covariance = centred.T @ centred / (samples - 1)  # [d, d]
    off_diagonal = covariance - covariance.diagonal().diag()
    return 25 * invariance + 25 * variance + off_diagonal.square().sum() / width


class ReferenceJointEmbedding(nn.Module):
    """Frozen encoders tuned by BitFit or LoRA; `prompts[m]` [K, D_m]; `predictor[m][j]` an MLP D_m -> D_m -> D_j.

    tuning: "bitfit", or the keyword arguments of `ReferenceEncoder.add_lora`.
    late_fusion: "concat" (one Linear on the concatenated embeddings) or "average" (one Linear per modality, logits
    averaged over all modalities, real or predicted).
    The prompts start as N(0, 0.02): an oracle is given its parameters.
    """

    def __init__(
        self,
        encoders: dict[str, nn.Module],
        num_labels: int,
        read_only_prompts: int = 4,
        tuning: str | dict = "bitfit",
        late_fusion: str = "concat",
        vicreg_weight: float = 0.1,
        problem_type: str | None = None,
    ):
        super().__init__()
        self.modalities, self.vicreg_weight, self.problem_type = list(encoders), vicreg_weight, problem_type
        self.encoders = nn.ModuleDict({m: ReferenceEncoder(model) for m, model in encoders.items()})
        for encoder in self.encoders.values():
            if isinstance(tuning, dict):
                encoder.add_lora(**tuning)
            else:
                encoder.train_biases()
        widths = {m: encoder.width for m, encoder in self.encoders.items()}
        self.prompts = nn.ParameterDict({m: 0.02 * torch.randn(read_only_prompts, d) for m, d in widths.items()})
        self.predictor = nn.ModuleDict()
        for m, d in widths.items():
            mlps = {j: nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, e)) for j, e in widths.items() if j != m}
            self.predictor[m] = nn.ModuleDict(mlps)
        if late_fusion == "concat":
            self.head = nn.Linear(sum(widths.values()), num_labels)
        else:
            self.head = nn.ModuleDict({m: nn.Linear(d, num_labels) for m, d in widths.items()})

    def forward(
        self, inputs: Inputs, modality_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ReferenceOutput:
        """modality_mask bool [B, M], True = present."""
        present = presence(inputs, self.modalities, modality_mask)
        require_one_modality(present)
        real, predicted = self.encode(inputs, present)
        samples = range(len(present))
        embeddings = {m: torch.stack([self.embedding(m, b, real, predicted) for b in samples]) for m in self.modalities}
        logits = self.classify(embeddings)
        if labels is None:
            return ReferenceOutput(logits)
        task, align = task_loss(logits, labels, self.problem_type), self.prediction_loss(real, predicted)
        return ReferenceOutput(logits, task + self.vicreg_weight * align, task, align)

    def encode(self, inputs: Inputs, present: Tensor) -> tuple[dict, dict]:
        """real[m, b] = e_m [D_m] and predicted[m, j, b] = e^_{m->j} [D_j] of sample b, for the present (m, b)."""
        real, predicted = {}, {}
        for column, m in enumerate(self.modalities):
            rows = present[:, column].nonzero().flatten()
            if len(rows) == 0:
                continue
            dtype = self.prompts[m].dtype
            class_tokens, prompt_rows = self.encoders[m].read(take(inputs[m], rows), self.prompts[m], read_only=True)
            for place, b in enumerate(rows.tolist()):
                real[m, b] = class_tokens[place].to(dtype)
                for j, mlp in self.predictor[m].items():
                    predicted[m, j, b] = mlp(prompt_rows[place].to(dtype).mean(dim=0))
        return real, predicted

    def embedding(self, j: str, b: int, real: dict, predicted: dict) -> Tensor:
        """e_j of sample b, or where j is missing the mean of its predictions."""
        if (j, b) in real:
            return real[j, b]
        return mean([predicted[m, j, b] for m in self.modalities if (m, b) in real])

    def classify(self, embeddings: dict[str, Tensor]) -> Tensor:
        if isinstance(self.head, nn.Linear):
            return self.head(torch.cat([embeddings[m] for m in self.modalities], dim=1))
        return mean([self.head[m](embeddings[m]) for m in self.modalities])

    def prediction_loss(self, real: dict, predicted: dict) -> Tensor:
        """Sum over ordered pairs (m, j) of VICReg over the samples that have both."""
        total = self.prompts[self.modalities[0]].new_zeros(())
        for m in self.modalities:
            for j in self.predictor[m]:
                both = [b for source, b in real if source == m and (j, b) in real]
                if both:
                    pairs = [(predicted[m, j, b], real[j, b]) for b in both]
                    total = total + vicreg(*(torch.stack(side) for side in zip(*pairs, strict=True)))
        return total
