"""JointEmbedding: read-only prompts that predict the embedding of what is missing (arXiv 2407.12616)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..encoders import Encoder
from ..encoders.frozen import add_adapters
from ..lora_config import LoraConfig, read_lora
from ..padding import Padding
from .base import MultimodalModel, PaddingMasks
from .config import MultimodalConfig, Option, check_choice, check_count


class JointEmbeddingConfig(MultimodalConfig):
    model_type = "joint_embedding"


@dataclass
class JointEncoded:
    """Per modality, in modality order: its class token and the mean of its prompt rows, `[B, D_m]`; zeros if absent."""

    class_tokens: list[Tensor]
    read: list[Tensor]


class JointEmbedding(MultimodalModel):
    """Late fusion of frozen encoders, where a missing embedding is predicted by what is there.

    ::

        [CLS_m ; X_m ; P_m] -> encoder m -> c_m (class token), r_m (mean of the prompt rows)     P_m seen by nobody
        e_j = c_j where j is present, else the mean of predictor_{m->j}(r_m) over the present m
        logits = W [e_1 ; ... ; e_M] + b                           predictor: Linear(d -> d), GELU, Linear(d -> d')
        loss = task + vicreg_weight * sum_{m != j} VICReg(predictor_{m->j}(r_m), c_j) over samples that have both

    Args:
        encoders: `{modality: Hugging Face encoder, hub id, folder or Encoder}`; their order is the modality order.
        num_labels: C.
        problem_type: as in Hugging Face's classifiers; None: told from the labels.
        read_only_prompts: K rows per modality; the number is ours.
        tuning: `"bitfit"`: every bias inside the blocks trains, LayerNorm's included; or a `LoraConfig` (or PEFT's).
        fusion: `"concat"`, or `"average"`: one head per modality, logits averaged (which of the two is ours).
        vicreg_weight: ours.
        quantization: how frozen linears are stored, see `u2a_fast.quantization`; None: as they came.
        all_absent: `"error"`; there is no `"prior"`, since a prediction needs one modality to start from.
        processors: `{modality: processor}` for raw samples; by default loaded from the encoders' folders.
        label_smoothing: of the cross entropy, while training; see `U2A`.

    Raises:
        ValueError: no prompts, an unknown tuning or fusion, BitFit where there are no biases, or `all_absent="prior"`.

    Source: the paper's abstract and its read-only prompts (RPO, ICCV 2023); no public code exists, so the predictor's
    shape and VICReg's use are ours. Prompts start at the class embedding plus noise of length 0.1 (RPO), or, where the
    embedding stage has none of its own (text, audio), as N(0, 0.02) (ours).

    >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> text = BertModel(BertConfig(vocab_size=9, **sizes))
    >>> image = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = JointEmbedding({"image": image, "text": text}, num_labels=3)
    >>> present = torch.tensor([[True, True], [False, True]])
    >>> model(image={"pixel_values": torch.randn(2, 3, 8, 8)}, text={"input_ids": torch.ones(2, 4).long()},
    ...       modality_mask=present).logits.shape
    torch.Size([2, 3])
    """

    config_class = JointEmbeddingConfig
    all_absent = Option("error".__eq__, '"error", since a prediction needs something present')
    vicreg_weight = Option(lambda value: value >= 0, "at least 0")

    def __init__(
        self,
        encoders: Mapping[str, str | nn.Module],
        num_labels: int,
        problem_type: str | None = None,
        read_only_prompts: int = 4,
        tuning: str | LoraConfig = "bitfit",
        fusion: str = "concat",
        vicreg_weight: float = 0.1,
        quantization: Any = None,
        all_absent: str = "error",
        processors: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
    ):
        check_count("read_only_prompts", read_only_prompts, 1)
        if isinstance(tuning, str) and tuning != "bitfit":
            raise ValueError(f'tuning must be "bitfit" or a LoraConfig, not {tuning!r}')
        check_choice("fusion", fusion, ("concat", "average"))
        lora = None if tuning == "bitfit" else read_lora(tuning)
        super().__init__(
            encoders,
            num_labels,
            problem_type,
            quantization,
            processors,
            all_absent=all_absent,
            label_smoothing=label_smoothing,
            read_only_prompts=read_only_prompts,
            tuning=lora.to_dict() if lora else "bitfit",
            fusion=fusion,
            vicreg_weight=vicreg_weight,
        )
        add_adapters(self.encoders.values(), lora)
        if lora is None:
            train_biases(self.encoders.values())
        widths = {name: encoder.width for name, encoder in self.encoders.items()}
        self.prompts = nn.ParameterDict({m: initial_prompts(e, read_only_prompts) for m, e in self.encoders.items()})
        self.predictor = nn.ModuleDict()
        for m, d in widths.items():
            mlps = {j: nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, e)) for j, e in widths.items() if j != m}
            self.predictor[m] = nn.ModuleDict(mlps)
        if fusion == "concat":
            self.head = nn.Linear(sum(widths.values()), num_labels)
        else:
            self.head = nn.ModuleDict({m: nn.Linear(d, num_labels) for m, d in widths.items()})
        self.post_init()

    @classmethod
    def recipe(cls, options: Any) -> dict[str, Any]:
        return {"tuning": options.lora if options.tuning == "lora" else options.tuning}

    @property
    def auxiliary_weight(self) -> float:
        return self.vicreg_weight

    def encode(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None = None
    ) -> JointEncoded:
        """Both readings of every modality, on the rows that are present only."""
        rows, encoded = self.rows(inputs, present, padding), JointEncoded([], [])
        for name, encoder in self.encoders.items():
            readings = [self.prompts[name].new_zeros(len(present), encoder.width)] * 2
            if name in rows:
                own = self.read(name, *rows[name].embed(encoder))
                readings = [rows[name].spread(reading, len(present)) for reading in own]
            encoded.class_tokens.append(readings[0])
            encoded.read.append(readings[1])
        return encoded

    def read(self, name: str, tokens: Tensor, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """tokens `[b, S, D]` -> class token and mean of the prompt rows, after the last norm: `[b, D]` each."""
        encoder, prompts = self.encoders[name], self.prompts[name]
        layout = encoder.layout_of(tokens, padding, behind=len(prompts))
        rows, readers = layout.pack(tokens), prompts.to(tokens.dtype)[None]  # [1, K, D]; [b, K, D] after a block
        *below, last = encoder.blocks
        for block in below:
            rows, readers = block(rows, layout, None, None, readers)
        if encoder.reads_all:
            rows, readers = last(rows, layout, None, None, readers)
            hidden = encoder.finish(layout.unpack(rows, tokens.shape[:2]))
            class_token = encoder.class_token(hidden, padding and padding.mask)
        else:
            rows, readers = last(rows, layout, readers=readers, reads=encoder.family.class_token)
            class_token = layout.of_each(encoder.finish(rows), 1)[:, 0]
        read = layout.of_each(encoder.finish(readers), len(prompts))
        return class_token.to(prompts.dtype), read.to(prompts.dtype).mean(dim=1)

    def fuse(self, encoded: JointEncoded, present: Tensor) -> tuple[Tensor, Tensor]:
        """present `[B, M]` may mark less than was encoded, never more."""
        embeddings, loss = [], 0
        (on_host,), device = host.to_host(present), encoded.read[0].device
        present = host.send(present, device)
        for j, target in enumerate(self.config.modalities):
            real, total = encoded.class_tokens[j], 0
            sources = [i for i in range(present.shape[1]) if i != j]
            for i in sources:
                predicted = self.predictor[self.config.modalities[i]][target](encoded.read[i])  # [B, D_j]
                both = host.send((on_host[:, i] & on_host[:, j]).nonzero().flatten(), device)
                loss = loss + vicreg(predicted[both], real[both])
                total = total + torch.where(present[:, i, None], predicted, 0)
            mean = total / present[:, sources].sum(dim=1, keepdim=True).clamp(min=1)
            embeddings.append(torch.where(present[:, j, None], real, mean.to(real.dtype)))
        return self.classify(embeddings), loss

    def classify(self, embeddings: list[Tensor]) -> Tensor:
        """One `[B, D_m]` per modality -> logits `[B, C]`."""
        if isinstance(self.head, nn.Linear):
            return self.head(torch.cat(embeddings, dim=1))
        logits = [head(own) for head, own in zip(self.head.values(), embeddings, strict=True)]
        return torch.stack(logits).mean(dim=0)


def vicreg(predicted: Tensor, real: Tensor) -> Tensor:
    """VICReg (Bardes et al., arXiv 2105.04906) of predicted `[N, d]` against real, which gets no gradient.

    ::

        25 mean (p - r)^2 + 25 mean_i relu(1 - sqrt(var_i + 1e-4)) + (1 / d) sum_{i != k} cov_ik^2

    Variance and covariance are of the predicted side, over samples, unbiased. In fp32 at least, whatever autocast says;
    below two samples a zero that hangs on the graph.

    >>> vicreg(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))  # variance 2: only the first term
    tensor(12.5000)
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    predicted, real = predicted.to(dtype), real.detach().to(dtype)
    samples, width = predicted.shape
    if samples < 2:
        return predicted.sum() * 0
    with torch.autocast(predicted.device.type, enabled=False):
        centred = predicted - predicted.mean(dim=0)
        covariance = centred.T @ centred / (samples - 1)  # [d, d]
    variances = covariance.diagonal()
    invariance = (predicted - real).square().mean()
    variance = (1 - (variances + 1e-4).sqrt()).relu().mean()
    return 25 * invariance + 25 * variance + (covariance - variances.diag()).square().sum() / width


def train_biases(encoders: Iterable[Encoder]) -> None:
    """BitFit (arXiv 2106.10199): every bias inside the blocks trains, LayerNorm's included, in fp32 at least.

    Keys may have no bias beside queries that do (Whisper, DINOv3); ours are zeros, and train. Where positions do not
    turn keys, they cannot change what attention gives.

    Raises:
        ValueError: an encoder without any, in which nothing would train (Llama, ModernBERT).
    """
    for encoder in encoders:
        modules = [module for block in encoder.blocks for module in (*block.linears, *block.norms)]
        biased = [module for module in modules if module.bias is not None]
        if not biased:
            raise ValueError(
                f'tuning="bitfit" would train nothing in a {encoder.family.name} encoder, which has no biases: '
                "pass tuning=LoraConfig(), on the command line --tuning lora"
            )
        for module in biased:
            bias = module.bias.detach()
            module.bias = nn.Parameter(bias.to(torch.promote_types(bias.dtype, torch.float32)))


def initial_prompts(encoder: Encoder, count: int) -> nn.Parameter:
    """`[count, D]`: the class embedding plus noise of length 0.1; without one, N(0, 0.02)."""
    noise = torch.randn(count, encoder.width)
    for name, parameter in encoder.stem.named_parameters():
        if name.endswith(("cls_token", "class_embedding")):
            return nn.Parameter(parameter.detach().float().view(1, -1) + 0.1 * noise / noise.norm(dim=1, keepdim=True))
    return nn.Parameter(0.02 * noise)
