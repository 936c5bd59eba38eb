"""Models to a folder, and the whole of it, processors included, to the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch import nn

CARD = "README.md"
UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


class Hub(nn.Module):
    """Part of `MultimodalModel`. transformers uploads a folder's files and those one level below: no processor."""

    config: Any
    encoders: nn.ModuleDict
    _processors: dict[str, Any]

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **options: Any) -> None:
        """Write what was trained (safetensors), the config, and the processors that are known.

        With `push_to_hub`, `options` may hold the arguments of that method too; the repository is called as the folder
        is where no `repo_id` is given.
        """
        if options.get("variant"):
            raise ValueError(f"variant={options['variant']!r} is not read again: choose another folder instead")
        upload = {name: options.pop(name) for name in UPLOAD if push_to_hub and name in options}
        self.config.encoder_dtypes = dtypes_of(self.encoders)  # `to` may have changed them
        quantized = {name: encoder.quantized_from for name, encoder in self.encoders.items() if encoder.quantized_from}
        self.config.quantized_from = {name: str(dtype).removeprefix("torch.") for name, dtype in quantized.items()}
        super().save_pretrained(save_directory, **options)
        if options.get("is_main_process", True):
            for name, processor in self._processors.items():
                processor.save_pretrained(Path(save_directory) / "processors" / name)
            if push_to_hub:
                self.push_to_hub(**{"repo_id": Path(save_directory).name} | upload, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Save to a repository of the hub, from which `from_pretrained(repo_id)` reads it; its card, if any, stays.

        Encoders are not uploaded, their names are. It warns of one that is a folder of this machine.

        Args:
            repo_id: `"name"` or `"somebody/name"`; made where there is none.
            private, token, revision, create_pr: as in `huggingface_hub.HfApi`.
            options: of `save_pretrained`, for example `max_shard_size`.

        Returns:
            the address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        for name, source in self.config.encoders.items():
            if not source or Path(source).exists():
                warnings.warn(
                    f"the {name} encoder is on this machine alone ({source or 'it has no name'}): whoever loads "
                    f"{repo_id} elsewhere has to pass encoders={{{name!r}: ...}}",
                    stacklevel=2,
                )
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            if not api.file_exists(repo_id, CARD, revision=revision):
                self._card().save(os.path.join(folder, CARD))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit)

    def _card(self) -> ModelCard:
        """What the hub has to know; `u2a-fast train` writes the card of a run."""
        known = sorted({source for source in self.config.encoders.values() if source and not Path(source).exists()})
        about = ModelCardData(library_name="u2a_fast", base_model=known or None, tags=[self.config.model_type])
        names = ", ".join(self.config.modalities)
        return ModelCard(
            f"---\n{about.to_yaml()}\n---\n\nFrozen encoders of {names} under a {type(self).__name__} of "
            '[u2a-fast](https://pypi.org/project/u2a-fast/): `u2a_fast.load_model("name of this repository")`.\n'
        )


def dtypes_of(encoders: Mapping[str, Any] | nn.ModuleDict) -> dict[str, str]:
    """The dtype that each encoder computes in, by name."""
    return {name: str(encoder.dtype).removeprefix("torch.") for name, encoder in encoders.items()}
