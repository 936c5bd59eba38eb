"""What U2A, PMF and JointEmbedding share: encoders, presence masks, losses, saving and loading."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import host
from ..encoders.fingerprint import differ, fingerprint
from ..encoders.frozen import check_storage, mode_of, quantize_encoder, stored_elements
from ..quantization import read_quantization
from .adapters import Adapters
from .captured import CapturedSteps, PaddingMasks
from .checkpointing import Checkpointing
from .config import MultimodalConfig, MultimodalOutput, Option, check_choice
from .hub import Hub, dtypes_of
from .label_scale import into_head, scale_from
from .loading import (
    as_encoder,
    check_overrides,
    check_parts,
    fitted_processor,
    load_processor,
    overlay,
    saved_processors,
)
from .presence import Rows, all_take_part, check_modalities, nobody, presence, present_rows, refuse_empty
from .saved import saved_config, saved_state
from .tasks import Tasks
from .trained import Trained

logger = logging.getLogger(__name__)

CHANGED = (
    "the encoders of %s have other weights than those that the model was trained with, which were changed before, or "
    "those under their name since: pass encoders={%r: ...} with the ones that are meant"
)
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


class MultimodalModel(Adapters, CapturedSteps, Checkpointing, Hub, Tasks, Trained, PreTrainedModel):
    """Frozen encoders under one head. Subclasses say what `encode` keeps of each sample and how `fuse` classifies it.

    `encode` looks at each sample once and never at which other modalities it has, so that every missing-modality
    scenario can be evaluated from one pass over the encoders.

    Attributes:
        loss: a function `(logits [B, C], labels) -> scalar` in place of the task's own loss, or None. The alignment
            loss is added to it all the same, which Trainer's `compute_loss_func` would lose; it is not saved.
    """

    config_class = MultimodalConfig
    main_input_name = "modality_mask"  # a tensor of the batch, as Trainer counts its elements
    accepts_loss_kwargs = False  # or Trainer passes num_items_in_batch as if it were a modality
    _no_split_modules = ["Block"]
    min_modalities = 2
    baseline = False  # whether it stands for what there was before: `compare` runs it on request only

    all_absent = Option(("error", "prior").__contains__, 'one of ["error", "prior"]')
    label_smoothing = Option(lambda value: 0 <= value < 1, "at least 0 and below 1")

    def __init__(
        self,
        encoders: Mapping[str, str | nn.Module],
        num_labels: int,
        problem_type: str | None,
        quantization: Any,
        processors: Mapping[str, Any] | None,
        **arguments: Any,
    ):
        for name, value in arguments.items():
            if isinstance(option := getattr(type(self), name, None), Option):
                option.check(value)
        check_parts(encoders, num_labels)
        if problem_type is not None:
            check_choice("problem_type", problem_type, PROBLEM_TYPES)
        if len(encoders) < self.min_modalities:
            raise ValueError(
                f"{type(self).__name__} needs {self.min_modalities} encoders or more, not {len(encoders)}: LateFusion "
                "takes one, on the command line --method late_fusion, in a comparison --methods '[\"late_fusion\"]'"
            )
        check_modalities(processors or (), list(encoders))
        modes = read_quantization(quantization, encoders)
        built = {name: as_encoder(name, given, None, modes[name]) for name, given in encoders.items()}
        for name, encoder in built.items():
            check_storage(encoder, modes[name])
        prints = {name: fingerprint(encoder) for name, encoder in built.items()}
        stored = {name: mode_of(quantize_encoder(encoder, modes[name])) for name, encoder in built.items()}
        config = self.config_class(
            modalities=list(built),
            encoders={name: encoder.name_or_path for name, encoder in built.items()},
            encoder_dtypes=dtypes_of(built),
            encoders_in_8bit=[name for name, encoder in built.items() if encoder.loaded_in_8bit],
            fingerprints=prints,
            arguments={**arguments, "quantization": stored if any(stored.values()) else None},
            num_labels=num_labels,
            problem_type=problem_type,
        )
        super().__init__(config)
        self.encoders = nn.ModuleDict(built)
        self.loss: Callable[[Tensor, Tensor], Tensor] | None = None
        self._processors: dict[str, Any] = {}
        self.processors = processors or {}

    # -------------------------------------------------------------------------------------------- what a method says
    def encode(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None = None
    ) -> Any:
        """Everything that `fuse` needs of a batch; rows of absent modalities hold anything.

        Args:
            present: bool `[B, M]`, on the CPU or, at the cost of waiting for it, on a device.
            padding: the encoders' `padding_mask` by modality, on the CPU, where they are there already.
        """
        raise NotImplementedError

    def fuse(self, encoded: Any, present: Tensor) -> tuple[Tensor, Tensor]:
        """`encode`'s result and `present` as it took it -> logits `[B, C]` and the auxiliary loss (scalar)."""
        raise NotImplementedError

    @property
    def auxiliary_weight(self) -> float:
        """Of the auxiliary loss."""
        return 0.0

    @property
    def static_shapes(self) -> bool:
        """Whether every row runs, so that nothing depends on values of the batch."""
        return False

    def drop_modalities(self, present: Tensor) -> Tensor:
        """Presence as a training step sees it; the default drops nothing."""
        return present

    @classmethod
    def recipe(cls, options: Any) -> dict[str, Any]:
        """Constructor arguments for the `TrainOptions` that are this method's own."""
        raise NotImplementedError(f"{cls.__name__} does not say which options of training it takes: define its recipe")

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(
        self,
        modality_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        on_host: Mapping[str, Any] | None = None,
        **inputs: Mapping[str, Any],
    ) -> MultimodalOutput | tuple:
        """One keyword per modality holds that encoder's inputs, for example `image={"pixel_values": ...}`.

        Args:
            modality_mask: bool `[B, M]` in the order of `config.modalities`, True = present; None: all present. A
                modality without a keyword is absent. Inputs of absent rows may hold anything, NaN included.
            labels: `[B]` class indices, or `[B, C]` floats for multi-label and regression problems.
            on_host: arrays that equal those of the other arguments that lie on a device, as `data.HostCopies` adds
                them to a batch.

        Values are checked too (a sample with nothing present, a label out of range), and kernels are chosen by them:
        those that lie on a device come over in one copy a step, which waits for the device; those on the CPU, as the
        collator leaves them or in `on_host`, cost nothing. With static shapes (`absent="where"`) nothing waits, so that
        values on a device go unchecked.

        Raises:
            ValueError: unknown modality, mask of another shape, a sample with nothing present, label out of range.
            TypeError: a mask that is not bool.
        """
        copies = host.tensors(on_host or {})
        present, padding = presence(self.config.modalities, inputs, copies.get("modality_mask", modality_mask)), None
        inputs = {name: values for name, values in inputs.items() if any(map(torch.is_tensor, values.values()))}
        if labels is not None:
            self.check_labels(labels, len(present))
        if not self.static_shapes:
            known = {name: {**values, **copies.get(name, {})} for name, values in inputs.items()}
            (present, checked), padding = self._to_host(known, present, copies.get("labels", labels))
            if labels is not None:
                self.check_labels(checked, len(present))
        settled = labels is None or self.config.problem_type is not None
        if not settled and self.training and not torch.compiler.is_compiling():
            self.config.problem_type = self.problem_type(labels)  # or a saved model would not know
        if self.all_absent == "error" and host.readable(present):
            refuse_empty(present)
        if self._steps is not None and labels is not None and torch.is_grad_enabled():
            losses = self._captured(inputs, present, padding, labels)
        else:
            present = self._left(present)
            losses = self.losses(self.encode(inputs, present, padding), present, labels)
        names = ("loss", "logits", "task_loss", "align_loss") if labels is not None else ("logits",)
        output = MultimodalOutput(**dict(zip(names, losses, strict=True)))
        return output.to_tuple() if return_dict is False else output

    def losses(self, encoded: Any, present: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        """What `fuse` makes of a batch: (loss, logits, task_loss, align_loss), or (logits,) without labels."""
        logits, auxiliary = self.fuse(encoded, present)
        if labels is None:
            return (logits,)
        if self.problem_type(labels) != "single_label_classification":
            labels = labels.reshape(logits.shape)  # a loss of [B] and [B, 1] would compare each with each
        else:
            labels = labels.long()  # torch's own losses take no other
        task = (self.loss or self.task_loss)(logits, labels)
        return task + self.auxiliary_weight * auxiliary, logits, task, auxiliary

    def _left(self, present: Tensor) -> Tensor:
        return self.drop_modalities(present) if self.training else present

    def _to_host(
        self, inputs: Mapping[str, Mapping[str, Any]], *tensors: Tensor | None
    ) -> tuple[list[Any], PaddingMasks]:
        """The tensors, and the padding mask of every modality, on the CPU, in one copy."""
        masks = {name: self.encoders[name].padding_mask(**values) for name, values in inputs.items()}
        copies = host.to_host(*tensors, *masks.values())
        return copies[: len(tensors)], dict(zip(masks, copies[len(tensors) :], strict=True))

    def rows(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None = None
    ) -> dict[str, Rows]:
        """The samples of each modality that the batch holds inputs of; of all while processes train together."""
        if padding is None:
            (present,), padding = self._to_host(inputs, present)
        here = zip(self.config.modalities, present.unbind(1), strict=True)
        found = {name: present_rows(inputs[name], rows, padding[name]) for name, rows in here if name in inputs}
        for name, own in found.items():
            if len(own.index) and any(torch.is_tensor(value) and not value.numel() for value in own.inputs.values()):
                raise ValueError(f"{name} is marked present and its inputs are empty: mark it absent in modality_mask")
        return {name: nobody(self.device) for name in self.encoders} | found if all_take_part() else found

    # -------------------------------------------------------------------------------------------------- raw samples
    @property
    def processors(self) -> dict[str, Any]:
        """`{modality: processor}` in modality order, loaded from the encoders' own folders where none was given.

        Setting it replaces those that are named and keeps the others. A tokenizer's limit is lowered to what its
        encoder takes, and a video's frames are as many as that takes.

        Raises:
            ValueError: a modality has no processor and its encoder no folder to load one from; an unknown modality.
        """
        return self._processors_of(self.config.modalities)

    @processors.setter
    def processors(self, processors: Mapping[str, Any]) -> None:
        check_modalities(processors, self.config.modalities)
        for name, processor in processors.items():
            self._processors[name] = fitted_processor(processor, self.encoders[name])

    def _processors_of(self, names: Sequence[str]) -> dict[str, Any]:
        for name in names:
            if name not in self._processors:
                self.processors = {name: load_processor(name, self.config.encoders[name])}
        return {name: self._processors[name] for name in names}

    @torch.no_grad()
    def predict(self, samples: Iterable[Mapping[str, Any] | str], batch_size: int = 32) -> Tensor:
        """Raw samples -> logits `[N, C]`; an absent key, None, NaN or a broken file is a missing modality.

        Args:
            samples: dictionaries in a list, data set, DataFrame, stream or generator; strings are texts, or cells of a
                model's only modality.

        Raises:
            ValueError: a sample has no modality at all, or there is no processor for one it has.
            TypeError: something else than samples.
        """
        from ..data import MultimodalCollator, is_absent
        from ..data.presence import batches_of, in_rows, samples_for

        modalities = self.config.modalities
        logits: list[Tensor] = []
        with evaluating(self):
            for chosen in batches_of(samples_for(samples, modalities), batch_size):
                named = [name for name in modalities if any(not is_absent(sample.get(name)) for sample in chosen)]
                collate = MultimodalCollator(self._processors_of(named or modalities))
                with in_rows(sum(len(part) for part in logits), len(chosen)):
                    batch = collate([{name: sample.get(name) for name in collate.modalities} for sample in chosen])
                    present = dict(zip(collate.modalities, batch.pop("modality_mask").unbind(1), strict=True))
                    nowhere = torch.zeros(len(chosen), dtype=torch.bool, device="cpu")
                    mask = torch.stack([present.get(name, nowhere) for name in modalities], dim=1)
                    logits.append(self(**to_device(batch, self.device), modality_mask=mask).logits)
        return torch.cat(logits) if logits else torch.empty(0, self.config.num_labels)

    # ------------------------------------------------------------------------------------------------- bookkeeping
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trained, all)` parameters, counted as PEFT counts them."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, sum(stored_elements(name, p) for name, p in self.named_parameters())

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_input_embeddings(self) -> None:
        return None  # the default raises on a composite model, and accelerate calls it unguarded

    def resize_token_embeddings(self, *given: Any, **options: Any) -> None:
        raise ValueError("a model of several encoders has no vocabulary: resize that of an encoder before you pass it")

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: constructors initialise what they make, and encoders arrive with their weights."""

    def _replicate_for_data_parallel(self) -> None:
        """Called by `nn.DataParallel`, whose copies have no parameters of their own."""
        raise ValueError(
            "nn.DataParallel is not supported: start one process a GPU, as `torchrun` does, or show one GPU"
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # ------------------------------------------------------------------------------------------- saving and loading
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        encoders: Mapping[str, str | nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> MultimodalModel:
        """Load the encoders by the names in the config, then overlay what was trained. In eval mode.

        Args:
            name_or_path: a folder written by `save_pretrained`, or a hub id.
            encoders: `{modality: module, id or folder}` for encoders that have no name in the config or moved.
            dtype: of the encoders; None: as they were when saved.
            overrides: constructor arguments to change, for example `quantization="int8"`.

        Raises:
            ValueError: an unknown argument, an encoder without a name, a file that is damaged or does not fit them.
        """
        check_overrides(cls, overrides)
        config = saved_config(cls, name_or_path)
        check_modalities(encoders or (), config.modalities)
        arguments = (
            {"num_labels": config.num_labels, "problem_type": config.problem_type} | config.arguments | overrides
        )
        modes = read_quantization(arguments.get("quantization"), config.modalities)
        built = {}
        for name in config.modalities:
            source = (encoders or {}).get(name, config.encoders[name])
            if not isinstance(source, nn.Module) and not source:
                raise ValueError(f"the {name} encoder was saved without a name: pass encoders={{{name!r}: ...}}")
            in_8bit = name in config.encoders_in_8bit and modes[name] in ("int8", "int8_w8a8")
            own = config.encoder_dtypes[name]
            read = getattr(torch, config.quantized_from.get(name, own) if modes[name] else own)
            if isinstance(source, nn.Module) and dtype is not None:
                source = copy.deepcopy(source).to(dtype)  # the caller's stays as it is
            encoder = as_encoder(name, source, dtype or read, modes[name], in_8bit)
            built[name] = quantize_encoder(encoder, modes[name])  # now: two encoders' float weights need not fit
            if read != getattr(torch, own) and dtype is None and not isinstance(source, nn.Module):
                built[name].to(getattr(torch, own))  # the integers are those of what was quantised
        model = cls(built, **arguments)
        now = model.config.fingerprints
        changed = [name for name in now if differ(config.fingerprints.get(name, ""), now[name])]
        if changed:
            logger.warning("%s: %s", name_or_path, CHANGED % (" and ".join(changed), changed[0]))
        model.config.fingerprints = {name: now[name] or config.fingerprints.get(name, "") for name in now}
        model.config.id2label, model.config.label2id = config.id2label, config.label2id
        model._restore_adapters(config.adapters)
        overlay(model, saved_state(name_or_path), str(name_or_path))
        if config.label_scale is not None:  # a checkpoint of a run that had not ended
            into_head(model.head, *scale_from(config.label_scale, config.num_labels))
        model.processors = saved_processors(name_or_path) | dict(overrides.get("processors") or {})
        return model.eval()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards for each part the mode that it had."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor of its nested dictionaries on `device`."""
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if torch.is_tensor(batch) else batch
