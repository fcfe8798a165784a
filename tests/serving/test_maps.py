"""A map that an answer has not is offered nowhere: refused by name, absent otherwise, in every form and protocol."""

import io
import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from PIL import Image
from tritonclient.utils import InferenceServerException

from penumbra.models.card import MAPS, MAPS_OF_ONE
from tests.conftest import picture
from tests.serving.server import Server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gevent's, behind tritonclient
IMAGE = picture(np.random.Generator(np.random.PCG64(5)), 45, 70)
FORMS = ("application/json", "application/x-npz", "application/geo+json")
PICTURES = ("image/png", "image/tiff")
SINGLE = (("toy-pointwise", {}), ("toy-boxed", {}), ("toy-tagged", {"tags": "red"}), ("toy-latent", {"samples": "1"}))
SEVERAL = (("toy-opposed", {}), ("toy-boxed", {"boxes": "[[5, 5, 40, 30, 1]]"}), ("toy-latent", {}))


def encoded() -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    return file.getvalue()


def ask(client: httpx.Client, path: str = "/segment", *, accept: str, **options: str) -> httpx.Response:
    return client.post(path, content=encoded(), params=options, headers={"Content-Type": "image/png", "Accept": accept})


def test_one_sample_has_no_mutual_information_in_any_form_of_an_answer(client: httpx.Client) -> None:
    for model, more in SINGLE:
        for accept in (*FORMS, *PICTURES):
            wanted = "picture" if accept in PICTURES else "outputs"
            for path in ("/segment", "/jobs"):
                refused = ask(client, path, accept=accept, model=model, **{wanted: "mutual_information"}, **more)
                assert refused.status_code == 400, (model, accept, path)
                assert re.search("no output 'mutual_information'; .*seam.* samples is 1", refused.json()["error"])


def test_what_nobody_named_is_absent_where_an_answer_has_it_not(client: httpx.Client) -> None:
    for models, has in ((SINGLE, False), (SEVERAL, True)):
        for model, more in models:
            table = ask(client, accept="application/json", model=model, **more).json()["classes"]
            regions = ask(client, accept="application/geo+json", model=model, **more).json()["features"]
            for row in (*table, *(region["properties"] for region in regions)):
                assert ("mean_mutual_information" in row) == has and "mean_entropy" in row and "mean_seam" not in row
            arrays = ask(client, accept="application/x-npz", model=model, **more).content
            assert set(np.load(io.BytesIO(arrays))) == {"labels", "confidence", "entropy"} | (
                {"mutual_information"} if has else set()
            )


def test_one_sample_in_several_views_has_mutual_information_and_says_its_views(client: httpx.Client) -> None:
    for model, more in SINGLE:
        asked = {"model": model, "views": "flip", **more}
        answer = ask(client, accept="application/json", **asked)
        assert answer.json()["views"] == answer.headers["X-Penumbra-Views"] == "flip" and answer.json()["samples"] == 1
        assert all("mean_mutual_information" in row for row in answer.json()["classes"])
        assert ask(client, accept="image/png", picture="mutual_information", **asked).status_code == 200
        refused = ask(client, accept="application/json", outputs="seam", **asked)
        assert re.search("no output 'seam'; .* samples is 1 and views is flip", refused.json()["error"])
    refused = ask(client, accept="application/json", model="toy-latent", views="turned")
    assert refused.status_code == 400 and "views is 'turned'; none, flip, d4, scales are" in refused.json()["error"]


def test_the_seam_is_there_for_who_asks_for_it(client: httpx.Client) -> None:
    for model, more in SINGLE:
        table = ask(client, accept="application/json", model=model, outputs="seam", **more).json()["classes"]
        assert all("mean_seam" in row and "mean_entropy" in row for row in table)
        arrays = np.load(
            io.BytesIO(ask(client, accept="application/x-npz", model=model, outputs="seam", **more).content)
        )
        assert set(arrays) == {"labels", "seam"}
        assert ask(client, accept="image/png", model=model, picture="seam", **more).status_code == 200
    for model, more in SEVERAL:
        assert ask(client, accept="application/x-npz", model=model, outputs="seam", **more).status_code == 400


def test_the_list_of_models_says_which_maps_can_be_asked_for(client: httpx.Client) -> None:
    maps = {model["name"]: model["maps"] for model in client.get("/models").json()["models"]}
    several, single = [*MAPS], [*MAPS_OF_ONE]
    assert maps["toy-pointwise"] == {"single": single} and maps["toy-opposed"] == {"several": several}
    assert maps["toy-latent"] == maps["toy-boxed"] == {"single": single, "several": several}
    assert maps["toy-bright"] == {"single": [*single, "brightness"]}


def test_the_api_document_says_what_seam_and_default_are(client: httpx.Client) -> None:
    parameters = client.get("/docs.json").json()["paths"]["/segment"]["post"]["parameters"]
    (outputs,) = [parameter for parameter in parameters if parameter["name"] == "outputs"]
    assert outputs["schema"]["default"] == "default" and "seam" in outputs["description"]


Api = tuple[object, triton_http.InferenceServerClient | triton_grpc.InferenceServerClient]


@pytest.fixture(params=["http", "grpc"])
def api(request: pytest.FixtureRequest, server: Server) -> Iterator[Api]:
    if request.param == "http":
        with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as connected:
            yield triton_http, connected
    else:
        with triton_grpc.InferenceServerClient(server.grpc_address) as connected:
            yield triton_grpc, connected


def infer(api: Api, model: str, *names: str, **parameters: object) -> set[str]:
    """Names of the outputs of an answer."""
    module, client = api
    image = module.InferInput("image", list(IMAGE.shape), "UINT8")  # type: ignore[attr-defined]
    image.set_data_from_numpy(IMAGE)
    wanted = [module.InferRequestedOutput(name) for name in names] or None  # type: ignore[attr-defined]
    answer = client.infer(model, [image], outputs=wanted, parameters=parameters)
    outputs = answer.get_response()["outputs"] if module is triton_http else answer.get_response().outputs
    return {output["name"] if module is triton_http else output.name for output in outputs}


def test_the_protocols_metadata_and_configuration_offer_what_a_model_has(server: Server, api: Api) -> None:
    for model, maps in (("toy-pointwise", MAPS_OF_ONE), ("toy-boxed", MAPS_OF_ONE), ("toy-latent", MAPS)):
        listed = {"labels", *maps, "probabilities"}
        module, client = api
        more = {} if module is triton_http else {"as_json": True}
        metadata, config = client.get_model_metadata(model, **more), client.get_model_config(model, **more)
        assert {output["name"] for output in metadata["outputs"]} == listed
        assert {output["name"] for output in config.get("config", config)["output"]} == listed
        assert infer(api, model, *listed) == listed


def test_inference_answers_by_default_with_what_there_is(api: Api) -> None:
    usual = {"labels", "confidence", "entropy"}
    for model, parameters in (("toy-pointwise", {}), ("toy-boxed", {}), ("toy-latent", {"samples": 1})):
        assert infer(api, model, **parameters) == usual
        assert infer(api, model, "seam", **parameters) == {"seam"}
        with pytest.raises(InferenceServerException, match="no output 'mutual_information'"):
            infer(api, model, "mutual_information", **parameters)
        assert infer(api, model, views="flip", **parameters) == usual | {"mutual_information"}
    boxes = {"boxes": "[[5, 5, 40, 30, 1]]"}
    for model, parameters in (("toy-opposed", {}), ("toy-boxed", boxes), ("toy-latent", {})):
        assert infer(api, model, **parameters) == usual | {"mutual_information"}
        assert infer(api, model, "mutual_information", "labels", **parameters) == {"mutual_information", "labels"}
