"""One request costs what is in it; models go to the hub and come back from there with all that they need."""

import itertools
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import tiny_data
import torch
from torch.utils.flop_counter import FlopCounterMode

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, load_model
from u2a_fast.encoders import streaming
from u2a_fast.methods import saved
from u2a_fast.prediction import predict_answers

METHODS = [U2A, PMF, JointEmbedding, LateFusion]
HUB_ID = "somebody/colours"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_data.encoder_folders(tmp_path_factory.mktemp("encoders"))


def make(method, folders):
    return method(folders, num_labels=3, processors=tiny_data.processors()).eval()


def cost(model, sample):
    """Samples that each encoder embeds, and multiplications of the whole, for one request."""
    seen, own = {}, {}
    for name, encoder in model.encoders.items():
        own[name] = encoder.embed

        def counting(name=name, **inputs):
            seen[name] = seen.get(name, 0) + next(iter(inputs.values())).shape[0]
            return own[name](**inputs)

        encoder.embed = counting
    try:
        with FlopCounterMode(display=False) as counter:
            model.predict([sample])
    finally:
        for encoder in model.encoders.values():
            del encoder.embed
    return {name: count for name, count in seen.items() if count}, counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_request_costs_only_what_is_in_it(method, folders):
    model = make(method, folders).requires_grad_(False)  # the counter hooks gradients
    both = tiny_data.samples(1)[0]
    rows, whole = cost(model, both)
    assert rows == {"text": 1, "image": 1}
    parts = {}
    for name in ("text", "image"):
        alone, parts[name] = cost(model, {name: both[name]})
        assert alone == {name: 1}
        assert cost(model, {name: both[name], "label": None, ("image", "text")[name == "image"]: None})[0] == alone
    assert 0 < parts["text"] < whole and 0 < parts["image"] < whole
    if method is not PMF:  # whose missing modalities still say what their prompts say, as many rows as these inputs
        assert parts["text"] + parts["image"] < 1.2 * whole, parts


def test_a_handler_is_two_lines(folders, tmp_path):
    """What docs/serving.md puts behind a framework's decorator: `load_model` once, `predict_answers` a request."""
    make(U2A, folders).save_pretrained(tmp_path / "mine")
    model = load_model(tmp_path / "mine")

    def predict(text: str | None = None, image: bytes | None = None) -> dict:
        (answer,) = predict_answers(model, [{"text": text, "image": image}])
        return answer

    tiny_data.samples(1)[0]["image"].save(tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    for request in ({"text": "red square"}, {"image": picture}, {"text": "red", "image": picture}):
        answer = predict(**request)
        assert answer["label"] in model.config.label2id and 0 < answer["probability"] <= 1 and len(answer["top"]) == 3
    assert predict() == {} and predict(image=b"no picture") == {}


@pytest.mark.slow
def test_requests_in_threads_are_answered_as_alone(folders, monkeypatch):
    """Frameworks run a handler in as many threads as there are requests."""
    model = make(U2A, folders)
    requests = [{"text": "red square thing " * count} for count in range(1, 9)] * 3
    alone = [model.predict([request]) for request in requests]
    delays = itertools.cycle((0.0, 0.003, 0.007, 0.001, 0.013))  # or all threads keep in step
    set_both = type(model.processors["text"]).set_truncation_and_padding

    def slowly(self, *given, **named):
        set_both(self, *given, **named)
        time.sleep(next(delays))

    monkeypatch.setattr(type(model.processors["text"]), "set_truncation_and_padding", slowly)
    with ThreadPoolExecutor(8) as pool:
        torch.testing.assert_close([*pool.map(lambda request: model.predict([request]), requests)], alone)


class Hub:
    """A folder in the place of huggingface.co: what is uploaded there can be asked for again."""

    def __init__(self, root, monkeypatch):
        self.root, self.asked = root, []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", self.file_exists)
        for module in (saved, streaming):
            monkeypatch.setattr(module, "cached_file", self.cached_file)
        monkeypatch.setattr(saved, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(socket.socket, "connect", self.connect)

    def connect(self, *address):
        raise AssertionError(f"the network was used: {address}")

    def create_repo(self, repo_id, private, exist_ok):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id, name, revision):
        return (self.root / repo_id / name).exists()

    def upload_folder(self, repo_id, folder_path, **commit):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def cached_file(self, source, name, _raise_exceptions_for_missing_entries=True):
        self.asked.append(name)
        file = self.root / str(source) / name
        if not file.exists() and _raise_exceptions_for_missing_entries:
            raise OSError(f"{source} has no {name}")
        return str(file) if file.exists() else None

    def snapshot_download(self, source, allow_patterns):
        self.asked += allow_patterns
        return str(self.root / source)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_model_goes_to_the_hub_and_comes_back_with_its_processors(method, folders, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    model = make(method, folders)
    with pytest.warns(UserWarning, match="on this machine alone") as caught:
        assert model.push_to_hub(HUB_ID, private=True).endswith("/commit/1")
    assert sum("on this machine alone" in str(warning.message) for warning in caught) == 2
    uploaded = {str(path.relative_to(tmp_path / HUB_ID)) for path in (tmp_path / HUB_ID).rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "README.md", "processors/text/tokenizer.json"} <= uploaded
    assert "library_name: u2a_fast" in (tmp_path / HUB_ID / "README.md").read_text()
    assert "base_model" not in (tmp_path / HUB_ID / "README.md").read_text(), "folders of this machine"
    again = load_model(HUB_ID, encoders=dict(model.encoders))
    assert hub.asked[-1] == "processors/*"
    again.config.encoders = dict.fromkeys(again.config.encoders, "")  # nowhere else to take a processor from
    rows = [{"text": "red thing"}, *tiny_data.samples(2)]
    assert torch.equal(again.predict(rows), model.predict(rows))


@pytest.mark.slow
def test_a_shard_of_the_hub_is_asked_for_by_name(folders, tmp_path, monkeypatch):
    hub, model = Hub(tmp_path, monkeypatch), make(U2A, folders)
    with pytest.warns(UserWarning):
        model.push_to_hub(HUB_ID, max_shard_size="2KB")
    again = U2A.from_pretrained(HUB_ID)
    rows = [{"text": "red thing"}, *tiny_data.samples(2)]
    assert torch.equal(again.predict(rows), model.predict(rows))
    assert sum(name.endswith(".safetensors") for name in hub.asked) > 2


@pytest.mark.filterwarnings("ignore:the .* encoder is on this machine alone")
def test_a_card_that_is_there_stays(folders, tmp_path, monkeypatch):
    Hub(tmp_path, monkeypatch)
    model, card = make(U2A, folders), tmp_path / HUB_ID / "README.md"
    model.push_to_hub(HUB_ID)
    card.write_text("what somebody wrote")
    model.push_to_hub(HUB_ID)
    assert card.read_text() == "what somebody wrote"


@pytest.mark.filterwarnings("ignore:the .* encoder is on this machine alone")
def test_saving_with_push_to_hub_uploads_processors_too(folders, tmp_path, monkeypatch):
    Hub(tmp_path / "hub", monkeypatch)
    make(U2A, folders).save_pretrained(tmp_path / "here", push_to_hub=True, repo_id=HUB_ID, private=True)
    for place in (tmp_path / "here", tmp_path / "hub" / HUB_ID):
        assert {path.name for path in (place / "processors").iterdir()} == {"text", "image"}
