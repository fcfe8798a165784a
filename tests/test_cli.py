"""The command line: what it writes and prints, its exit codes, and one sentence on stderr when it fails."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image
from rasterio.transform import from_origin

from penumbra.__main__ import main
from penumbra.models.card import Parity
from penumbra.models.checkpoint import save_checkpoint
from penumbra.serving import VERSION
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.layout import Reading
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.store import open_artifact, sha256_of
from penumbra.serving.process import ROOT, build_facts
from tests.conftest import CLASSES, picture, toy_card

MAPS = ("confidence", "entropy", "mutual_information")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def opened(path: Path) -> Image.Image:
    """A picture whose file is closed again."""
    with Image.open(path) as image:
        image.load()
        return image


def failed(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (sentence,) = result.stderr.strip().splitlines()
    assert sentence.startswith("penumbra: ") and "Traceback" not in sentence
    for word in words:
        assert word in sentence


@pytest.fixture
def photo(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture(rng, 40, 66)).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, *toy_card("latent"))
    return path


def test_help_lists_the_verbs_in_the_order_of_the_work() -> None:
    output = run("--help").stdout
    verbs = (
        "serve", "predict", "models", "train", "import", "ensemble", "export", "tune", "verify", "sign", "promote",
        "evaluate", "calibrate",
    )  # fmt: skip
    places = [output.index(f"\n  {verb} ") for verb in verbs]
    assert places == sorted(places)


def test_the_version_is_told_with_the_commit_of_the_checkout_or_else_of_the_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit = f", commit {head}" if (ROOT / ".git").exists() else ""
    assert run("--version").stdout == f"penumbra, version {VERSION}{commit}\n"
    monkeypatch.setenv("PENUMBRA_REVISION", "0123abc")
    assert run("--version").stdout == f"penumbra, version {VERSION}, commit 0123abc\n"
    assert build_facts("0123abc") == {"version": VERSION, "commit": "0123abc"}
    monkeypatch.setattr("penumbra.serving.process.ROOT", tmp_path)
    assert build_facts("") == {"version": VERSION}, "what is installed in a folder of another project is none of its"
    (tmp_path / ".git").touch()
    assert build_facts("") == {"version": VERSION}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_facts("") == {"version": VERSION}


def test_models_lists_the_store(toy_store: Path) -> None:
    result = run("models", "--store", toy_store)
    assert result.exit_code == 0 and all(f"toy-{form}" in result.stdout for form in ("latent", "nan", "opposed"))
    cards = json.loads(run("models", "--store", toy_store, "--json").stdout)
    names = [card["name"] for card in cards]
    assert names == sorted(names) and {"toy-boxed", "toy-latent", "toy-nan", "toy-opposed", "toy-pointwise"} <= {*names}
    latent = cards[names.index("toy-latent")]
    assert latent["sampling"]["kind"] == "latent" and latent["export"]["backend"] == "torchscript"


def test_models_of_an_absent_store_are_none(tmp_path: Path) -> None:
    failed(run("models", "--store", tmp_path / "none", "--json"), 2, "there are no models", "penumbra export")


# -- predict -------------------------------------------------------------------------------------


def test_predict_takes_what_is_larger_than_the_queue_of_a_server(toy_store: Path, tmp_path: Path) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "wide.png")
    options = ("--model", "toy-latent", "--samples", "64", "--overlap", "0.9", "--store", toy_store, "--json")
    result = run("predict", tmp_path / "wide.png", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["windows"] * 64 > Limits().queue_samples


def test_predict_gives_a_models_own_map_its_own_unit(toy_store: Path, tmp_path: Path, photo: Path) -> None:
    options = ("--outputs", "brightness", "-o", tmp_path / "out", "--store", toy_store, "--json")
    result = run("predict", photo, "-m", "toy-bright", *options)
    files = json.loads(result.stdout)["files"]
    assert re.search(r"brightness\.png \(white is 0\.\d+; 0 to 1\)$", files["brightness"])
    assert files["entropy"].endswith(" nats)") and not files["confidence"].endswith(" nats)")


def test_predict_writes_labels_overlay_maps_and_arrays(toy_store: Path, tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "out"
    result = run("predict", photo, "-m", "toy-pointwise", "-o", out, "--store", toy_store)
    assert result.exit_code == 0, result.output
    maps = {"confidence", "entropy"}
    names = {"labels", "overlay", *maps}
    assert "mutual information" not in result.stdout
    assert {path.name for path in out.iterdir()} == {f"photo_{name}.png" for name in names} | {"photo_maps.npz"}
    image = np.asarray(opened(photo))
    clear = np.diff(np.sort(image.astype(int), axis=-1))[:, :, -1] > 0
    labels = opened(out / "photo_labels.png")
    assert labels.mode == "P" and labels.size == (66, 40)
    assert (np.asarray(labels) == image.argmax(-1))[clear].all()
    assert np.reshape(labels.getpalette(), (-1, 3))[:3].tolist() == [list(info.color) for info in CLASSES]
    for name in names - {"labels"}:
        written = opened(out / f"photo_{name}.png")
        assert written.mode == "RGB" and written.size == (66, 40)
    with np.load(out / "photo_maps.npz") as file:
        arrays = dict(file)
    assert set(arrays) == {"labels", *maps}
    assert np.array_equal(arrays["labels"], np.asarray(labels))
    assert arrays["entropy"].dtype == np.float32 and arrays["entropy"].shape == (40, 66)


def test_predict_prints_one_json_object_per_picture(toy_store: Path, tmp_path: Path, photo: Path) -> None:
    other = tmp_path / "other.png"
    opened(photo).rotate(90, expand=True).save(other)
    out = tmp_path / "out"
    result = run(
        "predict", photo, other, "-m", "toy-latent", "-o", out, "--store", toy_store, "--samples", 3, "--seed", 9,
        "--overlap", 0.5, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["image"] for answer in answers] == [str(photo), str(other)]
    assert [answer["size"] for answer in answers] == [[40, 66], [66, 40]]
    for answer in answers:
        assert (answer["model"], answer["samples"], answer["seed"]) == ("toy-latent", 3, 9)
        assert set(answer["files"]) == {"labels", "overlay", "maps", *MAPS}
        assert sum(row["pixels"] for row in answer["classes"]) == 40 * 66


def test_predict_prints_names_with_any_sign_and_how_much_is_void(toy_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a["
    folder.mkdir()
    pixels = np.full((40, 66, 4), 200, np.uint8)
    pixels[:10, :, 3] = 0
    Image.fromarray(pixels).save(folder / "bold] [draft] :car:.png")  # as one path it has rich's [/bold]
    result = run(
        "predict", folder / "bold] [draft] :car:.png", "-m", "toy-latent", "-o", tmp_path / "out", "--store", toy_store
    )
    printed = "".join(result.stdout.split())  # lines break where the path is long
    assert result.exit_code == 0 and "a[/bold][draft]:car:.png" in printed, result.output
    assert "25.0%ofthepixelsholdnomeasurement" in printed


def test_predict_gives_the_same_arrays_for_the_same_seed(toy_store: Path, tmp_path: Path, photo: Path) -> None:
    written = []
    for seed, place in ((1, "a"), (1, "b"), (2, "c")):
        run("predict", photo, "-m", "toy-latent", "-o", tmp_path / place, "--store", toy_store, "--seed", seed)
        written.append((tmp_path / place / "photo_maps.npz").read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "unheard"], ["'unheard'", "toy-latent"]),
        ([], ["--model is needed", "toy-latent"]),
        (["-m", "toy-latent", "--samples", "0"], ["samples is 0"]),
        (["-m", "toy-opposed", "--samples", "3"], ["2 members"]),
        (["-m", "toy-latent", "--overlap", "1.5"], ["overlap is 1.5"]),
        (["-m", "toy-latent", "--overlap", "nan"], ["overlap is nan"]),
        (["-m", "toy-latent", "--seed", "-1"], ["seed is -1"]),
        (["-m", "toy-latent", "--views", "d4"], ["views is d4", "48x32", "flip"]),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(
    toy_store: Path, tmp_path: Path, photo: Path, options: list[str], words: list[str]
) -> None:
    failed(run("predict", photo, "-o", tmp_path / "out", "--store", toy_store, *options), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict"],
        ["predict", "absent.png"],
        ["predict", "--samples", "x", "a.png"],
        ["predict", "--views", "turned", "a.png"],
        ["nothing"],
        ["verify"],
        ["serve", "--port", "3000", "--grpc-port", "3000"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Error:" in result.stderr


def test_a_picture_that_cannot_be_read_is_named_with_exit_code_1(toy_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    failed(
        run("predict", path, "-m", "toy-latent", "--store", toy_store, "-o", tmp_path), 1, "notes.png", "none of PNG"
    )


def test_a_model_that_breaks_on_a_picture_is_one_sentence_with_exit_code_1(toy_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (5, 5), (255, 255, 255)).save(path)
    failed(run("predict", path, "-m", "toy-nan", "--store", toy_store, "-o", tmp_path), 1, "not finite")


# -- export and verify ---------------------------------------------------------------------------


def test_export_and_verify_print_place_and_parity(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    result = run("export", checkpoint, "--store", store)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == str(store / "toy-latent" / "1")
    figures = [field.name for field in dataclasses.fields(Parity)]
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == figures
    assert "PENUMBRA_WATCH_STORE_S" in result.stderr and "/v2/repository/models/toy-latent/load" in result.stderr
    exported = json.loads(run("export", checkpoint, "--store", store, "--json").stdout)
    assert exported["directory"] == str(store / "toy-latent" / "2") and list(exported["parity"]) == figures
    facts = open_artifact(store / "toy-latent" / "2").card.export
    assert facts and facts.checkpoint == sha256_of(checkpoint)
    assert json.loads(run("verify", "toy-latent", "--store", store, "--json").stdout) == exported
    older = json.loads(run("verify", "toy-latent", "--version", 1, "--store", store, "--json").stdout)
    assert older["directory"] == str(store / "toy-latent" / "1")


def test_verify_refuses_a_changed_artifact_with_exit_code_1(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("export", checkpoint, "--store", store)
    graph = store / "toy-latent" / "1" / "encode.ts"
    graph.write_bytes(graph.read_bytes() + b"x")
    failed(run("verify", "toy-latent", "--store", store), 1, "encode.ts was changed")
    failed(run("verify", "toy-latent", "--store", store, "--json"), 1, "encode.ts was changed")


def test_verify_of_what_is_not_there_is_exit_code_2(toy_store: Path) -> None:
    failed(run("verify", "unheard", "--store", toy_store), 2, "'unheard'", "toy-latent")
    failed(run("verify", "toy-latent", "--version", 7, "--store", toy_store), 2, "no version 7")
    failed(run("verify", "toy-latent", "--device", "cuda:99", "--store", toy_store), 2, "the device is 'cuda:99'")


def test_sign_signs_the_newest_version_whose_hashes_hold(checkpoint: Path, tmp_path: Path) -> None:
    store, key = tmp_path / "store", Ed25519PrivateKey.from_private_bytes(bytes(32))
    pem = tmp_path / "signing.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    older, newer = store / "toy-latent" / "1", store / "toy-latent" / "2"
    run("export", checkpoint, "--store", store)
    run("export", checkpoint, "--store", store)
    result = run("sign", "toy-latent", "--store", store, "--key", pem)
    assert result.exit_code == 0 and result.stdout == f"{newer / 'card.sig'}: signed toy-latent version 2\n"
    open_artifact(newer, trusted_keys=(key.public_key(),))
    (older / "encode.ts").write_bytes(b"changed")
    failed(run("sign", "toy-latent", "--version", 1, "--store", store, "--key", pem), 1, "encode.ts was changed")
    failed(run("sign", "toy-latent", "--store", store, "--key", checkpoint), 2, "toy.safetensors is no Ed25519 private")
    failed(run("sign", "toy-latent", "--store", store, "--key", tmp_path / "no.pem"), 2, "no.pem cannot be read")
    failed(run("sign", "unheard", "--store", store, "--key", pem), 2, "'unheard'", "toy-latent")
    assert not (older / "card.sig").exists() and run("verify", "toy-latent", "--store", store).exit_code == 0


def test_export_of_a_bad_checkpoint_is_exit_code_1_and_writes_nothing(tmp_path: Path) -> None:
    store, path = tmp_path / "store", tmp_path / "bad.safetensors"
    path.write_bytes(b"not a checkpoint")
    failed(run("export", path, "--store", store), 1, "bad.safetensors is not a safetensors file")
    card, network = toy_card("latent")
    save_checkpoint(path, dataclasses.replace(card, name="../escape"), network)
    failed(run("export", path, "--store", store), 1, "name")
    assert not store.exists() and sorted(tmp_path.iterdir()) == [path]


def test_export_to_an_unknown_backend_is_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    failed(run("export", checkpoint, "--store", tmp_path / "s", "--backend", "caffe"), 2, "'caffe'", "torchscript")


def test_one_broken_artifact_does_not_hide_the_others(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("export", checkpoint, "--store", store)
    run("export", checkpoint, "--store", store)
    (store / "toy-latent" / "1" / "encode.ts").unlink()
    result = run("models", "--store", store, "--json")
    assert [card["version"] for card in json.loads(result.stdout)] == [2]
    assert "encode.ts" in result.stderr


def test_two_pictures_of_one_name_are_refused_before_one_overwrites_the_other(
    toy_store: Path, tmp_path: Path, photo: Path
) -> None:
    twin = tmp_path / "photo.bmp"
    opened(photo).save(twin)
    failed(run("predict", photo, twin, "-m", "toy-pointwise", "--store", toy_store), 2, "same name")


# -- files that predict did not write ------------------------------------------------------------


def geotiff(path: Path, rng: np.random.Generator, height: int = 40, width: int = 50) -> Path:
    place = {"crs": "EPSG:32632", "transform": from_origin(400_000, 5_000_000, 10, 10)}
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8", **place}
    with rasterio.open(path, "w", **profile) as target:
        target.write(picture(rng, height, width).transpose(2, 0, 1))
    return path


def predicted(store: Path, output: Path, *images: Path) -> Result:
    return run("predict", *images, "-m", "toy-pointwise", "-o", output, "--store", store)


@pytest.mark.parametrize("place", ["", "link", "deep/.."])
def test_predict_overwrites_no_picture_that_it_is_to_answer(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, place: str
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in")
    first, second = (geotiff(tmp_path / "in" / name, rng) for name in ("a.tif", "a_labels.tif"))
    before = second.read_bytes()
    result = predicted(toy_store, tmp_path / "in" / place, first, second)
    assert result.exit_code == 2 and second.read_bytes() == before
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"penumbra: {first}: ") and "a_labels.tif is one of the pictures" in line
    assert (tmp_path / "in" / "a_labels_labels.tif").exists(), "the other picture is answered"
    again = predicted(toy_store, tmp_path / "in", first)
    assert again.exit_code == 2 and "Penumbra did not write it" in again.stderr and second.read_bytes() == before


@pytest.mark.parametrize("name", ["photo_labels.png", "photo_overlay.png", "photo_entropy.png", "photo_maps.npz"])
def test_predict_overwrites_what_penumbra_wrote_and_nothing_else(
    toy_store: Path, tmp_path: Path, photo: Path, name: str
) -> None:
    """A mask beside its photo has such a name, or an earlier answer that somebody has drawn in."""
    out = tmp_path / "out"
    out.mkdir()
    mask = b"somebody's"
    (out / name).write_bytes(mask)
    result = predicted(toy_store, out, photo)
    assert result.exit_code == 2 and f"{name} is in the way" in result.stderr
    assert [path.read_bytes() for path in out.iterdir()] == [mask]
    (out / name).unlink()
    assert predicted(toy_store, out, photo).exit_code == 0
    assert predicted(toy_store, out, photo).exit_code == 0, "its own earlier answers are replaced"
    if name.endswith("png"):
        opened(out / name).save(out / name)
        assert predicted(toy_store, out, photo).exit_code == 2
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "nowhere")
    assert predicted(toy_store, out, photo).exit_code == 2 and (out / name).is_symlink()


@pytest.mark.parametrize("name", ["scene_labels.tif", "scene_maps.tif"])
def test_predict_of_a_raster_overwrites_what_penumbra_wrote_and_nothing_else(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    scene, out = geotiff(tmp_path / "scene.tif", rng), tmp_path / "out"
    out.mkdir()
    for theirs in (b"somebody's", scene.read_bytes()):
        (out / name).write_bytes(theirs)
        assert predicted(toy_store, out, scene).exit_code == 2
        assert [path.read_bytes() for path in out.iterdir()] == [theirs]
    (out / name).unlink()
    for _ in range(2):
        assert predicted(toy_store, out, scene).exit_code == 0
    assert {path.name for path in out.iterdir()} == {"scene_labels.tif", "scene_maps.tif", "scene_item.json"}


@pytest.mark.parametrize("theirs", ["scene.partial", "scene.partial/notes.txt", "scene.partial/labels"])
def test_predict_removes_no_partial_that_it_did_not_make(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, theirs: str
) -> None:
    scene, out = geotiff(tmp_path / "scene.tif", rng), tmp_path / "out"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("somebody's")
    result = predicted(toy_store, out, scene)
    assert result.exit_code == 2 and "scene.partial" in result.stderr and "move it away" in result.stderr
    assert [path for path in out.rglob("*") if path.is_file()] == [out / theirs]
    assert (out / theirs).read_text() == "somebody's"


def test_one_pictures_fault_is_that_pictures(
    toy_store: Path, tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is no picture, one that fails oddly, and one whose model fails; the others are answered."""
    (tmp_path / "notes.png").write_text("not a picture")
    opened(photo).save(tmp_path / "odd.png")
    opened(photo).save(tmp_path / "last.png")

    def opening(path: Path, limits: Limits, reading: Reading) -> object:
        if path.stem == "odd":
            raise AssertionError("something odd")
        return open_image(path, limits, reading)

    monkeypatch.setattr("penumbra.serving.files.predict.open_image", opening)
    images = [tmp_path / f"{name}.png" for name in ("notes", "odd", "photo", "last")]
    result = run("predict", *images, "-m", "toy-pointwise", "-o", tmp_path / "out", "--store", toy_store, "--json")
    assert result.exit_code == 1
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == [str(path) for path in images[2:]]
    first, second = result.stderr.splitlines()
    assert "notes.png" in first and f"{images[1]}: it failed unexpectedly (AssertionError: something odd)" in second
