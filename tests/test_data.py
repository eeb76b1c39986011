"""Loaders: what is read as what, labels, batches, images, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm import UserError, optimize
from onnx_autoglm.data import load_dataset
from onnx_autoglm.data_text import feeds_for
from onnx_autoglm.preprocess import plan_preprocess

FREE = "g (float[n,6] x) => (float[n,7] y) <float[6,7] a> { y = MatMul(x, a) }"
ONE = FREE.replace("float[n,", "float[1,")
FOUR = FREE.replace("float[n,", "float[4,")


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)


def stacked(feeds) -> np.ndarray:
    return np.concatenate([feed["x"] for feed in feeds])


# --- arrays


def test_many_samples_without_labels_are_several_runs(tmp_path: Path) -> None:
    """Where the graph leaves the batch open; the last run may be smaller."""
    np.savez(tmp_path / "s.npz", x=samples(41))
    data = load_dataset(tmp_path / "s.npz", model(FREE))
    assert [feed["x"].shape[0] for feed in data] == [2] * 20 + [1] and data.rows == 41
    assert np.array_equal(stacked(data), samples(41))


@pytest.mark.parametrize("name", ["labels", "y"])
def test_labels_go_with_their_samples(tmp_path: Path, name: str) -> None:
    x, right = samples(41), np.arange(41) % 7
    np.savez(tmp_path / "s.npz", x=x, **{name: right})
    # An array is a label only if it is no input: the graph's input is called x, its output y.
    for text, sizes in ((FREE, [2] * 20 + [1]), (ONE, [1] * 41)):
        data = load_dataset(tmp_path / "s.npz", model(text))
        assert [feed["x"].shape[0] for feed in data] == sizes and data.rows == 41
        assert data.metric == "top-1" and data.labels is not None
        assert np.array_equal(stacked(data), x) and np.array_equal(np.concatenate(data.labels), right)


def test_a_batch_that_is_not_full_is_padded_with_samples_that_do_not_count(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=samples(6), labels=np.arange(6))
    data = load_dataset(tmp_path / "s.npz", model(FOUR))
    assert data.labels is not None and [row.tolist() for row in data.labels] == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert np.array_equal(stacked(data)[:6], samples(6)) and stacked(data).shape == (8, 6)


def test_an_input_called_labels_is_an_input(tmp_path: Path) -> None:
    text = FREE.replace("float[n,6] x", "float[n,6] labels").replace("MatMul(x", "MatMul(labels")
    np.savez(tmp_path / "s.npz", labels=samples(5))
    data = load_dataset(tmp_path / "s.npz", model(text))
    assert data.metric == "agreement" and data.feeds[0]["labels"].shape == (5, 6)


def test_samples_without_labels_stay_as_they_are_saved(tmp_path: Path) -> None:
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", x=samples(5 + index))
    data = load_dataset(tmp_path, model(FREE))
    assert [feed["x"].shape[0] for feed in data] == [5, 6, 7] and data.rows == 18
    np.savez(tmp_path / "0.npz", x=samples(8))
    assert len(load_dataset(tmp_path / "0.npz", model(FOUR)).feeds) == 2


def test_one_npy_file_per_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", samples(20))
    np.save(tmp_path / "labels.npy", np.arange(20)[:, None] % 7)
    data = load_dataset(tmp_path, model(FREE))
    assert data.metric == "top-1" and np.array_equal(stacked(data), samples(20))
    np.save(tmp_path / "z.npy", samples(20))
    with pytest.raises(UserError, match=r"\*\.npy has an array 'z', which is no input"):
        load_dataset(tmp_path, model(FREE))
    (tmp_path / "z.npy").write_text("no array")
    with pytest.raises(UserError, match=r"z\.npy is not a readable \.npy file"):
        load_dataset(tmp_path, model(FREE))


def test_samples_of_polygraphy(tmp_path: Path) -> None:
    save_json = pytest.importorskip("polygraphy.json").save_json
    save_json([{"x": samples(3)}, {"x": samples(5)}], str(tmp_path / "s.json"))
    data = load_dataset(tmp_path / "s.json", model(FREE))
    assert np.array_equal(stacked(data), np.concatenate([samples(3), samples(5)])) and len(data.feeds) == 2
    for content, expected in (
        ("no json", "is not JSON that polygraphy reads"),
        ('[{"x": 1}]', "holds no list of feeds"),
        ("[]", "holds no list of feeds"),
    ):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(UserError, match=expected):
            load_dataset(tmp_path / "s.json", model(FREE))


@pytest.mark.parametrize(
    ("text", "arrays", "expected"),
    [
        (FREE, {"labels": np.arange(4)}, "4 labels, but the inputs have shapes"),
        (FREE, {"labels": np.arange(5) - 1}, "label -1 is negative"),
        (FREE, {"labels": np.arange(5.0)}, "expected one integer per sample"),
        (FREE, {"labels": np.zeros((5, 2), int)}, r"shape \[5, 2\]"),
        (FREE, {"z": np.arange(5)}, "'z', which is no input"),
        (FOUR, {}, "5 samples and the model takes batches of 4"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, text: str, arrays: dict[str, np.ndarray], expected: str
) -> None:
    np.savez(tmp_path / "s.npz", x=samples(5), **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=expected):
        load_dataset(tmp_path / "s.npz", model(text))


def test_folders_of_several_kinds_and_half_labelled_ones(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=samples(5))
    np.savez(tmp_path / "b.npz", x=samples(5), labels=np.arange(5))
    with pytest.raises(UserError, match="some samples have labels and some have none"):
        load_dataset(tmp_path, model(FREE))
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(UserError, match="both .txt and .npz files"):
        load_dataset(tmp_path, model(FREE))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither .txt nor .npz files, nor images"):
        load_dataset(tmp_path / "empty", model(FREE))


def test_sets_that_share_one_sample_are_refused(tmp_path: Path) -> None:
    """However they are batched, and whatever else is in them."""
    text = "g (float[n,6] x) => (float[n,7] y) <float[6,12] a, float[12,7] c> "
    ir.save(model(text + "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"), tmp_path / "model.onnx")
    x = samples(101)
    np.savez(tmp_path / "c.npz", x=x[:100], labels=np.zeros(100, int))
    for rows, shared in ((x[99:], True), (x[100:], False)):
        np.savez(tmp_path / "e.npz", x=rows, labels=np.zeros(len(rows), int))
        given = {"prune": {"ffn-channel": 0.5}, "calib": tmp_path / "c.npz", "eval": tmp_path / "e.npz"}
        if shared:
            with pytest.raises(UserError, match="share data"):
                optimize(tmp_path / "model.onnx", tmp_path / "out", **given)
        else:
            report = optimize(tmp_path / "model.onnx", tmp_path / "out", **given)
            assert report.repair["calibration"]["name"] == "c.npz"
            hashes = {report.repair["calibration"]["sha256"], report.quality["data"]["sha256"]}
            assert len(hashes) == 2 and all(len(text) == 64 for text in hashes)


# --- images


def image_model(shape: str = "n,3,4,4", kind: str = "float") -> ir.Model:
    return model(f"g ({kind}[{shape}] x) => ({kind}[{shape}] y) {{ y = Identity(x) }}")


def save_image(path: Path, colour: tuple[int, ...] | int, size: tuple[int, int] = (8, 8)) -> Path:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)
    return path


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    for index, name in enumerate(("cat", "ant", "bee")):
        save_image(tmp_path / name / "1.png", (255, 51 * index, 0))
    (tmp_path / "aardvark").mkdir()  # without images, and a class all the same
    data = load_dataset(tmp_path, image_model())
    assert data.labels is not None and np.concatenate(data.labels).tolist() == [1, 2, 3] and data.classes == 4
    batch = np.concatenate([feed["x"] for feed in data])
    assert batch.shape == (3, 3, 4, 4) and batch.dtype == np.float32
    assert np.allclose(batch[:, :, 0, 0], [[1, 0.2, 0], [1, 0.4, 0], [1, 0, 0]], atol=1e-6)


def test_folders_named_by_numbers_are_these_classes(tmp_path: Path) -> None:
    for name in ("2", "10", "0"):
        save_image(tmp_path / name / "1.png", (int(name), 0, 0))
    data = load_dataset(tmp_path, image_model("4,3,4,4"))
    assert data.labels is not None and data.classes is None
    assert data.labels[0].tolist() == [0, 10, 2, -1]  # the order of the files
    assert np.rint(255 * data.feeds[0]["x"][:, 0, 0, 0]).tolist() == [0, 10, 2, 2]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for index in range(3):
        save_image(tmp_path / f"{index}.png", 100 + index)
    data = load_dataset(tmp_path, image_model("n,4,4,1"))
    assert data.metric == "agreement" and data.rows == 3 and len(data.samples) == 3
    assert data.feeds[0]["x"].shape == (1, 4, 4, 1)
    with pytest.raises(UserError, match="has 3 images and the model takes 2 at once"):
        load_dataset(tmp_path, image_model("2,1,4,4"))
    alone = load_dataset(tmp_path / "0.png", image_model("n,1,4,4"))
    assert alone.rows == 1 and alone.name == "0.png"


def test_resize_crop_and_normalise(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = (255, 128, 0)
    image.fromarray(pixels).save(tmp_path / "wide.png")
    data = load_dataset(
        tmp_path, image_model(), preprocess="size=8,crop=4,mean=0.5:0.25:0,std=0.5:1:2,scale=255"
    )
    expected = [(1 - 0.5) / 0.5, 128 / 255 - 0.25, 0]
    assert np.allclose(data.feeds[0]["x"], np.reshape(expected, (1, 3, 1, 1)), atol=1e-6)
    squeezed = load_dataset(tmp_path, image_model(), preprocess="size=4x4")
    assert np.allclose(squeezed.feeds[0]["x"][0, 0, :, 0], 0, atol=0.3)  # the whole width, not its middle
    assert load_dataset(tmp_path, image_model()).sha256 != squeezed.sha256


def test_integers_are_not_scaled(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", (200, 100, 7))
    (feed,) = load_dataset(tmp_path, image_model(kind="uint8"))
    assert feed["x"].dtype == np.uint8 and feed["x"][0, :, 0, 0].tolist() == [200, 100, 7]
    (feed,) = load_dataset(tmp_path, image_model(kind="uint8"), preprocess="scale=0.4")
    assert feed["x"][0, :, 0, 0].tolist() == [255, 250, 18]  # 17.5 is rounded, 500 is cut off


def test_defaults_follow_from_the_shape_of_the_input() -> None:
    def steps(shape: str, text: str | None = None):
        return plan_preprocess(text, image_model(shape).graph.inputs[0])

    assert (steps("n,3,h,w").crop, steps("n,3,h,w").layout, steps("n,3,h,w").gray) == (
        (224, 224),
        "nchw",
        False,
    )
    assert (steps("n,28,30,1").crop, steps("n,28,30,1").layout, steps("n,28,30,1").gray) == (
        (28, 30),
        "nhwc",
        True,
    )
    assert steps("n,c,h,w", "size=256,crop=200x100").crop == (200, 100)
    assert steps("n,c,h,w", "size=96").crop == (96, 96) and steps("n,3,64,64", "size=80").size == 80


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sizes=3", "'sizes=3' is no KEY=VALUE"),
        ("size", "'size' is no KEY=VALUE"),
        ("size=8,size=9", "size is given twice"),
        ("size=big", "size=big is no length"),
        ("size=2", "size=2 is smaller than the crop 4x4"),
        ("mean=0.5:0.5", "mean has 2 numbers and the image 3 channels"),
        ("mean=x", "holds something that is no number"),
        ("std=0", "std=0 must be above zero"),
        ("layout=hwc", "layout=hwc is not known"),
        ("gray=yes", "gray=yes is not known"),
        ("gray=true", "set gray=false"),
    ],
)
def test_a_preprocess_line_that_makes_no_sense(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        plan_preprocess(text, image_model().graph.inputs[0])


def test_images_and_models_that_do_not_fit(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 3)
    with pytest.raises(UserError, match="does not take one batch of images"):
        load_dataset(tmp_path, model(FREE))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match=r"cannot read the image .*a\.png"):
        list(load_dataset(tmp_path, image_model()))
    ir.save(model(FREE), tmp_path / "model.onnx")
    np.savez(tmp_path / "s.npz", x=samples(5))
    with pytest.raises(UserError, match="--preprocess is for images"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", calib=tmp_path / "s.npz", preprocess="size=8")


def test_images_calibrate_and_judge_a_classifier(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    text = (
        "g (float[1,3,8,8] x) => (float[1,3] y) <float[12,3,3,3] a, float[12,3] c> "
        "{ h = Conv<pads=[1,1,1,1]>(x, a) r = Relu(h) p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, c) }"
    )
    ir.save(model(text), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    for name, count in (("calib", 20), ("eval", 9)):
        for index in range(count):
            folder = tmp_path / name / f"class{index % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(rng.integers(0, 255, (10, 12, 3), np.uint8)).save(folder / f"{index}.png")
    report = optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        prune={"conv-channel": 0.25},
        calib=tmp_path / "calib",
        eval=tmp_path / "eval",
        preprocess="size=8,mean=0.5,std=0.25",
    )
    assert report.repair["calibration"]["rows"] == 20 and report.repair["consumers"][0]["repaired"]
    assert report.quality["metric"] == "top-1" and report.quality["source"]["samples"] == 9
    assert report.quality["positions"] == 9 and report.quality["kl"] < 1


# --- text


def test_a_text_is_fed_to_a_model_with_smaller_caches(tmp_path: Path) -> None:
    def language(heads: int) -> ir.Model:
        return model(
            f"g (int64[b,s] ids, float[b,{heads},past,4] cache) => (float[b,s,8] y, float[b,{heads},past,4] z) "
            "<float[32,8] table> { y = Gather(table, ids) z = Identity(cache) }"
        )

    data = load_dataset(word_text(tmp_path), language(4), tokenizer=tmp_path / "tokenizer.json", window=4)
    feeds = feeds_for(data, language(2))
    assert feeds is not None and data.feeds[0]["cache"].shape == (1, 4, 0, 4)
    assert feeds[0]["cache"].shape == (1, 2, 0, 4) and np.array_equal(feeds[0]["ids"], data.feeds[0]["ids"])


def word_text(folder: Path, count: int = 12) -> Path:
    """A text of the words w0 to w31, and a tokenizer for them beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{index}": index for index in range(32)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "words.txt"
    path.write_text(" ".join(f"w{index}" for index in np.random.default_rng(1).integers(1, 32, count)))
    return path
