"""With a cache batches are, bit for bit, what they are without; what it has is neither decoded nor processed again."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from u2a_fast.data import MultimodalCollator, processed_cache

NOISE = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)


class OtherProcessor(ViTImageProcessorPil):
    """Writes the same configuration as its parent."""


class CountingCollator(MultimodalCollator):
    """Notes what it decodes and what it processes."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.read_cells, self.processed = [], []

    def read(self, modality, value):
        self.read_cells.append(value)
        return super().read(modality, value)

    def _process(self, modality, values):
        self.processed += values
        return super()._process(modality, values)


def image_processor(kind=ViTImageProcessorPil, **options):
    return kind(**{"size": {"height": 8, "width": 8}, **options})


def png(number, height=12):
    """The bytes of a picture with structure, another one for every number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def wav(samples, rate=16_000):
    file = io.BytesIO()
    pytest.importorskip("soundfile").write(file, samples, rate, format="wav")
    return file.getvalue()


def same(got, expected):
    """Equal bits and dtypes in every nested tensor."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[name], value) for name, value in expected.items())
    return got.dtype == expected.dtype and torch.equal(got, expected)


def stored(folder):
    return sorted(folder.rglob("*.safetensors"))


def pictures(*numbers):
    return [{"image": None if number is None else png(number)} for number in numbers]


PROCESSORS = {
    "pictures": ("image", image_processor(), [png(0), png(1, height=30), None, png(0)]),
    "grey pictures": ("image", image_processor(image_mean=[0.5], image_std=[0.5]), [png(0), png(1)]),
    "Whisper": ("audio", WhisperFeatureExtractor(feature_size=8, chunk_length=1), [NOISE[:9000], None, NOISE]),
    "AST": ("audio", ASTFeatureExtractor(num_mel_bins=16, max_length=32), [NOISE[:9000], NOISE[:100], NOISE]),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_batches_are_the_same_with_an_empty_a_full_and_no_cache(case, tmp_path):
    modality, processor, cells = PROCESSORS[case]
    if modality == "audio":
        cells = [None if cell is None else wav(cell) for cell in cells]
    samples = [{modality: cell, "label": 0} for cell in cells]
    plain = MultimodalCollator({modality: processor})
    first, second = (CountingCollator({modality: processor}, cache=tmp_path) for _ in range(2))
    expected = plain(samples)
    assert same(first(samples), expected) and same(second(samples), expected)
    assert len(first.processed) == len(set(cells) - {None}) == len(stored(tmp_path))
    assert not second.processed and not [cell for cell in second.read_cells if cell is not None]
    assert plain.cut == first.cut == second.cut


def test_a_row_does_not_depend_on_the_batch_that_wrote_it(tmp_path):
    collate = CountingCollator({"image": image_processor()}, cache=tmp_path)
    collate(pictures(0, 1, 2))
    together = collate(pictures(2, None, 0))["image"]["pixel_values"]
    assert len(collate.processed) == 3
    for row, number in ((0, 2), (2, 0)):
        (alone,) = MultimodalCollator({"image": image_processor()})(pictures(number))["image"]["pixel_values"]
        assert torch.equal(together[row], alone)


FORMS = {
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "a name": str,
    "a path": lambda path: path,
    "a record with its path": lambda path: {"path": str(path), "bytes": None},
    "a record with its bytes": lambda path: {"path": "gone.png", "bytes": path.read_bytes()},
    "a copy under another name": lambda path: path.rename(path.with_name("moved.png")),
}


def test_a_string_under_bytes_is_no_name_of_a_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    assert processed_cache.file_digest({"path": None, "bytes": str(tmp_path / "a.png")}) is None


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_found_by_what_is_in_it(form, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png(0))
    collate = CountingCollator({"image": image_processor()}, cache=tmp_path / "cache")
    expected = collate(pictures(0))
    assert same(collate([{"image": FORMS[form](path)}]), expected)
    assert len(collate.read_cells) == 1


DECODED = {
    "a picture": ("image", lambda: Image.open(io.BytesIO(png(0)))),
    "a transparent picture": ("image", lambda: Image.new("RGBA", (5, 4), (1, 2, 3, 99))),
    "pixels": ("image", lambda: np.arange(48, dtype=np.uint8).reshape(4, 4, 3)),
    "samples": ("audio", lambda: NOISE),
    "a list of samples": ("audio", lambda: NOISE[:2000].tolist()),
    "samples beside a path": ("audio", lambda: {"path": __file__, "array": NOISE, "sampling_rate": 16_000}),
}


@pytest.mark.parametrize("form", DECODED)
def test_what_is_decoded_already_is_processed_once(form, tmp_path):
    modality, make = DECODED[form]
    processor = {"image": image_processor(), "audio": PROCESSORS["Whisper"][1]}[modality]
    collate = CountingCollator({modality: processor}, cache=tmp_path)
    expected = MultimodalCollator({modality: processor})([{modality: make()}])
    assert same(collate([{modality: make()}]), expected) and same(collate([{modality: make()}]), expected)
    assert len(collate.processed) == 1


CHANGES = {
    "another picture": (image_processor(), png(1)),
    "another size": (image_processor(size={"height": 4, "width": 4}), png(0)),
    "another mean": (image_processor(image_mean=[0.1, 0.2, 0.3]), png(0)),
    "another filter": (image_processor(resample=0), png(0)),
    "another class": (image_processor(OtherProcessor), png(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_result_is_a_miss(change, tmp_path):
    MultimodalCollator({"image": image_processor()}, cache=tmp_path)(pictures(0))
    processor, cell = CHANGES[change]
    collate = CountingCollator({"image": processor}, cache=tmp_path)
    assert same(collate([{"image": cell}]), MultimodalCollator({"image": processor})([{"image": cell}]))
    assert len(collate.processed) == 1 and len(stored(tmp_path)) == 2


def test_a_processor_that_is_changed_later_is_noticed(tmp_path):
    collate = CountingCollator({"image": image_processor()}, cache=tmp_path)
    collate(pictures(0))
    collate.processors["image"].image_mean = [0.1, 0.2, 0.3]
    assert same(collate(pictures(0)), MultimodalCollator(collate.processors)(pictures(0)))


def test_another_version_of_a_library_is_a_miss(tmp_path, monkeypatch):
    collate = CountingCollator({"image": image_processor()}, cache=tmp_path)
    collate(pictures(0))
    monkeypatch.setattr(processed_cache, "_versions", lambda: "pillow 99")
    collate(pictures(0))
    assert len(collate.processed) == 2


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    path, collate = tmp_path / "picture.png", CountingCollator({"image": image_processor()}, cache=tmp_path / "cache")
    for number in (0, 1):
        path.write_bytes(png(number))
        plain = MultimodalCollator({"image": image_processor()})(pictures(number))
        assert same(collate([{"image": path}]), plain)


@pytest.mark.parametrize("broken", [b"\x89PNG nonsense", png(0)[:-30], "/nowhere/0.png", "a\0b.png"])
def test_what_cannot_be_decoded_is_never_kept(broken, tmp_path):
    collate = MultimodalCollator({"image": image_processor()}, cache=tmp_path)
    for _ in range(2):
        assert collate([{"image": broken}])["modality_mask"].tolist() == [[False]]
    assert collate.undecodable == {"image": 2} and not stored(tmp_path)


def test_a_cell_of_no_known_kind_is_still_a_mistake(tmp_path):
    with pytest.raises(TypeError, match="the image column holds the int 3"):
        MultimodalCollator({"image": image_processor()}, cache=tmp_path)([{"image": 3}])


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-7], lambda data: data[:-1] + b"\x99"])
def test_a_damaged_entry_is_computed_and_written_again(damage, tmp_path):
    collate = CountingCollator({"image": image_processor()}, cache=tmp_path)
    expected = collate(pictures(0))
    (path,) = stored(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(collate(pictures(0)), expected)
    assert len(collate.processed) == 2 and path.read_bytes() == whole


@pytest.mark.parametrize(
    "extractor", [Wav2Vec2FeatureExtractor(), WhisperFeatureExtractor(8, chunk_length=1, dither=0.1)]
)
def test_clips_that_depend_on_their_batch_or_on_chance_are_not_kept(extractor, tmp_path):
    collate = CountingCollator({"audio": extractor}, cache=tmp_path)
    for _ in range(2):
        collate([{"audio": NOISE[:9000]}, {"audio": NOISE}])
    assert len(collate.processed) == 4 and not stored(tmp_path)


def test_texts_are_not_kept(tokenizer, tmp_path):
    MultimodalCollator({"text": tokenizer}, cache=tmp_path)([{"text": "a red dog"}])
    assert not stored(tmp_path)


@pytest.mark.slow
def test_workers_that_write_the_same_files_at_once_agree(tmp_path):
    """Every worker starts with the same cells, in the same order."""
    samples = pictures(*range(6)) * 4
    plain, cached = MultimodalCollator({"image": image_processor()}), {"image": image_processor()}
    expected = [plain(samples[:6])] * 4
    for _ in range(2):
        loader = DataLoader(samples, 6, num_workers=2, collate_fn=MultimodalCollator(cached, cache=tmp_path))
        assert all(same(got, wanted) for got, wanted in zip(loader, expected, strict=True))
    assert len(stored(tmp_path)) == 6 == len([path for path in tmp_path.rglob("*") if path.is_file()])


def test_a_pickled_collator_shares_the_files(tmp_path):
    collate = CountingCollator({"image": image_processor()}, cache=os.fspath(tmp_path))
    collate(pictures(0))
    copy = pickle.loads(pickle.dumps(collate))
    copy(pictures(0))
    assert len(copy.processed) == 1


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: a cache needs a folder"):
        MultimodalCollator({"image": image_processor()}, cache=tmp_path / "file")
