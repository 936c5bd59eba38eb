"""Malformed models: arguments of constructors, folders of adapters and checkpoints, headers of safetensors files."""

import inspect
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import tiny_data
import torch
from malformed import ODD, cell, damage
from safetensors.torch import load_file, save_file

from u2a_fast import U2A, load_model
from u2a_fast.encoders import Encoder
from u2a_fast.methods import METHODS
from u2a_fast.tensor_files import TensorFiles, digest

PARTS = ("config.json", "model.safetensors", "processors/text/tokenizer_config.json", "processors/text/tokenizer.json")
PARTS += ("processors/image/preprocessor_config.json", "model.safetensors.index.json")
NUMBERS = (0, -1, 1, 2, 2.5, True, 10**9, 10**30, 1e308, -0.0, float("nan"), float("inf"))
WORDS = ("int8", "pack", "where", "prior", "error", "bitfit", "concat", "q", "u2a", "pmf", "text", "image", "auto_map")
PATHS = ("../x.safetensors", "/etc/passwd", "..\\x.safetensors", "evil.py", "pytorch_model.bin", "a/b.safetensors")


@dataclass(frozen=True)
class World:
    """What is made once for all cases: a model of whole encoders, a folder of it, and one of its adapters."""

    model: U2A
    saved: Path
    adapters: Path

    @property
    def encoders(self) -> dict[str, Encoder]:
        return dict(self.model.encoders)


def world(folder: Path) -> World:
    encoders = tiny_data.encoder_folders(folder)
    model = U2A(encoders, num_labels=3, processors=tiny_data.processors()).eval()
    model.save_pretrained(folder / "saved")
    model.save_adapters(folder / "adapters")
    return World(model, folder / "saved", folder / "adapters")


def value(draw: random.Random):
    return draw.choice((draw.choice(NUMBERS), draw.choice(WORDS), draw.choice(PATHS), draw.choice(ODD), cell(draw)))


def changed(draw: random.Random, given, depth: int = 4):
    """JSON with a value of some depth replaced, taken away, doubled or put in."""
    if isinstance(given, dict) and given and depth and draw.random() < 0.85:
        name = draw.choice(list(given))
        way = draw.randrange(8)
        if way == 0:
            return {key: part for key, part in given.items() if key != name}
        if way == 1:
            return given | {str(value(draw)): value(draw)}
        return given | {name: changed(draw, given[name], depth - 1)}
    if isinstance(given, list) and given and depth and draw.random() < 0.7:
        place = draw.randrange(len(given))
        return [*given[:place], changed(draw, given[place], depth - 1), *given[place + draw.randrange(2) :]]
    return value(draw)


def damage_json(draw: random.Random, path: Path) -> None:
    if draw.random() < 0.3:
        path.write_bytes(damage(draw, path.read_bytes()))
        return
    given = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw.randint(1, 2)):
        given = changed(draw, given)
    path.write_text(json.dumps(given, default=str), encoding="utf-8", errors="surrogatepass")


def damage_tensors(draw: random.Random, path: Path) -> None:
    """Its bytes, its header, or a tensor of another name, shape or type."""
    way = draw.randrange(4)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if way == 0:
        path.write_bytes(damage(draw, content))
    elif way == 1:
        path.write_bytes(damage(draw, content[: 8 + size]) + content[8 + size :])
    elif way == 2:
        header = json.dumps(changed(draw, json.loads(content[8 : 8 + size])), default=str).encode("utf-8", "replace")
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        tensors = load_file(path)
        name = draw.choice(list(tensors))
        shape = [draw.randrange(5) for _ in range(draw.randrange(4))]
        dtype = draw.choice((torch.float32, torch.int8, torch.complex64, torch.bool, torch.float8_e5m2))
        tensors[draw.choice((name, "../../x", "", "head.weight"))] = torch.zeros(shape).to(dtype)
        save_file(tensors, path)


def damage_part(draw: random.Random, path: Path) -> None:
    (damage_tensors if path.suffix == ".safetensors" else damage_json)(draw, path)


# --------------------------------------------------------------------------------------------------------------- cases
def try_constructor(draw: random.Random, folder: Path, given: World) -> None:
    method = draw.choice(list(METHODS.values()))
    names = [name for name in inspect.signature(method.__init__).parameters if name not in ("self", "processors")]
    arguments = {"encoders": given.encoders, "num_labels": 3}
    for name in draw.sample(names, draw.randint(0, 2)):
        arguments[name] = changed(draw, {"r": 4, "lora_alpha": 8}) if name == "lora" else value(draw)
    if draw.random() < 0.2:
        encoder = draw.choice((value(draw), given.encoders["text"]))
        encoder = f"./{encoder}" if isinstance(encoder, str) else encoder  # a bare word may be an id of the hub
        arguments["encoders"] = {**given.encoders, value_key(draw): encoder}
    method(**arguments)


def value_key(draw: random.Random):
    found = value(draw)
    return found if isinstance(found, str | int | float | None) else "x"


def try_adapter(draw: random.Random, folder: Path, given: World) -> None:
    shutil.copytree(given.adapters / "text", folder / "text")
    part = draw.choice(("adapter_config.json", "adapter_model.safetensors"))
    damage_part(draw, folder / "text" / part)
    model = U2A(given.encoders, num_labels=3)
    model.load_adapter(folder / "text", modality=draw.choice(("text", "text", "text", "image", "../text")))


def try_header(draw: random.Random, folder: Path, given: World) -> None:
    """A cache reads what it wrote, or nothing."""
    files, key = TensorFiles(folder / "cache"), digest("a")
    written = {"x": torch.arange(6.0).view(2, 3), "y": torch.arange(3)}
    files.write(key, written)
    (path,) = (folder / "cache").rglob("*.safetensors")
    damage_tensors(draw, path)
    found = files.read(key)
    if found is None:
        raise ValueError("nothing is there")
    assert found.keys() == written.keys() and all(torch.equal(found[name], written[name]) for name in found)


def try_checkpoint(draw: random.Random, folder: Path, given: World) -> None:
    shutil.copytree(given.saved, folder / "saved")
    if draw.random() < 0.2:
        (folder / "saved" / "model.safetensors").rename(folder / "saved" / "model-1.safetensors")
        names = load_file(folder / "saved" / "model-1.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
        (folder / "saved" / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = [folder / "saved" / part for part in PARTS if (folder / "saved" / part).exists()]
    damage_part(draw, draw.choice((parts[0], *parts)))
    load_model(folder / "saved", encoders=given.encoders)


def try_encoder(draw: random.Random, folder: Path, given: World) -> None:
    """An encoder's own folder, which transformers reads."""
    source = Path(given.model.config.encoders["text"])
    shutil.copytree(source, folder / "text")
    config = json.loads((folder / "text" / "config.json").read_text())
    if draw.random() < 0.3:
        config |= {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"}
        (folder / "text" / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').write('x')")
        (folder / "text" / "config.json").write_text(json.dumps(config))
    elif draw.random() < 0.2:
        torch.save({"x": torch.ones(1)}, folder / "text" / "pytorch_model.bin")
        (folder / "text" / "model.safetensors").unlink()
    else:
        damage_part(draw, folder / "text" / "model.safetensors")
    U2A({"text": str(folder / "text"), "image": given.encoders["image"]}, num_labels=3)


CASES = (try_constructor, try_adapter, try_header, try_checkpoint, try_encoder)
